"""The safetensors files of a model folder."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_contract.units import first_line
from qlora_trainer.errors import ModelError


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names, by name.

    Raises:
        ModelError: there is neither, the index cannot be read, or a shard is missing.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise ModelError(
                f"{folder} has neither model.safetensors nor {index.name}; only safetensors is read"
            )
        return [single]
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


def bytes_per_weight(folder: Path) -> int:
    """Bytes of one number of the checkpoint, by its first matrix. Raises as the functions above."""
    with open_safetensors(weight_files(folder)[0]) as handle:
        for name in handle.keys():  # noqa: SIM118 - not a dict
            part = handle.get_slice(name)
            if len(part.get_shape()) == 2:
                return {"F32": 4, "F64": 8}.get(part.get_dtype(), 2)
    return 2


def fingerprint(folder: Path) -> str:
    """sha256 over config.json and each weight file's size and header: tells models apart without reading them whole.

    Raises as weight_files.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(min(length, 100_000_000))
        digest.update(f"{file.name} {file.stat().st_size}".encode() + header)
    return digest.hexdigest()
