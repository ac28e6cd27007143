"""The files of a model folder that hold its weights."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_contract.files import read_json
from qlora_contract.model_folder import NO_WEIGHTS, WEIGHTS, WEIGHTS_INDEX
from qlora_contract.units import first_line
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.stored.gguf import embedding_bytes, gguf_file


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or without it the shards that the index names, by name, or without both a GGUF file.

    The order is transformers': an index may have been left behind when shards were joined.

    Raises:
        ModelError: there is none, the index cannot be read, a shard is missing, or there are several GGUF files.
    """
    index, single = folder / WEIGHTS_INDEX, folder / WEIGHTS
    if single.is_file():
        return [single]
    if not index.is_file():
        if (file := gguf_file(folder)) is not None:
            return [file]
        raise ModelError(f"{folder} {NO_WEIGHTS}")
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of safetensors files: {first_line(error)}") from error
    # By their names: one of a stranger may be no path at all.
    there = {path.name for path in folder.iterdir() if path.is_file()}
    if missing := [name for name in map(str, names) if name not in there]:
        raise ModelError(f"{folder} lacks {first_line(', '.join(missing))}, which {index.name} names")
    return [folder / n for n in names]


def has_weights(folder: Path) -> bool:
    """Whether there is any file that `weight_files` looks for."""
    return (
        any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)) or gguf_file(folder) is not None
    )


_LFS = b"version https://git-lfs"


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """An open safetensors file. Raises ModelError, also later within the block, when the file is not complete."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        with file.open("rb") as stream:
            if stream.read(len(_LFS)) == _LFS:
                raise ModelError(
                    f"{file} is a pointer of git-lfs, not the file: run `git lfs pull` in {file.parent}"
                ) from error
        raise ModelError(f"{file} is not a complete safetensors file: {first_line(error)}") from error


def bytes_per_weight(folder: Path) -> int:
    """Bytes of one number of the embedding, which is kept as it is stored: of the largest matrix of plain numbers.

    Raises as the functions above.
    """
    if (gguf := gguf_file(folder)) is not None:
        return embedding_bytes(gguf)
    largest, size = 0, 2
    for file in weight_files(folder):
        with open_safetensors(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                part = handle.get_slice(name)
                shape, kind = part.get_shape(), part.get_dtype()
                if len(shape) == 2 and kind in _SIZES and prod(shape) > largest:
                    largest, size = prod(shape), _SIZES[kind]
    return size


_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of safetensors' plain numbers."""


def tensor_names(folder: Path) -> Iterator[str]:
    """The names of a checkpoint's tensors, none of which is read. Raises as the functions above."""
    for file in weight_files(folder):
        with open_safetensors(file) as handle:
            yield from handle.keys()


class WeightsHash:
    """sha256 over all tensors of a checkpoint, however they are spread over files, taken while they are loaded.

    In threads, beside what is done with the tensors: they are mapped from their files, so nothing is read twice, and
    hashlib holds no lock. It costs 0.7 s of one CPU per GiB where the processor has instructions for sha256, 2 s
    elsewhere.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weights-hash")
        self._digests: dict[str, Future[str]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, which nothing may change."""
        self._digests[name] = self._pool.submit(_tensor_digest, tensor)

    def hexdigest(self) -> str:
        """Of all that was added; it ends the threads."""
        lines = [f"{digest.result()}  {name}\n" for name, digest in sorted(self._digests.items())]
        self._pool.shutdown()
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """sha256 over config.json and each weight file's size and header: not of the weights, but known before that.

    Raises as weight_files.
    """
    config = folder / "config.json"
    digest = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
    for file in weight_files(folder):
        with file.open("rb") as stream:
            # GGUF does not say how long its header is.
            length = 10_000_000 if file.suffix == ".gguf" else int.from_bytes(stream.read(8), "little")
            header = stream.read(min(length, 100_000_000))
        digest.update(f"{file.name} {file.stat().st_size}".encode() + header)
    return digest.hexdigest()


def state_of_files(folder: Path) -> tuple[str, float]:
    """A hash that is another one whenever a weight file was written to or replaced, and when that last happened.

    Of `fingerprint`, and of each file's size, inode, and times of change: that of its content and that of its inode,
    which no program can set. So the weights need not be read again to know that they are what they were; bits that a
    disk has lost are not noticed. Raises as weight_files.
    """
    facts = [fingerprint(folder)]
    changed = 0.0
    for file in weight_files(folder):
        found = file.stat()
        facts.append(f"{file.name} {found.st_size} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}")
        changed = max(changed, found.st_mtime, found.st_ctime)
    return hashlib.sha256("\n".join(facts).encode()).hexdigest(), changed
