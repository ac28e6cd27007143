"""Norms and gated activations as one autograd function each.

Written out in operators, as transformers has them, each keeps several
full-sized tensors for the backward pass; these keep their inputs, which others
keep anyway, and compute the rest again.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class RmsNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps), over the last dimension, in fp32; rounded before w as transformers does it."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        out: Tensor = _RmsNorm.apply(x, self.weight, self.epsilon)
        return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        normed = x.float() * scale
        dy = (grad_outputs[0] * weight).float()
        # dx = scale * (dy - normed * mean(dy * normed))
        mean = (dy * normed).mean(-1, keepdim=True)
        return dy.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype), None, None


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden size) -> (..., hidden size)."""
        out: Tensor = self.down_proj(_SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))
        return out


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy = grad_outputs[0]
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, F.silu(gate).mul_(dy)


def slim(decoder: nn.Module, activation: str) -> None:
    """Replace a decoder's norms, and its gated MLPs where their activation is silu, by the ones above."""
    for path, module in list(decoder.named_modules()):
        if hasattr(module, "variance_epsilon"):
            decoder.set_submodule(path, RmsNorm(module.weight.data, module.variance_epsilon))
        elif activation == "silu" and all(hasattr(module, f"{name}_proj") for name in ("gate", "up", "down")):
            decoder.set_submodule(path, GatedMlp(module.gate_proj, module.up_proj, module.down_proj))
