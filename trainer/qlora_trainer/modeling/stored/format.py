"""What a form of storage says of itself, and what several of them unpack alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
"""Of one weight: name of the part -> what is stored."""
Settings = Mapping[str, Any]
"""config.json's quantization_config."""


@dataclass(frozen=True)
class Format:
    """A form in which weights are stored."""

    description: str
    """For people: `FP8, a scale for each block of 128 x 128`."""
    dequantize: Callable[[Parts], Tensor]
    """Parts of one weight -> the weight as transformers' graph has it, in a dtype that holds it exactly: float32 unless
    a smaller one does. Raises KeyError for a part that is missing; ValueError, RuntimeError or IndexError for parts
    that do not fit each other."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """How names of stored tensors end -> the part that they are of the weight of that name. What ends otherwise is a
    tensor as it is."""
    weight: str = ".weight"
    """What takes the ending's place in the weight's name."""
    unused: tuple[str, ...] = ()
    """How the names of tensors end that only serve computing in that form, such as scales of activations."""

    def part_of(self, name: str) -> tuple[str, str] | None:
        """Name of a stored tensor -> the weight it belongs to and what it is of it; None: it is not used."""
        if name.endswith(self.unused):
            return None
        for ending, part in self.parts.items():
            if name.endswith(ending):
                return name.removesuffix(ending) + self.weight, part
        return name, "weight"


Matcher = Callable[[Settings], Format | str | None]
"""quantization_config -> the form, or why such a model is refused (read after "is stored in"), or None: another's."""


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """int32 (..., n), numbers of `bits` bits from the lowest bit on -> int32 (..., n * 32 / bits), from 0 on.

    Raises:
        ValueError: packed holds other than int32.
    """
    if packed.dtype != torch.int32:
        raise ValueError(f"packed numbers are {packed.dtype}, not torch.int32")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    # Shifting copies the sign down; the mask takes it away again.
    numbers = (packed[..., None] >> shifts).bitwise_and_((1 << bits) - 1)
    return numbers.reshape(*packed.shape[:-1], -1)


def nibbles(packed: Tensor, *, high_first: bool) -> Tensor:
    """uint8 (..., n) -> int32 (..., 2 n) of 4 bits each, ready to look up with.

    Raises:
        ValueError: packed holds other than uint8.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed numbers are {packed.dtype}, not torch.uint8")
    both = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return torch.stack(both, dim=-1).view(*packed.shape[:-1], -1).int()


def scale_groups(weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """(weight - zero) * scale, in place: float32 (out, in), and a scale and a zero for each group of columns of a row.

    Args:
        weight: float32 (out, in).
        scale: any float dtype; (out, groups), (out, 1), (out,) or one number.
        zero: of the shape of scale; None: 0.

    Raises:
        ValueError: the scales do not fit the weight.
    """
    rows, columns = weight.shape
    if scale.dim() == 1 and scale.numel() == rows:
        scale = scale[:, None]
    elif scale.numel() == 1:
        scale = scale.reshape(1, 1)
    if scale.dim() != 2 or scale.shape[0] not in (1, rows) or columns % scale.shape[1]:
        raise ValueError(f"scales of shape {list(scale.shape)} for a weight of {[rows, columns]}")
    groups = weight.view(rows, scale.shape[1], -1)
    if zero is not None:
        groups -= zero.reshape(scale.shape).float()[..., None]
    groups *= scale.float()[..., None]
    return weight
