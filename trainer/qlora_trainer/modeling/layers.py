"""Norms and gated activations as one autograd function each.

Written out in operators, as transformers has them, each keeps several
full-sized tensors for the backward pass; these keep their inputs, which others
keep anyway, and compute the rest again.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qlora_trainer.modeling.families import Family


class RmsNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps), over the last dimension, in fp32; rounded before w as transformers does it.

    Args:
        weight: (size,), in the compute dtype; frozen.
        epsilon: eps.
    """

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        out: Tensor = _RmsNorm.apply(x, self.weight, self.epsilon)
        return out


class _RmsNorm(torch.autograd.Function):
    """(..., size), (size,) -> (..., size); the gradient of x alone: the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()  # (..., 1)
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
    """silu(gate) * up, all (..., intermediate size)."""

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


def fuse_layers(decoder: nn.Module, family: Family) -> None:
    """Replace those of a decoder's norms and gated MLPs by the ones above whose formula they have.

    Args:
        decoder: transformers' graph, its weights loaded.
        family: says which they are.
    """
    mlp_names = family.gated_mlp if getattr(decoder.config, "hidden_act", None) == "silu" else None
    for path, module in list(decoder.named_modules()):
        if family.norm_epsilon is not None and hasattr(module, family.norm_epsilon):
            epsilon = getattr(module, family.norm_epsilon)
            decoder.set_submodule(path, RmsNorm(module.weight.data, epsilon))
        elif mlp_names is not None and all(hasattr(module, name) for name in mlp_names):
            decoder.set_submodule(path, GatedMlp(*(getattr(module, name) for name in mlp_names)))
