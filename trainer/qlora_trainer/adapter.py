"""Linear layers with a frozen base and a LoRA adapter (Hu et al. 2021).

    y = x W^T + b + s (drop(x) A^T) B^T,    s = alpha / rank

W is frozen and may be quantised: it is dequantised for the forward pass,
thrown away, and dequantised again for the backward pass, so that only its
packed bytes stay. With dy the gradient of y:

    u = s dy B,   dA = u^T drop(x),   dB = s dy^T (drop(x) A^T),   dx = dy W + mask * (u A)

One autograd function does it all, since through separate operators the base
and the adapter would each make and keep their own full-sized tensors.
All adapters of a model are views of one flat fp32 buffer, as are their
gradients: one all-reduce, one norm, one optimiser step.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qlora_trainer.kernels import dequantise
from qlora_trainer.quantise import Nf4Weight

ALIGNMENT = 16
"""Adapters start at multiples of so many fp32 numbers: a cache line, so that a resumed run adds up alike."""


_scratch: dict[torch.dtype, Tensor] = {}
"""One buffer per dtype, as large as the largest layer so far, that every layer dequantises into: fresh memory for each
would cost three times the work in page faults. One thread computes, so one buffer is enough."""


def base_weight(weight: Nf4Weight | Tensor, dtype: torch.dtype) -> Tensor:
    """The frozen weight (out, in) in `dtype`; of use only until the next call."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    size = math.prod(weight.shape)
    if dtype not in _scratch or len(_scratch[dtype]) < size:
        _scratch[dtype] = torch.empty(size, dtype=dtype)
    return dequantise(weight, dtype, out=_scratch[dtype][:size].view(weight.shape))


class LoraLinear(nn.Module):
    """A frozen linear layer (out, in), with an adapter once `attach` gave it one."""

    def __init__(self, name: str, weight: Nf4Weight | Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.name = name
        self.weight = weight  # not a parameter: frozen, and perhaps packed
        self.bias = bias
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        self.scale = 0.0
        self.dropout: Dropout | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, in_ = self.weight.shape
        return int(out), int(in_)

    def attach(self, a: nn.Parameter, b: nn.Parameter, scale: float, dropout: "Dropout | None") -> None:
        """Give the layer its adapter: a is (rank, in), b is (out, rank), both fp32."""
        self.lora_a, self.lora_b, self.scale, self.dropout = a, b, scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        mask = None
        if self.dropout is not None and self.training:
            mask = self.dropout.mask(self.name, rows.shape, rows.dtype)
        out: Tensor = _LoraLinear.apply(
            rows, self.lora_a, self.lora_b, self.weight, self.bias, self.scale, mask
        )
        return out.view(*x.shape[:-1], out.shape[-1])


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        weight: Nf4Weight | Tensor,
        bias: Tensor | None,
        scale: float,
        mask: Tensor | None,
    ) -> Tensor:
        out = F.linear(x, base_weight(weight, x.dtype), bias)
        if a is None or b is None:
            ctx.weight, ctx.dtype = weight, x.dtype
            ctx.save_for_backward()
            return out
        dropped = x if mask is None else x * mask
        down = dropped @ a.to(x.dtype).t()  # (rows, rank)
        out.addmm_(down, b.to(x.dtype).t(), alpha=scale)
        ctx.weight, ctx.dtype, ctx.scale = weight, x.dtype, scale
        ctx.save_for_backward(x, down, a, b, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy = grad_outputs[0]
        wants_dx = ctx.needs_input_grad[0]
        dx = dy @ base_weight(ctx.weight, ctx.dtype) if wants_dx else None
        saved = ctx.saved_tensors  # once: under checkpointing a second look would recompute again
        if not saved:
            return dx, None, None, None, None, None, None
        x, down, a, b, mask = saved
        up = (dy @ b.to(dy.dtype)).mul_(ctx.scale)  # (rows, rank)
        dropped = x if mask is None else x * mask
        da = (up.t() @ dropped).float()
        db = (dy.t() @ down).float().mul_(ctx.scale)
        if dx is not None:
            if mask is None:
                dx.addmm_(up, a.to(dy.dtype))
            else:
                dx.add_((up @ a.to(dy.dtype)).mul_(mask))
        return dx, da, db, None, None, None, None


class Dropout:
    """Masks keyed by (seed, step, bin, layer).

    What a sample meets does not depend on which rank it went to, on the
    micro-batch around it, or on whether the layer is recomputed in the
    backward pass; and there is no generator's state to save.
    """

    def __init__(self, probability: float, seed: int) -> None:
        self.probability = probability
        self.seed = seed
        self._step = 0
        self._bins: list[tuple[int, int]] = []

    def at(self, step: int, bins: list[tuple[int, int]]) -> None:
        """Say what the next forward pass holds: (number of the bin in its step, its tokens), in order."""
        self._step, self._bins = step, bins

    def mask(self, layer: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """(rows, in): 1 / (1 - p) where an input is kept, else 0."""
        keep = 1.0 - self.probability
        parts = [
            torch.empty(tokens, shape[1]).bernoulli_(keep, generator=self._generator(layer, number))
            for number, tokens in self._bins
        ]
        return torch.cat(parts).div_(keep).to(dtype)

    def _generator(self, layer: str, number: int) -> torch.Generator:
        return seeded_generator(f"dropout/{self.seed}/{self._step}/{number}/{layer}")


def seeded_generator(key: str) -> torch.Generator:
    """A generator whose numbers depend on the key alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


@dataclass
class AdapterParameters:
    """All adapters of a model as views of one flat buffer."""

    flat: nn.Parameter
    """(n,) fp32; its grad is one flat buffer too."""
    named: dict[str, nn.Parameter]
    """`<layer>.lora_A.weight` and `<layer>.lora_B.weight` -> view of flat."""

    @property
    def gradient(self) -> Tensor:
        """(n,) fp32: what the backward passes have added up."""
        assert self.flat.grad is not None
        return self.flat.grad

    def trainable(self) -> int:
        """Parameters without the padding between them."""
        return sum(p.numel() for p in self.named.values())


def attach_adapters(
    layers: dict[str, LoraLinear], *, rank: int, alpha: float, dropout: Dropout | None, seed: int
) -> AdapterParameters:
    """Give every layer an adapter: A uniform in +-1/sqrt(in) (as PEFT does it), B zero."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in layers.items():
        out, in_ = layer.shape
        shapes[f"{name}.lora_A.weight"] = (rank, in_)
        shapes[f"{name}.lora_B.weight"] = (out, rank)
    parameters = _flat_parameters(shapes)
    for name, layer in layers.items():
        a = parameters.named[f"{name}.lora_A.weight"]
        b = parameters.named[f"{name}.lora_B.weight"]
        bound = 1.0 / math.sqrt(a.shape[1])
        with torch.no_grad():
            a.uniform_(-bound, bound, generator=seeded_generator(f"lora/{seed}/{name}"))
        layer.attach(a, b, alpha / rank, dropout)
    return parameters


def _flat_parameters(shapes: dict[str, tuple[int, int]]) -> AdapterParameters:
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
        view.grad = flat.grad[part].view(shape)  # backward adds into it in place
        named[name] = view
    return AdapterParameters(flat, named)
