"""Linear layers with a frozen base and a LoRA adapter (Hu et al. 2021).

    y = x W^T + b + s (drop(x) A^T) B^T,    s = alpha / rank

W is frozen and may be quantized; only its FrozenWeight multiplies with it, once
in the forward and once in the backward pass. With dy the gradient of y:

    u = s dy B,   dA = u^T drop(x),   dB = s dy^T (drop(x) A^T),   dx = dy W + mask * (u A)

One autograd function does it all, since through separate operators the base
and the adapter would each make and keep their own full-sized tensors.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.quantization.frozen_weight import FrozenWeight


class LoraLinear(nn.Module):
    """A frozen linear layer (out, in), with an adapter once `attach` gave it one.

    Args:
        name: its path in the checkpoint (`model.layers.0.mlp.up_proj`).
        weight: (out, in).
        bias: (out,), in the compute dtype; frozen, too.
    """

    def __init__(self, name: str, weight: FrozenWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.name = name
        self.weight = weight
        self.bias = bias
        self.enabled = True
        """False: forward and gradients are those of the frozen layer alone, whatever adapter is attached."""
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        self.scale = 0.0
        self.dropout: Dropout | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape

    def attach(self, a: nn.Parameter, b: nn.Parameter, scale: float, dropout: "Dropout | None") -> None:
        """Give the layer its adapter: a is (rank, in), b is (out, rank), both fp32."""
        self.lora_a, self.lora_b, self.scale, self.dropout = a, b, scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        a, b = (self.lora_a, self.lora_b) if self.enabled else (None, None)
        mask = None
        if a is not None and self.dropout is not None and self.training:
            mask = self.dropout.mask(self.name, rows.shape, rows.dtype)
        out: Tensor = _LoraLinear.apply(rows, a, b, self.weight, self.bias, self.scale, mask)
        return out.view(*x.shape[:-1], out.shape[-1])


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (rows, in), in the compute dtype
        a: Tensor | None,  # (rank, in), fp32; None, as b: no adapter
        b: Tensor | None,  # (out, rank), fp32
        weight: FrozenWeight,  # (out, in)
        bias: Tensor | None,  # (out,)
        scale: float,
        mask: Tensor | None,  # (rows, in): dropout of the adapter's input
    ) -> Tensor:
        out = weight.linear(x, bias)  # (rows, out)
        ctx.weight, ctx.scale = weight, scale
        if a is None or b is None:
            ctx.save_for_backward()
            return out
        dropped = x if mask is None else x * mask
        down = dropped @ a.to(x.dtype).t()  # (rows, rank)
        out.addmm_(down, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, down, a, b, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy = grad_outputs[0]  # (rows, out)
        dx = ctx.weight.linear_grad_input(dy) if ctx.needs_input_grad[0] else None  # (rows, in)
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

    A sample's mask does not depend on the rank that runs it, on the
    micro-batch around it, or on whether the layer is recomputed in the
    backward pass; and no generator's state has to be saved.
    """

    def __init__(self, probability: float, seed: int) -> None:
        self.probability = probability
        self.seed = seed
        self._step = 0
        self._bins: list[tuple[int, int]] = []

    def at(self, step: int, bins: list[tuple[int, int]]) -> None:
        """Set what the next forward pass runs: (number of the bin within its step, its tokens), in order."""
        self._step, self._bins = step, bins

    def mask(self, layer: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """(rows, in): 1 / (1 - p) where an input is kept, else 0."""
        keep = 1.0 - self.probability
        parts = [
            torch.empty(tokens, shape[1]).bernoulli_(
                keep, generator=seeded_generator(f"dropout/{self.seed}/{self._step}/{number}/{layer}")
            )
            for number, tokens in self._bins
        ]
        return torch.cat(parts).div_(keep).to(dtype)


def seeded_generator(key: str) -> torch.Generator:
    """A generator whose numbers depend on the key alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
