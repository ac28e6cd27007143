"""Secrets as files, certificates as the environment names them, and texts without either."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from qlora_contract.places import CREDENTIALS_ENV, CREDENTIALS_ROOT
from qlora_trainer.errors import ConfigurationError, TransferRefused

Role = Literal["model", "dataset", "output"]
ROLES: tuple[Role, ...] = ("model", "dataset", "output")

HUB_KEYS = ("token",)
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
S3_SESSION_KEY = "AWS_SESSION_TOKEN"
"""Only credentials that expire have it."""

_SECRET_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", S3_SESSION_KEY)
_PROXY_NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_SHORTEST_SECRET = 4
"""Characters; to blot out anything shorter would blot out half of the text."""


@dataclass(frozen=True)
class Credentials:
    """What a source or destination was given to show."""

    role: Role
    values: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Key -> value; empty: nothing was given, so the libraries look in their own places."""

    @property
    def field(self) -> str:
        """The field of a job that names their Secret."""
        return f"{self.role}.credentialsSecret"


def read_credentials(role: Role, keys: tuple[str, ...], environ: Mapping[str, str]) -> Credentials:
    """The files of a role's Secret; none when it has no folder.

    Args:
        role: whose.
        keys: that it must have.
        environ: may name another folder than the one that pods mount.

    Raises:
        TransferRefused: the Secret lacks a key.
    """
    folder = _root(environ) / role
    if not folder.is_dir():
        return Credentials(role)
    values = _values(folder)
    found = Credentials(role, values)
    if missing := [key for key in keys if not values.get(key)]:
        there = ", ".join(sorted(values)) or "none"
        raise TransferRefused(
            f"the Secret of {found.field} lacks {' and '.join(missing)}, or it is empty there; its keys: {there}"
        )
    return found


def _root(environ: Mapping[str, str]) -> Path:
    return Path(environ.get(CREDENTIALS_ENV) or CREDENTIALS_ROOT)


def _values(folder: Path) -> dict[str, str]:
    """Key -> value of a mounted Secret; Kubernetes' own links there begin with a dot."""
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return {path.name: path.read_text(errors="replace").strip() for path in files}


def ca_bundle(environ: Mapping[str, str], *names: str) -> str | None:
    """The file of certificates to trust that the first of these variables names; None: the system's own.

    Raises:
        ConfigurationError: it names no file.
    """
    for name in names:
        if path := environ.get(name):
            if not Path(path).is_file():
                raise ConfigurationError(f"{name} is {path}, and there is no such file of certificates")
            return path
    return None


def redact(text: str, environ: Mapping[str, str]) -> str:
    """A text without the secrets that are known here. The last guard: no text of ours quotes one."""
    for secret in sorted(_secrets(environ), key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return text


def _secrets(environ: Mapping[str, str]) -> set[str]:
    folders = [_root(environ) / role for role in ROLES]
    mounted = {value for folder in folders if folder.is_dir() for value in _values(folder).values()}
    proxies = {environ.get(name) or environ.get(name.lower()) or "" for name in _PROXY_NAMES}
    passwords = {urlsplit(proxy).password or "" for proxy in proxies}
    return mounted | passwords | {environ.get(name, "") for name in _SECRET_NAMES}
