"""What is trained: all adapters of a model as views of one flat buffer.

One all-reduce, one norm, one optimizer step, whatever the layers and the method.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 16
"""Each parameter starts at a multiple of this many fp32 numbers, a cache line, so that a resumed run adds up alike."""


@dataclass
class AdapterParameters:
    """All adapters of a model as views of one flat buffer."""

    flat: nn.Parameter
    """(n,) fp32; its grad is one flat buffer too."""
    named: dict[str, nn.Parameter]
    """Name in checkpoints and in the finished adapter (`<layer>.lora_A.weight`) -> view of flat."""

    @property
    def gradient(self) -> Tensor:
        """(n,) fp32: what the backward passes have added up."""
        assert self.flat.grad is not None
        return self.flat.grad


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
