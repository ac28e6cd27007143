"""NF4 and FP4 in plain torch: right for every shape, and the twin that faster kernels are tested against.

For each product the whole matrix is dequantized into a buffer that all layers share, and thrown away.

A byte holds two weights, so a table of 256 pairs of floats turns each byte into both
with one load. A pair is moved as one float64, because torch gathers single elements
from a vector several times faster than rows from a matrix. Work goes in chunks that
stay in a core's second-level cache. What else was tried: trainer/benchmarks/LOG.md.
"""

from math import prod

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qlora_trainer.quantization.frozen_weight import check_out
from qlora_trainer.quantization.nf4 import (
    BLOCK,
    DYNAMIC_LEVELS,
    FP4_LEVELS,
    NESTED_BLOCK,
    NF4_LEVELS,
    NestedScales,
    Nf4Matrix,
)

_CHUNK = 2048 * BLOCK
"""Weights dequantized at once: 512 KiB in float32 and 256 KiB of indices."""

_PAIRS = {
    id(levels): torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    for levels in (NF4_LEVELS, FP4_LEVELS)
}
"""float32 (256, 2): the two levels of each byte, the high nibble's first; by the table of levels."""

_scratch: dict[torch.dtype, Tensor] = {}
"""One buffer per dtype, as large as the largest layer so far, that every layer is dequantized into: fresh memory for
each would cost three times the work in page faults. One thread computes, so one buffer is enough."""


class Nf4Weight:
    """A FrozenWeight that keeps the bytes as the quantizer made them, and dequantizes them for each product."""

    def __init__(self, matrix: Nf4Matrix) -> None:
        self.matrix = matrix

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return self.matrix.nbytes

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The matrix (out, in); see `dequantize`."""
        return dequantize(self.matrix, dtype, out)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, in) -> (rows, out)."""
        return F.linear(x, self._in_scratch(x.dtype), bias)

    def linear_grad_input(self, dy: Tensor) -> Tensor:
        """(rows, out) -> (rows, in)."""
        return dy @ self._in_scratch(dy.dtype)

    def _in_scratch(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in); of use only until another weight is dequantized."""
        size = prod(self.shape)
        if dtype not in _scratch or len(_scratch[dtype]) < size:
            _scratch[dtype] = torch.empty(size, dtype=dtype)
        return dequantize(self.matrix, dtype, out=_scratch[dtype][:size].view(self.shape))


def dequantize(matrix: Nf4Matrix, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix (out, in) in a float dtype: level * scale in float32, rounded once to dtype.

    Bit-equal to bitsandbytes'. Pass `out`, a contiguous (out, in) of the dtype, to reuse
    memory: for large matrices the fresh pages of a new one cost more than the work.

    Raises:
        ValueError: `out` does not fit.
    """
    if out is None:
        out = torch.empty(matrix.shape, dtype=dtype)
    else:
        check_out(out, dtype, matrix.shape)
    scales = matrix.scales if isinstance(matrix.scales, Tensor) else dequantize_scales(matrix.scales)
    flat, block, pairs_of = out.view(-1), matrix.block, _PAIRS[id(matrix.levels)]
    # The same bits, one element a byte: only ever copied, never computed with.
    as_doubles = pairs_of.view(torch.float64).view(-1)
    full = flat.numel() // block * block
    scratch = None if dtype == torch.float32 else torch.empty(min(_CHUNK, full), dtype=torch.float32)
    for start in range(0, full, _CHUNK):
        part = flat[start : min(start + _CHUNK, full)]
        values = part if scratch is None else scratch[: part.numel()]
        pairs = matrix.packed[start // 2 : (start + part.numel()) // 2].to(torch.int32)
        torch.index_select(as_doubles, 0, pairs, out=values.view(torch.float64))
        values.view(-1, block).mul_(scales[start // block : (start + part.numel()) // block, None])
        if scratch is not None:
            part.copy_(values)
    if full < flat.numel():
        tail = pairs_of[matrix.packed[full // 2 :].long()].view(-1)[: flat.numel() - full]
        flat[full:] = tail.mul_(scales[-1])
    return out


def dequantize_scales(scales: NestedScales) -> Tensor:
    """The scales in float32 (blocks,), bit-equal to bitsandbytes': the product is rounded, then the sum."""
    blocks = scales.codes.numel()
    absmax = scales.absmax[:, None].expand(-1, NESTED_BLOCK).reshape(-1)[:blocks]
    levels = DYNAMIC_LEVELS.index_select(0, scales.codes.to(torch.int32))
    return levels.mul_(absmax).add_(scales.offset)
