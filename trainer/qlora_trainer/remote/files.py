"""Files of a repository or bucket: which of them training reads, and whether what arrived is what was sent."""

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from qlora_contract.remote import Remote
from qlora_trainer.errors import TransferRefused
from qlora_trainer.remote.credentials import Role

CHUNK_BYTES = 1 << 20
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
"""Weights, configuration, tokenizer, chat template. Pickles and code are never fetched."""
MODEL_WEIGHTS = "model*.safetensors"
"""Where a repository has these, other safetensors are copies of them in another form."""
DATASET_FILES = ("*.jsonl",)
NAMES_SHOWN = 8


@dataclass(frozen=True)
class Digest:
    """What a file's bytes must hash to."""

    algorithm: Literal["sha256", "md5", "git-sha1"]
    """`git-sha1`: of the blob, as git names it."""
    value: str
    """Hexadecimal."""


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch."""

    name: str
    """Path within the repository or bucket."""
    size: int
    digest: Digest | None = None
    """None: the server tells only its size."""
    etag: str = ""
    """What S3 names this content by."""


Choose = Callable[[Sequence[RemoteFile]], list[RemoteFile]]


class Server(Protocol):
    """The Hub, or S3. Its errors are TransferRefused, or Interrupted for what may pass."""

    def listing(self, revision: str, choose: Choose) -> tuple[str, list[RemoteFile]]:
        """(revision found, the files of it that `choose` takes)."""

    def read(self, revision: str, file: RemoteFile, offset: int) -> Generator[bytes]:
        """A file's bytes from an offset on."""


def choose_files(role: Role, remote: Remote, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """What training reads of a source, in the order of names.

    Raises:
        TransferRefused: there is nothing that it could read, or a name that leaves its folder.
    """
    for file in files:
        check_name(remote, file.name)
    near = [
        file for file in files if remote.path in (PurePosixPath(file.name), PurePosixPath(file.name).parent)
    ]
    patterns = MODEL_FILES if role == "model" else DATASET_FILES
    chosen = [file for file in near if _matches(file, *patterns)]
    if any(_matches(file, MODEL_WEIGHTS) for file in chosen):
        chosen = [f for f in chosen if _matches(f, MODEL_WEIGHTS) or not _matches(f, "*.safetensors")]
    if not any(_matches(file, patterns[0]) for file in chosen):
        raise TransferRefused(f"{remote.uri} has no {patterns[0]}: {_what_is_there(near)}")
    return sorted(chosen, key=lambda file: file.name)


def _matches(file: RemoteFile, *patterns: str) -> bool:
    name = PurePosixPath(file.name).name
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _what_is_there(files: Sequence[RemoteFile]) -> str:
    if not files:
        return "there is no file of this name, and nothing directly in a folder of this name"
    names = sorted(PurePosixPath(file.name).name for file in files)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"it has {', '.join(names[:NAMES_SHOWN])}{more}"


def check_name(remote: Remote, name: str) -> None:
    """Raises TransferRefused for a name that would be written elsewhere than below its own folder."""
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise TransferRefused(
            f"{remote.uri} has a file of the name {name[:200]!r}, which leaves its folder or is no name; "
            "nothing of it is fetched"
        )


def examine(path: Path, digest: Digest | None) -> tuple[str, str]:
    """(sha256 of a file, what it hashes to by the digest's own algorithm), in one pass."""
    sha256 = hashlib.sha256()
    other = _hash(path, digest)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            sha256.update(chunk)
            if other is not None:
                other.update(chunk)
    return sha256.hexdigest(), (sha256 if other is None else other).hexdigest()


def _hash(path: Path, digest: Digest | None) -> "hashlib._Hash | None":
    if digest is None or digest.algorithm == "sha256":
        return None
    if digest.algorithm == "md5":
        return hashlib.md5(usedforsecurity=False)
    return hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
