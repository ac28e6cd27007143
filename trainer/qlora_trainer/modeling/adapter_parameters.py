"""What is trained: all adapters of a model as views of one flat buffer.

One all-reduce, one norm, one optimizer step, whatever the layers and the method.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

ALIGNMENT = 16
"""Each parameter starts at a multiple of this many fp32 numbers, a cache line, so that a resumed run adds up alike."""


PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the name of each tensor of an adapter that belongs to a layer."""

Encode = Callable[[str], list[int]]
"""A text's tokens."""


class PublishedForm(Protocol):
    """What the finished adapter's file holds, where that is not the parameters by their names."""

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by PEFT's names."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the model compute with these. Training does not go on from there."""

    def make(self) -> None:
        """Make the model compute with what the parameters give, whatever was loaded."""


@dataclass
class AdapterParameters:
    """All adapters of a model as views of one flat buffer."""

    flat: nn.Parameter
    """(n,) fp32; its grad is one flat buffer too."""
    named: dict[str, nn.Parameter]
    """Name in checkpoints (`<layer>.lora_A.weight`) -> view of flat."""
    form: PublishedForm | None = field(default=None, repr=False)
    """None: the finished adapter holds the parameters by their names, after PEFT_PREFIX."""

    @property
    def gradient(self) -> Tensor:
        """(n,) fp32: what the backward passes have added up."""
        assert self.flat.grad is not None
        return self.flat.grad

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the parameters to tensors of the same names and shapes, and make the model compute with them."""
        for name, parameter in self.named.items():
            parameter.data.copy_(tensors[name])
        if self.form is not None:
            self.form.make()

    def published(self) -> dict[str, Tensor]:
        """What the finished adapter's file holds."""
        if self.form is not None:
            return self.form.tensors()
        return {f"{PEFT_PREFIX}{name}": p.data for name, p in self.named.items()}

    def load_published(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the model compute with such tensors; they are of these names."""
        if self.form is not None:
            self.form.load(tensors)
            return
        for name, parameter in self.named.items():
            parameter.data.copy_(tensors[f"{PEFT_PREFIX}{name}"])


def checksum(parameters: AdapterParameters) -> int:
    """A sum over the parameters' bits, below 2^52: exact as a double. Any one changed bit changes it."""
    return int(parameters.flat.detach().view(torch.int32).sum(dtype=torch.int64)) % 2**52


def flat_parameters(shapes: Mapping[str, tuple[int, ...]]) -> AdapterParameters:
    """Parameters of these names and shapes, all zero, with gradients that backward adds into in place."""
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name] = end
        end += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
    flat = nn.Parameter(torch.zeros(end))
    flat.grad = torch.zeros(end)
    named = {}
    for name, shape in shapes.items():
        part = slice(starts[name], starts[name] + math.prod(shape))
        view = nn.Parameter(flat.data[part].view(shape))
        view.grad = flat.grad[part].view(shape)
        named[name] = view
    return AdapterParameters(flat, named)
