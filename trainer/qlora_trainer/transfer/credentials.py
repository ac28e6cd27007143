"""Credentials from the files of a Secret, certificates by environment variable, and texts with secrets removed."""

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from qlora_contract.env import CREDENTIALS_ENV
from qlora_contract.paths import CREDENTIALS_ROOT, credentials_folder
from qlora_contract.remote import setting_of
from qlora_trainer.errors import ConfigurationError, TransferRefused

HUB_KEYS = ("token",)
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
S3_SESSION_KEY = "AWS_SESSION_TOKEN"
"""Only temporary credentials have it."""

DOCKER_CONFIG = ".dockerconfigjson"
"""The key of a Secret of type kubernetes.io/dockerconfigjson."""

_SECRET_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", S3_SESSION_KEY)
_PROXY_NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_MIN_SECRET_LENGTH = 4
"""Replacing anything shorter would replace half of the text."""


@dataclass(frozen=True)
class Credentials:
    """The credentials of a source or of the destination."""

    owner: str
    """The field of a job that has them: `output`, or a source's as NamedSource.field."""
    values: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Key -> value. Empty without a Secret: the libraries then look in their usual places."""

    @property
    def field(self) -> str:
        """The field of a job that names the Secret."""
        return setting_of(self.owner, "credentialsSecret")


def read_credentials(owner: str, keys: tuple[str, ...], environ: Mapping[str, str]) -> Credentials:
    """Read the Secret that is mounted for a source or the destination; there are no values if none is.

    Args:
        owner: whose, as Credentials has it.
        keys: that the Secret must have.
        environ: may name another directory than the one that pods mount.

    Raises:
        TransferRefused: the Secret lacks a key, or has an empty value for it.
    """
    folder = _root(environ) / credentials_folder(owner)
    if not folder.is_dir():
        return Credentials(owner)
    values = _values(folder)
    credentials = Credentials(owner, values)
    if missing := [key for key in keys if not values.get(key)]:
        present = ", ".join(sorted(values)) or "none"
        raise TransferRefused(
            f"the Secret named by {credentials.field} must have a value for {' and '.join(missing)}; "
            f"its keys are: {present}"
        )
    return credentials


def _root(environ: Mapping[str, str]) -> Path:
    return Path(environ.get(CREDENTIALS_ENV) or CREDENTIALS_ROOT)


def _values(folder: Path) -> dict[str, str]:
    """Key -> value of a mounted Secret, without the links that Kubernetes adds, whose names begin with two dots."""
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith("..")]
    return {path.name: path.read_text(errors="replace").strip() for path in files}


def ca_bundle(environ: Mapping[str, str], *names: str) -> str | None:
    """The file of trusted certificates that the first of these variables names; None: the system's.

    Raises:
        ConfigurationError: there is no such file.
    """
    for name in names:
        if path := environ.get(name):
            if not Path(path).is_file():
                raise ConfigurationError(
                    f"{name} is {path}, which is not a file; it must be a file of trusted certificates"
                )
            return path
    return None


def logins(text: str) -> set[str]:
    """Every string of a Docker configuration, and what those of base64 stand for: passwords are among them."""
    try:
        entries = [entry for entry in json.loads(text)["auths"].values() if isinstance(entry, dict)]
    except (ValueError, TypeError, KeyError, AttributeError):
        return set()
    secret = ("password", "auth", "identitytoken", "registrytoken")
    found = {str(entry[name]) for entry in entries for name in secret if entry.get(name)}
    decoded = set()
    for value in found:
        with suppress(ValueError):
            decoded.add(base64.b64decode(value, validate=True).decode().partition(":")[2])
    return found | decoded


def redact(text: str, environ: Mapping[str, str]) -> str:
    """A text with all known secrets replaced by ***. A last guard: no message of ours quotes one."""
    root = _root(environ)
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    mounted = {value for folder in folders for value in _values(folder).values()}
    mounted |= {login for value in mounted if "auths" in value for login in logins(value)}
    proxies = {environ.get(name) or environ.get(name.lower()) or "" for name in _PROXY_NAMES}
    passwords = {urlsplit(proxy).password or "" for proxy in proxies}
    secrets = mounted | passwords | {environ.get(name, "") for name in _SECRET_NAMES}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _MIN_SECRET_LENGTH:
            text = text.replace(secret, "***")
    return text
