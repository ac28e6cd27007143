"""Norms and gated activations as one autograd function each.

Written out in operators, as transformers has them, each keeps several
full-sized tensors for the backward pass; these keep their inputs, which others
keep anyway, and compute the rest again. In fp32 and bf16 the kernel library
computes them in one pass each; plain torch is its twin, and the rule for other
types. In bf16 the library rounds once where torch rounds after every operator,
but for the output of a norm with a narrow weight, which transformers' graph
rounds before the weight.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qlora_trainer.modeling.delta_net import GatedDeltaNet
from qlora_trainer.modeling.families import Family
from qlora_trainer.modeling.passes import ACTIVATIONS, passes_for


class RmsNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps), over the last dimension, in fp32.

    Args:
        weight: (size,), frozen. In the compute dtype: x is rounded to it before it is multiplied with the weight. In
            fp32: the product is rounded.
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
        passes = passes_for(x) if weight.dtype in (x.dtype, torch.float32) else None
        out, scale = rms_norm(x, weight, epsilon) if passes is None else passes.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        dy = grad_outputs[0]
        passes = passes_for(x, dy) if weight.dtype in (x.dtype, torch.float32) else None
        grad = rms_norm_grad if passes is None else passes.rms_norm_grad
        return grad(x, weight, scale, dy), None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm in plain torch: y (..., size), and what x is multiplied by, (..., 1)."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return (wide * scale).to(weight.dtype).mul_(weight).to(x.dtype), scale


def rms_norm_grad(x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor) -> Tensor:
    """dx = scale * (g - normed * mean(g * normed)) with g = dy * weight and normed = x * scale, in plain torch."""
    normed = x.float() * scale
    g = (dy * weight).float()
    mean = (g * normed).mean(-1, keepdim=True)
    return g.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype)


class GatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020). `activation`: of passes.ACTIVATIONS."""

    def __init__(
        self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, activation: str = "silu"
    ) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden size) -> (..., hidden size)."""
        out: Tensor = self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x), self.activation))
        return out


class FusedGatedMlp(nn.Module):
    """The same, where one linear layer gives gate and up, one after the other."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module, activation: str = "silu") -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden size) -> (..., hidden size)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(_Gated.apply(gate, up, self.activation))
        return out


class _Gated(torch.autograd.Function):
    """activation(gate) * up, all (..., intermediate size). The activation is one of passes.ACTIVATIONS."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        passes = passes_for(gate, up)
        return gated(gate, up, activation) if passes is None else passes.gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dy = grad_outputs[0]
        passes = passes_for(gate, up, dy)
        grad = gated_grad if passes is None else passes.gated_grad
        return *grad(gate, up, dy, ctx.activation), None


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up in plain torch."""
    return _activated(gate, activation).mul_(up)


def gated_grad(gate: Tensor, up: Tensor, dy: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, in plain torch."""
    dgate = (
        torch.ops.aten.silu_backward(dy * up, gate)
        if activation == "silu"
        else torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh")
    )
    return dgate, _activated(gate, activation).mul_(dy)


def _activated(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


class ClampedGatedMlp(nn.Module):
    """down((u + 1) * g * sigmoid(alpha g)) with g = min(gate(x), limit) and u = clamp(up(x), -limit, limit): gpt-oss'.

    `gate_up_proj` makes both, each gate before its up.
    """

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module, alpha: float, limit: float) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.alpha = alpha
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden size) -> (..., hidden size)."""
        out: Tensor = self.down_proj(_ClampedGated.apply(self.gate_up_proj(x), self.alpha, self.limit))
        return out


class _ClampedGated(torch.autograd.Function):
    """(..., 2 intermediate size) -> (..., intermediate size), in plain torch and fp32; what comes in is kept alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.alpha, ctx.limit = alpha, limit
        gate, up = _clamped(gate_up, limit)
        return torch.sigmoid(gate * alpha).mul_(gate).mul_(up.add_(1)).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        dy, alpha, limit = grad_outputs[0].float(), ctx.alpha, ctx.limit
        gate_up = ctx.saved_tensors[0]
        gate, up = _clamped(gate_up, limit)
        share = torch.sigmoid(gate * alpha)
        grad = torch.empty_like(gate_up)
        grad[..., 1::2] = dy * gate * share * (gate_up[..., 1::2].abs() < limit)
        slope = share * (1 + alpha * gate * (1 - share)) * (gate_up[..., ::2] < limit)
        grad[..., ::2] = dy * (up + 1) * slope
        return grad, None, None


def _clamped(gate_up: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Gate and up, fp32, of numbers that take turns."""
    return gate_up[..., ::2].float().clamp(max=limit), gate_up[..., 1::2].float().clamp(-limit, limit)


def fuse_layers(decoder: nn.Module, family: Family) -> None:
    """Replace those of a decoder's norms, gated MLPs and delta networks by ours whose formula they have.

    Args:
        decoder: transformers' graph, its weights loaded.
        family: says which they are.
    """
    config = decoder.config
    activation = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None))
    mlp_names = family.gated_mlp if activation in ACTIVATIONS else ()
    norm = family.norm
    for path, module in list(decoder.named_modules()):
        if norm is not None and hasattr(module, norm.epsilon):
            weight = module.weight.data.float() + norm.offset if norm.wide else module.weight.data
            decoder.set_submodule(path, RmsNorm(weight, getattr(module, norm.epsilon)))
        elif mlp_names and all(hasattr(module, name) for name in mlp_names):
            decoder.set_submodule(path, _mlp([getattr(module, name) for name in mlp_names], activation))
        elif family.delta_net is not None and path.endswith(f".{family.delta_net}"):
            decoder.set_submodule(path, GatedDeltaNet(module))


def _mlp(layers: list[nn.Module], activation: str) -> nn.Module:
    """Of gate, up and down, or of both in one and down."""
    if len(layers) == 2:
        return FusedGatedMlp(layers[0], layers[1], activation)
    return GatedMlp(layers[0], layers[1], layers[2], activation)
