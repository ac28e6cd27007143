"""The original weights with the adapter merged into them, a tensor at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.errors import ModelError
from qlora_trainer.export.adapter_weights import AdapterWeights, LayerAdapter
from qlora_trainer.modeling.families import Family
from qlora_trainer.modeling.weight_files import open_safetensors, weight_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""safetensors' names of what weights may be stored in."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint, not yet read, and what the adapter adds to it."""

    name: str
    """As the checkpoint spells it."""
    path: str
    """As transformers' causal language model spells it: with the decoder's prefix, which some checkpoints leave out."""
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    adapter: LayerAdapter | None
    trained: bool = True
    """It is of the language model, not of another part of a multimodal one."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def layer(self) -> str:
        """The path without `.weight` or `.bias`."""
        return self.path.rpartition(".")[0]

    def value(self) -> Tensor:
        """The tensor with the adapter merged into it: fp32 where something was added, else as stored."""
        with open_safetensors(self.file) as handle:
            stored: Tensor = handle.get_tensor(self.name)
            return stored if self.adapter is None else self.adapter.merge(stored)


def plan_tensors(folder: Path, family: Family, adapter: AdapterWeights) -> list[StoredTensor]:
    """Every tensor of a checkpoint, in the order of its files, with what is merged into it.

    Args:
        folder: of the base model.
        family: the model's.
        adapter: what is merged.

    Raises:
        ModelError: a layer of the adapter is not in the checkpoint, or has another shape there: it would be lost.
    """
    stored = [
        (name, file, tuple(part.get_shape()), part.get_dtype())
        for file in weight_files(folder)
        for name, part in _headers(file)
    ]
    prefix = f"{family.decoder}."
    in_graph = {name: family.name_in_graph(name) for name, *_ in stored}
    bare = not any(path is not None and path.startswith(prefix) for path in in_graph.values())
    tensors = []
    waiting: dict[str, LayerAdapter] = dict(adapter.layers)
    for name, file, shape, dtype in stored:
        path = f"{prefix}{name}" if bare and not name.startswith("lm_head.") else in_graph[name] or name
        path = family.public_name(path)
        added = waiting.pop(path.removesuffix(".weight"), None) if path.endswith(".weight") else None
        if added is not None and shape != (added.b.shape[0], added.a.shape[1]):
            raise ModelError(
                f"{name} has shape {list(shape)}, and the adapter is made for another: wrong base model"
            )
        if dtype not in _DTYPES:
            raise ModelError(
                f"{name} is stored as {dtype}; only unquantized floating-point weights can be exported"
            )
        tensors.append(
            StoredTensor(name, path, file, shape, _DTYPES[dtype], added, in_graph[name] is not None)
        )
    if waiting:
        raise ModelError(
            f"the adapter changes {len(waiting)} layers that {folder} does not have, such as {min(waiting)}: "
            "it belongs to another base model"
        )
    return tensors


def _headers(file: Path) -> Iterator[tuple[str, Any]]:
    with open_safetensors(file) as handle:
        for name in handle.keys():  # noqa: SIM118 - not a dict
            yield name, handle.get_slice(name)
