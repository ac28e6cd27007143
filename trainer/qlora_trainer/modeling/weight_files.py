"""The safetensors files of a model folder."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_contract.units import first_line
from qlora_trainer.errors import ModelError


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or without it the shards that the index names, by name.

    The order is transformers': an index may have been left behind when shards were joined.

    Raises:
        ModelError: there is neither, the index cannot be read, or a shard is missing.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(f"{folder} has neither model.safetensors nor {index.name}; only safetensors is read")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of safetensors files: {first_line(error)}") from error
    missing = [n for n in map(str, names) if "/" in n or not (folder / n).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    return [folder / n for n in names]


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """An open safetensors file. Raises ModelError, also later within the block, when the file is not complete."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ModelError(f"{file} is not a complete safetensors file: {first_line(error)}") from error


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor of a checkpoint, mapped from its file. Raises as the functions above."""
    for file in weight_files(folder):
        with open_safetensors(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                yield name, handle.get_tensor(name)


def tensor_names(folder: Path) -> Iterator[str]:
    """The names of a checkpoint's tensors, none of which is read. Raises as the functions above."""
    for file in weight_files(folder):
        with open_safetensors(file) as handle:
            yield from handle.keys()


def bytes_per_weight(folder: Path) -> int:
    """Bytes of one number of the checkpoint, by its first matrix. Raises as the functions above."""
    with open_safetensors(weight_files(folder)[0]) as handle:
        for name in handle.keys():  # noqa: SIM118 - not a dict
            part = handle.get_slice(name)
            if len(part.get_shape()) == 2:
                return {"F32": 4, "F64": 8}.get(part.get_dtype(), 2)
    return 2


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
    """sha256 over config.json and each weight file's size and header: not of the weights, but known before any is read.

    Raises as weight_files.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(min(length, 100_000_000))
        digest.update(f"{file.name} {file.stat().st_size}".encode() + header)
    return digest.hexdigest()
