"""Linear layers with a frozen base and a LoRA adapter (Hu et al. 2021).

    y = x W^T + b + s (drop(x) A^T) B^T,    s = alpha / rank

W is frozen and may be quantized; only its FrozenWeight multiplies with it, once
in the forward and once in the backward pass. With dy the gradient of y:

    u = s dy B,   dA = u^T drop(x),   dB = s dy^T (drop(x) A^T),   dx = dy W + mask * (u A)

One autograd function does it all, since through separate operators the base
and the adapter would each make and keep their own full-sized tensors.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from qlora_trainer.modeling.passes import passes_for
from qlora_trainer.quantization.frozen_weight import FrozenWeight, FusesLowRank, LowRank


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
            mask = self.dropout.mask(self.name)
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
        mask: "Mask | None",  # (rows, in): dropout of the adapter's input
    ) -> Tensor:
        ctx.weight, ctx.scale, ctx.mask = weight, scale, mask
        if a is None or b is None:
            ctx.save_for_backward()
            return weight.linear(x, bias)  # (rows, out)
        if _fuses(weight):
            # Of dropped inputs the inner product is made apart: the weight's own takes them whole.
            inner = None if mask is None else mask.times(x) @ a.to(x.dtype).t()
            out, down = weight.linear_with(x, bias, LowRank(a, b, scale), inner)
        else:
            out = weight.linear(x, bias)
            down = (x if mask is None else mask.times(x)) @ a.to(x.dtype).t()  # (rows, rank)
            out.addmm_(down, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, down, a, b)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy = grad_outputs[0]  # (rows, out)
        weight, scale, mask = ctx.weight, ctx.scale, ctx.mask
        saved = ctx.saved_tensors  # once: under checkpointing a second look would recompute again
        if not saved:
            dx = weight.linear_grad_input(dy) if ctx.needs_input_grad[0] else None  # (rows, in)
            return dx, None, None, None, None, None, None
        x, down, a, b = saved
        dx = None
        if _fuses(weight):
            low_rank = LowRank(a, b, scale)
            if ctx.needs_input_grad[0]:
                dx, up = weight.linear_grad_input_with(dy, low_rank, added=mask is None)
                if mask is not None:
                    mask.add_times(dx, up @ a.to(dy.dtype))
            else:
                up = weight.grad_inner(dy, low_rank)
        else:
            up = (dy @ b.to(dy.dtype)).mul_(scale)  # (rows, rank)
            if ctx.needs_input_grad[0]:
                dx = weight.linear_grad_input(dy)
                if mask is None:
                    dx.addmm_(up, a.to(dy.dtype))
                else:
                    mask.add_times(dx, up @ a.to(dy.dtype))
        dropped = x if mask is None else mask.times(x)  # again: to keep it would cost as much memory as x
        if _fuses(weight):
            da = weight.sum_of_outer(dropped, up, 1.0, transposed=True)
            db = weight.sum_of_outer(dy, down, scale, transposed=False)
        else:
            da = (up.t() @ dropped).float()
            db = (dy.t() @ down).float().mul_(scale)
        return dx, da, db, None, None, None, None


def _fuses(weight: FrozenWeight) -> TypeGuard[FusesLowRank]:
    """Whether a weight fuses low-rank products."""
    return hasattr(weight, "linear_with")


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

    def mask(self, layer: str) -> "Mask":
        """The mask of a layer's inputs in the next forward pass."""
        bins = [
            (_key(f"dropout/{self.seed}/{self._step}/{number}/{layer}"), tokens)
            for number, tokens in self._bins
        ]
        return Mask(self.probability, tuple(bins))


GENERATOR = "philox4x32-10"
"""What masks are made by. A checkpoint records it: another gives others."""


@dataclass(frozen=True)
class Mask:
    """1 / (1 - p) where an input is kept, else 0: (rows, in). It is never stored, but made wherever it is needed.

    An input is kept if a random number of 32 bits is at least p 2^32. The number depends on the bin's key, the row
    within the bin, and the column: Philox (Salmon et al. 2011). With the kernel library and in plain torch, masks and
    products with them are the same bit for bit.
    """

    probability: float
    """p."""
    bins: tuple[tuple[int, int], ...]
    """(key, tokens) of each bin, in order; tokens sum to rows."""

    @property
    def factor(self) -> float:
        """1 / (1 - p)."""
        return 1.0 / (1.0 - self.probability)

    @property
    def threshold(self) -> int:
        """The smallest random number that is kept."""
        return min(round(self.probability * 2**32), 2**32 - 1)

    def times(self, x: Tensor) -> Tensor:
        """mask * x: (rows, in) -> the same, fresh memory; the product is rounded once."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self._apply(x, out, add=False)
        return out

    def add_times(self, out: Tensor, x: Tensor) -> None:
        """out += mask * x, both contiguous (rows, in) of one dtype; the sum is made in fp32 and rounded once."""
        self._apply(x, out, add=True)

    def _apply(self, x: Tensor, out: Tensor, *, add: bool) -> None:
        passes = passes_for(x, out)
        lengths = [tokens for _, tokens in self.bins]
        for (key, _), source, target in zip(
            self.bins, torch.split(x, lengths), torch.split(out, lengths), strict=True
        ):
            if passes is None:
                self._apply_reference(source, target, key, add=add)
            else:
                passes.dropout(source, target, key, self.threshold, self.factor, add=add)

    def _apply_reference(self, x: Tensor, out: Tensor, key: int, *, add: bool) -> None:
        """A bin in plain torch, rows at a time: random numbers take much more memory than what they decide."""
        rows = max(1, _RANDOM_AT_ONCE // max(1, x.shape[1]))
        wide = torch.promote_types(x.dtype, torch.float32)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            kept = random_words(key, start, len(x[part]), x.shape[1]) >= self.threshold
            product = torch.where(kept, x[part].to(wide) * self.factor, 0.0)
            out[part] = out[part].to(wide) + product if add else product


_RANDOM_AT_ONCE = 1 << 18
"""Random numbers that plain torch makes at once."""


def random_words(key: int, first_row: int, rows: int, columns: int) -> Tensor:
    """Random numbers from 0 to 2^32 - 1, int64 (rows, columns), of rows first_row on.

    Column 64 g + 16 w + j has word w of counter (16 g + j, row, 0, 0): an order that vectors of counters give.
    """
    groups = -(-columns // 64)
    counters = torch.arange(16 * groups)[None, :].expand(rows, -1)
    row = torch.arange(first_row, first_row + rows)[:, None].expand_as(counters)
    words = philox([counters, row, torch.zeros_like(row), torch.zeros_like(row)], key)
    by_group = torch.stack([word.view(rows, groups, 16) for word in words], dim=2)
    return by_group.view(rows, -1)[:, :columns]


def philox(counter: list[Tensor], key: int) -> list[Tensor]:
    """Philox4x32-10: four counters and four results of 32 bits, int64; a key of 64 bits."""
    low = (1 << 32) - 1
    k0, k1 = key & low, key >> 32
    x0, x1, x2, x3 = counter
    for _ in range(10):
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # may wrap around: the bits are right
        x0, x1, x2, x3 = ((p1 >> 32) & low) ^ x1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ x3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [x0, x1, x2, x3]


def _key(text: str) -> int:
    """64 bits that depend on a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def seeded_generator(key: str) -> torch.Generator:
    """A generator whose numbers depend on the key alone."""
    return torch.Generator().manual_seed(_key(key) & (2**63 - 1))
