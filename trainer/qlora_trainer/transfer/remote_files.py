"""Files of a repository or bucket: which of them training reads, and what their bytes must hash to."""

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from qlora_contract.containers import CONTAINERS, METADATA, split_name
from qlora_contract.job_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_contract.remote import Remote, Role
from qlora_trainer.errors import TransferRefused

CHUNK_BYTES = 1 << 20
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
"""Weights, configuration, tokenizer, chat template. Pickles and code are never fetched."""
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
"""Of an adapter in PEFT's format: all that is read of the one that training goes on from."""
MODEL_WEIGHTS = "model*.safetensors"
"""Where a repository has these, its other safetensors are copies in another form."""
TEMPLATE_FILES = "*.jinja"
"""Beside records: what dataset.chatTemplate may name."""
DATASET_DEPTH = 2
"""Folders below the one that a dataset's source names in which its files may be: `data/train-00000-of-00004.parquet`,
`default/train/0000.parquet`. The nearest with any is meant."""
MAX_FOLDERS = 64
"""Folders of a level that are looked into."""
MAX_NAMES_SHOWN = 8


@dataclass(frozen=True)
class Digest:
    """What a file's bytes must hash to."""

    algorithm: Literal["sha256", "md5", "git-sha1"]
    """`git-sha1`: the name that git gives the blob."""
    value: str
    """Hexadecimal."""


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch."""

    name: str
    """Path within the repository or bucket."""
    size: int
    digest: Digest | None = None
    """None: the server tells the size only."""
    etag: str = ""
    """By what S3 identifies this content."""


Selection = Callable[[Sequence[RemoteFile]], list[RemoteFile]]
"""Takes the files that are wanted; raises TransferRefused when nothing usable is among them."""


class Server(Protocol):
    """A source. Its methods raise TransferRefused, TransferFailed, or TransientError for what may pass."""

    def list_files(self, revision: str, select: Selection) -> tuple[str, list[RemoteFile]]:
        """(the revision that a branch, tag or name stands for, its selected files)."""

    def read(self, revision: str, file: RemoteFile, offset: int) -> Generator[bytes]:
        """The bytes of a file from an offset on."""


def select_files(role: Role, remote: Remote, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The files of a source that training reads, sorted by name.

    Raises:
        TransferRefused: training could read none of them, or one has a name that would leave its directory.
    """
    for file in files:
        check_name(remote, file.name)
    near = [f for f in files if remote.path in (PurePosixPath(f.name), PurePosixPath(f.name).parent)]
    if role == "dataset":
        selected = _dataset_files(remote, files)
    else:
        selected = _model_files(near) if role == "model" else _adapter_files(near)
    if not selected:
        names = sorted(PurePosixPath(file.name).name for file in near)
        more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
        found = f"it has {', '.join(names[:MAX_NAMES_SHOWN])}{more}"
        if not names:
            found = "no file has that name, and there are no files directly in a folder of that name"
        needed = {
            "model": MODEL_FILES[0],
            "dataset": f"file with records ({', '.join(CONTAINERS)})",
            "adapter": f"adapter in PEFT's format ({' and '.join(ADAPTER_FILES)})",
        }[role]
        raise TransferRefused(f"{remote.uri} has no {needed}: {found}")
    return sorted(selected, key=lambda file: file.name)


def _model_files(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Weights and what belongs to them; nothing without weights."""
    selected = [file for file in files if _matches(file, *MODEL_FILES)]
    if any(_matches(file, MODEL_WEIGHTS) for file in selected):
        selected = [f for f in selected if _matches(f, MODEL_WEIGHTS) or not _matches(f, "*.safetensors")]
    return selected if any(_matches(file, MODEL_FILES[0]) for file in selected) else []


def _adapter_files(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Weights and configuration; nothing unless both are there."""
    selected = [file for file in files if _matches(file, *ADAPTER_FILES)]
    return selected if len(selected) == len(ADAPTER_FILES) else []


def _dataset_files(remote: Remote, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The file that the path names; or those with records in its folder, or else in the nearest folders below it, with
    what says how they are laid out."""
    within = {f.name: PurePosixPath(f.name).relative_to(remote.path) for f in files if _is_in(f, remote.path)}
    described = [
        f
        for f in files
        if f.name in within and (within[f.name].name in METADATA or within[f.name].match(TEMPLATE_FILES))
    ]
    for depth in range(DATASET_DEPTH + 1):
        there = [f for f in files if f.name in within and len(within[f.name].parent.parts) == depth]
        if has_records(there):
            return [f for f in there if split_name(f.name)] + described
    # A file that is named may have any name: how it begins tells what it is. Texts may be a licence beside the data.
    named = [f for f in files if PurePosixPath(f.name) == remote.path]
    return named or [f for f in files if f.name in within and split_name(f.name)]


def has_records(files: Sequence[RemoteFile]) -> bool:
    """Whether a file among these holds records, by its name; a text may as well be a licence."""
    return any((parts := split_name(file.name)) is not None and parts[1] != ".txt" for file in files)


def list_down(
    list_folder: Callable[[str], tuple[list[RemoteFile], list[str]]], folder: str
) -> list[RemoteFile]:
    """The files of a dataset's folder and, as long as none holds records, of the folders below it, level by level.

    Args:
        list_folder: path of a folder -> (its files, paths of the folders in it).
        folder: where to begin.
    """
    files, folders = list_folder(folder)
    for _ in range(DATASET_DEPTH):
        if has_records(files):
            break
        levels = [list_folder(path) for path in sorted(folders)[:MAX_FOLDERS]]
        files += [file for there, _ in levels for file in there]
        folders = [path for _, below in levels for path in below]
    return files


def _is_in(file: RemoteFile, folder: PurePosixPath) -> bool:
    return PurePosixPath(file.name).is_relative_to(folder)


def _matches(file: RemoteFile, *patterns: str) -> bool:
    name = PurePosixPath(file.name).name
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_name(remote: Remote, name: str) -> None:
    """Raises TransferRefused for a name that would be written outside its directory."""
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise TransferRefused(
            f"{remote.uri} has a file named {name[:200]!r}, which is not a relative path, or leads out of its "
            "directory; nothing is fetched from it"
        )


def hash_file(path: Path, digest: Digest | None) -> tuple[str, str]:
    """(sha256 of a file, its hash by the digest's algorithm), hexadecimal, in one pass over its bytes."""
    sha256 = hashlib.sha256()
    algorithm = digest.algorithm if digest else "sha256"
    other = sha256
    if algorithm == "md5":
        other = hashlib.md5(usedforsecurity=False)
    elif algorithm == "git-sha1":
        other = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            sha256.update(chunk)
            if other is not sha256:
                other.update(chunk)
    return sha256.hexdigest(), other.hexdigest()
