"""Where things are in a pod, and which path a `pvc://` URI stands for, in a pod or on one machine."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from qlora_contract.env import VOLUMES_ENV

VOLUMES_ROOT = Path("/volumes")
CREDENTIALS_ROOT = Path("/etc/qlora/credentials")
HANDOFF_ROOT = Path("/run/qlora/handoff")
RUN_CONFIG_PATH = Path("/etc/qlora/run.json")
TERMINATION_LOG = Path("/dev/termination-log")
THIS_MACHINE = "this-machine"
"""The claim that paths of one machine are on, with `qlora run`: it is the whole file system, and no cluster has it."""
TERMINATION_REPORT_BYTES = 4096
"""Kubernetes keeps no more of a termination message."""


class InvalidUriError(ValueError):
    """A URI that is malformed, or that does not resolve to a path here."""


def credentials_folder(field: str) -> str:
    """Folder below CREDENTIALS_ROOT for what a field of the job names a Secret: `dataset.sources[2]` has its own.

    It also is a part of a volume's name.
    """
    return re.sub(r"[^a-z0-9]+", "-", field.lower()).strip("-")


def volume_map(environ: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """The directories that stand for claims on this machine; empty in a pod."""
    text = environ.get(VOLUMES_ENV)
    return {claim: Path(path) for claim, path in json.loads(text).items()} if text else {}


def volume_root(claim: str, volumes: Mapping[str, Path]) -> Path:
    """The directory of a claim: as mapped, or as mounted in a pod.

    Raises:
        InvalidUriError: claims are mapped, but not this one.
    """
    if not volumes:
        return VOLUMES_ROOT / claim
    if claim not in volumes:
        known = ", ".join(sorted(volumes.keys() - {THIS_MACHINE})) or "none"
        raise InvalidUriError(f"claim {claim!r} has no directory here; these have one: {known}")
    return volumes[claim]


def split_pvc(uri: str) -> tuple[str, PurePosixPath]:
    """`pvc://claim/path` -> (claim, relative path).

    Raises:
        InvalidUriError: another form, or a path that leads out of the claim.
    """
    scheme, _, rest = uri.partition("://")
    if scheme != "pvc" or not rest:
        raise InvalidUriError(f"{uri!r} is not of the form pvc://claim/path")
    claim, _, path = rest.partition("/")
    relative = PurePosixPath(path)
    if claim in ("", ".", ".."):
        raise InvalidUriError(f"{uri!r} does not name a claim; the form is pvc://claim/path")
    if relative.is_absolute() or ".." in relative.parts:
        raise InvalidUriError(f"{uri!r} leads out of its claim")
    return claim, relative


def resolve(uri: str, volumes: Mapping[str, Path]) -> Path:
    """The path that a `pvc://` URI stands for here.

    Raises:
        InvalidUriError: as volume_root and split_pvc do, and for a symbolic link that leads out of the claim.
    """
    claim, relative = split_pvc(uri)
    root = volume_root(claim, volumes)
    path = root / relative
    target = path.resolve()
    if not target.is_relative_to(root.resolve()):
        raise InvalidUriError(
            f"{uri!r} is a symbolic link that leads out of its claim, to {target}: copy what is there to the claim, or "
            "name the claim that it is on (with `qlora run`, its path will do)"
        )
    return path


def local_uri(path: Path) -> str:
    """The URI of an absolute path of this machine, for programs that run on it."""
    return f"pvc://{THIS_MACHINE}{path}"
