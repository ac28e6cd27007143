"""Environment names, mount paths and file names, each made in one place."""

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

RUN_CONFIG_ENV = "QLORA_RUN_CONFIG"
"""Path of run.json."""
VOLUMES_ENV = "QLORA_VOLUMES"
"""JSON object claim -> folder; unset in pods, where a claim is mounted at VOLUMES_ROOT/claim."""
TERMINATION_LOG_ENV = "QLORA_TERMINATION_LOG"
"""Where the launcher writes its TerminationReport; in pods TERMINATION_LOG."""
PROGRESS_PORT_ENV = "QLORA_PROGRESS_PORT"
"""Port of rank 0's /progress and /metrics; PROGRESS_PORT unless set."""
COMPLETION_INDEX_ENV = "JOB_COMPLETION_INDEX"
"""The pod's index, set by Kubernetes' Indexed Jobs."""
CPUS_ENV = "QLORA_CPUS"
"""CPU list (such as 0-3,8) a launcher may use; unset: all that the kernel allows."""
RANKS_ENV = "QLORA_RANKS"
"""How many ranks each pod has, such as 4,4,2: told to every rank by its launcher."""
PARENT_DEATH_ENV = "QLORA_PARENT_DEATH"
"""Process id of the one who starts a launcher on this machine: the launcher stops when that process dies."""

CREDENTIALS_ENV = "QLORA_CREDENTIALS"
"""Folder with the credentials of a fetch or an upload: a folder for each of `model`, `dataset` and `output`
that has a Secret, with a file for each key. Unset with `qlora run`: the libraries' own places are looked at."""

VOLUMES_ROOT = Path("/volumes")
CREDENTIALS_ROOT = Path("/etc/qlora/credentials")
RUN_CONFIG_PATH = Path("/etc/qlora/run.json")
TERMINATION_LOG = Path("/dev/termination-log")
PROGRESS_PORT = 8470
RENDEZVOUS_PORT = 29500
TERMINATION_REPORT_BYTES = 4096
"""Kubernetes keeps no more of a termination message."""

FENCE = "fence.json"
IDENTITY = "identity.json"
RUN_CONFIG = "run.json"
LOCK = "lock"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
METRICS = "metrics.jsonl"
TRAINING_REPORT = "training_report.json"
LOSS_CURVE = "loss_curve.png"
MANIFEST = "manifest.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


class PlaceError(ValueError):
    """A URI that cannot be resolved to a path."""


def volume_map(environ: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """The folders that stand for claims on this machine; empty in a pod."""
    text = environ.get(VOLUMES_ENV)
    return {claim: Path(path) for claim, path in json.loads(text).items()} if text else {}


def volume_root(claim: str, volumes: Mapping[str, Path]) -> Path:
    """The folder of a claim: as mapped, or as mounted in a pod."""
    if not volumes:
        return VOLUMES_ROOT / claim
    if claim not in volumes:
        known = ", ".join(sorted(volumes))
        raise PlaceError(f"claim {claim!r} has no folder here; those that have one: {known}")
    return volumes[claim]


def split_pvc(uri: str) -> tuple[str, PurePosixPath]:
    """`pvc://claim/path` -> (claim, relative path)."""
    scheme, _, rest = uri.partition("://")
    if scheme != "pvc" or not rest:
        raise PlaceError(f"{uri!r} is not of the form pvc://claim/path")
    claim, _, path = rest.partition("/")
    relative = PurePosixPath(path)
    if claim in ("", ".", ".."):
        raise PlaceError(f"{uri!r} names no claim; the form is pvc://claim/path")
    if relative.is_absolute() or ".." in relative.parts:
        raise PlaceError(f"{uri!r} leaves its claim")
    return claim, relative


def resolve(uri: str, volumes: Mapping[str, Path]) -> Path:
    """The path a `pvc://` URI means here. Links that leave the claim are refused."""
    claim, relative = split_pvc(uri)
    root = volume_root(claim, volumes)
    path = root / relative
    if not path.resolve().is_relative_to(root.resolve()):
        raise PlaceError(f"{uri!r} is a link that leaves its claim")
    return path


def job_folder(workspace: str, name: str, volumes: Mapping[str, Path]) -> Path:
    """`jobs/<name>` in the workspace."""
    return resolve(f"{workspace.rstrip('/')}/jobs/{name}", volumes)
