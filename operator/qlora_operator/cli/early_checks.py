"""What can be said of a job within a second, before any program of the trainer's starts: files, folders, disk, servers.

Only what is surely wrong is refused here. The trainer, which reads everything, has the last word.
"""

import difflib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_contract.containers import CONTAINERS, split_name
from qlora_contract.exit_codes import ExitCode
from qlora_contract.job_folder import ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKPOINTS, TRAINING_REPORT
from qlora_contract.model_folder import NO_TOKENIZER, NO_WEIGHTS, has_tokenizer, has_weights
from qlora_contract.paths import resolve
from qlora_contract.remote import is_remote
from qlora_contract.units import format_bytes
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli.model_facts import read_object
from qlora_operator.errors import CommandError

LEAST_FREE = 64 * 2**20
"""Bytes that a workspace must have free: less does not hold the logs and the adapter of the smallest model."""
_LFS = b"version https://git-lfs"
_LFS_BYTES = 1024
"""A pointer is smaller."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Finding:
    """Something that keeps a job from being done."""

    code: ExitCode
    message: str


def require_inputs(job: QLoRAJob, volumes: Mapping[str, Path]) -> None:
    """Raise CommandError, with the code that training would end with, for all that is wrong with model and data."""
    _refuse([*_inputs(job, volumes)])


def require_place(job: QLoRAJob, volumes: Mapping[str, Path]) -> None:
    """Raise CommandError where the workspace cannot be written to, or is full."""
    _refuse([*_place(resolve(job.spec.workspace, volumes))])


def _refuse(findings: list[Finding]) -> None:
    if findings:
        raise CommandError("\n".join(finding.message for finding in findings), findings[0].code)


def _inputs(job: QLoRAJob, volumes: Mapping[str, Path]) -> Iterator[Finding]:
    for source in job.spec.sources:
        if is_remote(source.uri):
            continue
        path = resolve(source.uri, volumes)
        if source.role == "model" and (fault := model_fault(path)):
            yield Finding(ExitCode.MODEL_UNUSABLE, f"the model: {fault}")
        if source.role == "dataset" and (fault := data_fault(path)):
            of = "" if source.number is None else f" ({source.field})"
            yield Finding(ExitCode.INVALID_DATA, f"the data{of}: {fault}")
        if source.role == "adapter" and (fault := adapter_fault(path)):
            yield Finding(ExitCode.MODEL_UNUSABLE, f"the initial adapter: {fault}")


def _place(workspace: Path) -> Iterator[Finding]:
    place = workspace
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        yield Finding(
            ExitCode.INVALID_CONFIGURATION, f"the workspace: {place} is not a folder; choose another"
        )
    elif not os.access(place, os.W_OK | os.X_OK) or os.statvfs(place).f_flag & os.ST_RDONLY:
        why = "is on a file system that is mounted read-only" if os.access(place, os.R_OK | os.X_OK) and (
            os.statvfs(place).f_flag & os.ST_RDONLY
        ) else "may not be written to by this user"  # fmt: skip
        yield Finding(ExitCode.INVALID_CONFIGURATION, f"the workspace: {place} {why}; choose another folder")
    elif (free := shutil.disk_usage(place).free) < LEAST_FREE:
        yield Finding(
            ExitCode.STORAGE_FULL,
            f"the workspace: {place} has {format_bytes(free)} free, and a job needs {format_bytes(LEAST_FREE)} at "
            "least; make room, or choose another folder",
        )


def newer_inputs(job: QLoRAJob, volumes: Mapping[str, Path], folder: Path) -> str | None:
    """That model or data of a finished job were written to after its end, in a sentence; None where they were not."""
    ended = (folder / TRAINING_REPORT).stat().st_mtime
    newer = []
    for uri in job.spec.read_uris:
        if is_remote(uri):
            continue
        path = resolve(uri, volumes)
        files = [Path(at, name) for at, _, names in os.walk(path) for name in names] or [path]
        if any(file.exists() and file.stat().st_mtime > ended for file in files):
            newer.append(str(path))
    if not newer:
        return None
    return f"{' and '.join(newer)} changed after the job ended: to train on that, give the job another name"


# --- what a path is


def model_fault(path: Path) -> str | None:
    """Why a path is not the folder of a model, and what it is instead; None: nothing is seen to be wrong."""
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises where a folder is closed to us
        return missing(path)
    if not path.is_dir():
        return _file_for_a_model(path)
    try:
        names = sorted(each.name for each in path.iterdir())
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if pointer := next((name for name in names if _is_weights(name) and is_pointer(path / name)), None):
        return f"{path / pointer} is a pointer of git-lfs, not the file: run `git lfs pull` in {path}"
    if "config.json" not in names and not any(name.endswith(".gguf") for name in names):
        return f"{path} {_folder_for_a_model(path, names)}"
    lacks = [
        told for there, told in ((has_weights, NO_WEIGHTS), (has_tokenizer, NO_TOKENIZER)) if not there(names)
    ]
    return f"{path} {'; it '.join(lacks)}" if lacks else None


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".bin")) or name in _TOKENIZERS


def _file_for_a_model(path: Path) -> str:
    parent = path.parent
    if path.suffix == ".gguf":
        return f"{path} is a file; give the folder that has it and its tokenizer, {parent}"
    if path.suffix == ".safetensors":
        return f"{path} is a single file of weights; give the folder that has config.json, too: {parent}"
    return f"{path} is a file; a model is a folder with config.json, a tokenizer and *.safetensors"


def _folder_for_a_model(path: Path, names: list[str]) -> str:
    """What a folder without config.json is."""
    if not names:
        return "is an empty folder"
    if ADAPTER_CONFIG in names:
        base = read_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        return (
            f"is an adapter{of}, not a whole model: give the model that it was trained on, or merge the two "
            "(`qlora export --format merged`)"
        )
    if snapshot := _newest_snapshot(path):
        return f"is the Hub's cache of a model; the model itself is {snapshot}"
    if cached := next((name for name in names if _newest_snapshot(path / name)), None):
        return f"is the Hub's cache; a model in it is {_newest_snapshot(path / cached)}"
    if inner := next((name for name in names if (path / name / "config.json").is_file()), None):
        return f"has no config.json; did you mean {path / inner}?"
    return "has no config.json: a model is a folder with config.json, a tokenizer and *.safetensors"


def _newest_snapshot(path: Path) -> Path | None:
    """Of a model's folder in the Hub's cache, `models--ORG--NAME`, the files of main, or else of any revision."""
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return None
    main = path / "refs" / "main"
    if main.is_file() and (found := snapshots / main.read_text(errors="replace").strip()).is_dir():
        return found
    return max(snapshots.iterdir(), key=lambda each: each.stat().st_mtime, default=None)


def adapter_fault(path: Path) -> str | None:
    """Why a path is not the folder of an adapter, and what it is instead; None: nothing is seen to be wrong."""
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises where a folder is closed to us
        return missing(path)
    if not path.is_dir():
        return f"{path} is a file; an adapter is a folder in PEFT's format: {path.parent}"
    weights = path / ADAPTER_WEIGHTS
    if (path / ADAPTER_CONFIG).is_file():
        if is_pointer(weights):
            return f"{weights} is a pointer of git-lfs, not the file: run `git lfs pull` in {path}"
        return None if weights.is_file() else f"{path} has no {ADAPTER_WEIGHTS}"
    if inner := _inner_adapter(path):
        return f"{path} has no {ADAPTER_CONFIG}; did you mean {inner}?"
    if (path / "config.json").is_file():
        return f"{path} is a whole model, not an adapter: to train on it, name it as model.source"
    return f"{path} has no {ADAPTER_CONFIG}: an adapter is a folder in PEFT's format"


def _inner_adapter(path: Path) -> Path | None:
    """Of a job's folder its adapter, or else its newest checkpoint; of any other folder the last adapter in it."""
    below = [
        path / ADAPTER,
        *sorted(path.glob(f"{CHECKPOINTS}/*"), reverse=True),
        *sorted(path.glob("*"), reverse=True),
    ]
    return next((each for each in below if (each / ADAPTER_CONFIG).is_file()), None)


