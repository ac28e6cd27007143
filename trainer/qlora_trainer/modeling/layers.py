"""Norms and gated activations as one autograd function each.

Written out in operators, as transformers has them, each keeps several
full-sized tensors for the backward pass; these keep their inputs, which others
keep anyway, and compute the rest again. In fp32 and bf16 the kernel library
computes them in one pass each; plain torch is its twin, and the rule for other
types. In bf16 the library rounds once where torch rounds after every operator,
but for the norm's output, which transformers' graph rounds before the weight.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qlora_trainer.modeling.families import Family
from qlora_trainer.modeling.passes import passes_for


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
        passes = passes_for(x, weight)
        out, scale = rms_norm(x, weight, epsilon) if passes is None else passes.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        dy = grad_outputs[0]
        passes = passes_for(x, weight, dy)
        grad = rms_norm_grad if passes is None else passes.rms_norm_grad
        return grad(x, weight, scale, dy), None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm in plain torch: y (..., size), and what x is multiplied by, (..., 1)."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight), scale


def rms_norm_grad(x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor) -> Tensor:
    """dx = scale * (g - normed * mean(g * normed)) with g = dy * weight and normed = x * scale, in plain torch."""
    normed = x.float() * scale
    g = (dy * weight).float()
    mean = (g * normed).mean(-1, keepdim=True)
    return g.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype)


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
        passes = passes_for(gate, up)
        return swiglu(gate, up) if passes is None else passes.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy = grad_outputs[0]
        passes = passes_for(gate, up, dy)
        return swiglu_grad(gate, up, dy) if passes is None else passes.swiglu_grad(gate, up, dy)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in plain torch."""
    return F.silu(gate).mul_(up)


def swiglu_grad(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, in plain torch."""
    return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


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
