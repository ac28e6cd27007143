"""Reading a checkpoint weight by weight, whatever it is stored in."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_contract.units import first_line
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.stored import gguf
from qlora_trainer.modeling.stored.format import Format
from qlora_trainer.modeling.stored.formats import format_in
from qlora_trainer.modeling.weight_files import open_safetensors, weight_files

PLAIN = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""Types whose numbers are the weights themselves."""


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a checkpoint, not yet made of what is stored."""

    name: str
    """Its name in transformers' graph."""
    stored: dict[str, Tensor]
    """Names in the file -> what it is made of, mapped."""
    read: Callable[[], Tensor]
    """The weight: mapped, too, where it is stored as it is, else in fresh memory. Raises ModelError."""

    @property
    def dequantized(self) -> bool:
        """Whether `read` computes it."""
        return len(self.stored) > 1 or not all(tensor.dtype in PLAIN for tensor in self.stored.values())

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(tensor.nbytes for tensor in self.stored.values())


def stored_weights(folder: Path, config: Any, joined: Collection[str] = ()) -> Iterator[StoredWeight]:
    """Every weight of a checkpoint, in the order of its files. What is stored is mapped; nothing is read yet.

    Args:
        folder: the model's.
        config: transformers' configuration of it.
        joined: names of matrices that files have of all of a layer's experts in one tensor: they are taken apart.

    Raises:
        ModelError: the files are missing or not complete, or the form is refused.
    """
    if (file := gguf.gguf_file(folder)) is not None:
        for tensor in gguf.stored_tensors(file):
            read = partial(
                gguf.weight_of, tensor, file, config.num_attention_heads, config.num_key_value_heads
            )
            yield StoredWeight(gguf.graph_name(tensor.name), {tensor.name: gguf.stored_bytes(tensor)}, read)
        return
    form = format_in(folder, config)
    with ExitStack() as files:
        handles = [files.enter_context(open_safetensors(file)) for file in weight_files(folder)]
        weights: dict[str, dict[str, tuple[str, Any]]] = {}
        for handle in handles:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                if (found := form.part_of(name)) is None:
                    continue
                weight, part = found
                if part in weights.setdefault(weight, {}):
                    raise ModelError(f"{name} is in the checkpoint twice")
                weights[weight][part] = name, handle
        for weight, places in weights.items():
            parts = {part: handle.get_tensor(name) for part, (name, handle) in places.items()}
            stored = {name: parts[part] for part, (name, _) in places.items()}
            whole = StoredWeight(weight, stored, partial(_read, form, weight, parts))
            layer, _, leaf = weight.rpartition(".")
            if leaf.removesuffix("_bias") in joined:
                yield from _of_each_expert(whole, layer, leaf, form, parts)
            else:
                yield whole


def _of_each_expert(
    whole: StoredWeight, layer: str, leaf: str, form: Format, parts: dict[str, Tensor]
) -> Iterator[StoredWeight]:
    """The linear layers' weights (out, in) and biases in a tensor (experts, in, out) or (experts, out).

    Raises:
        ModelError: its parts are not of as many experts.
    """
    counts = {tuple(tensor.shape[:1]) for tensor in parts.values()}
    if len(counts) != 1 or counts == {()}:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in whole.stored.items())
        raise ModelError(f"{whole.name} is not of one number of experts: {shapes}")
    name = leaf.removesuffix("_bias")
    part = "weight" if name == leaf else "bias"
    for number in range(next(iter(counts))[0]):
        of_one = {kind: tensor[number : number + 1] for kind, tensor in parts.items()}
        yield StoredWeight(
            f"{layer}.{number}.{name}.{part}",
            {f"{stored}[{number}]": tensor[number] for stored, tensor in whole.stored.items()},
            partial(_read_expert, form, whole.name, of_one),
        )


def _read_expert(form: Format, name: str, parts: dict[str, Tensor]) -> Tensor:
    """One expert's weight (out, in), or bias. Raises as _read."""
    return _read(form, name, parts)[0].t()


def _read(form: Format, name: str, parts: dict[str, Tensor]) -> Tensor:
    """The weight of these parts. Raises ModelError."""
    if parts.keys() == {"weight"} and parts["weight"].dtype in PLAIN:
        return parts["weight"]
    try:
        return form.dequantize(parts)
    except KeyError as missing:
        raise ModelError(f"{name} is stored in {form.description}, and lacks its {missing}") from missing
    except (ValueError, RuntimeError, IndexError) as error:
        raise ModelError(f"{name} cannot be read from {form.description}: {first_line(error)}") from error