def data_fault(path: Path) -> str | None:
    """Why a path has no training data; None: nothing is seen to be wrong."""
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises where a folder is closed to us
        return missing(path)
    if not path.is_dir():
        if path.is_file() and path.stat().st_size == 0:
            return f"{path} is empty"
        if is_pointer(path):
            return f"{path} is a pointer of git-lfs, not the file: run `git lfs pull` in {path.parent}"
        return None
    files = [name for _, _, found in os.walk(path) for name in found]
    if not files:
        return f"{path} is an empty folder"
    readable = [name for name in files if split_name(name) and name not in ("config.json", ADAPTER_CONFIG)]
    for config, what in (("config.json", "a model"), (ADAPTER_CONFIG, "an adapter")):
        if config in files and (not readable or any(_is_weights(name) for name in files)):
            return f"{path} has {what} in it, no data"
    if not readable:
        return f"{path} has no file that can be read: they must be {', '.join(sorted(CONTAINERS))}"
    return None


def missing(path: Path) -> str:
    """That there is no such path, with what comes near."""
    closed = next((each for each in path.parents if each.is_dir() and not os.access(each, os.X_OK)), None)
    if closed is not None:
        return f"{path} cannot be read: {closed} is closed to this user"
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which does not exist"
    if variable := re.search(r"\$\{?\w+\}?|%\w+%", str(path)):
        return f"{path}: no such file or folder; {variable[0]} is not replaced here: write what it stands for"
    if "\\" in path.name:
        return f"{path}: no such file or folder; here the parts of a path are separated by /, not by \\"
    if not path.parent.is_dir():
        return f"{path}: no such file or folder; there is no {path.parent} either"
    try:
        near = difflib.get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
    except OSError:
        near = []
    return f"{path}: no such file or folder" + (f"; did you mean {path.parent / near[0]}?" if near else "")


def is_pointer(path: Path) -> bool:
    """Whether a file is what git-lfs leaves in place of a large one."""
    try:
        if not path.is_file() or path.stat().st_size > _LFS_BYTES:
            return False
        with path.open("rb") as file:
            return file.read(len(_LFS)) == _LFS
    except OSError:
        return False
