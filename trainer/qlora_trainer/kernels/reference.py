"""Dequantisation in plain torch: right for every shape, and the twin that faster kernels are tested against.

A byte holds two weights, so a table of 256 pairs of floats turns each byte into both
with one load. A pair is moved as one float64, because torch gathers single elements
from a vector several times faster than rows from a matrix. Work goes in chunks that
stay in a core's second-level cache. What else was tried: trainer/benchmarks/LOG.md.
"""

import torch
from torch import Tensor

from qlora_trainer.quantise import BLOCK, DYNAMIC_LEVELS, NESTED_BLOCK, NF4_LEVELS, DoubleScales, Nf4Weight

_CHUNK = 2048 * BLOCK
"""Weights dequantised at once: 512 KiB in float32 and 256 KiB of indices."""

_PAIRS = torch.stack([NF4_LEVELS.repeat_interleave(16), NF4_LEVELS.repeat(16)], dim=1)
"""float32 [256, 2]: the two levels of each byte, the high nibble's first."""
_PAIRS_AS_DOUBLES = _PAIRS.view(torch.float64).view(-1)
"""The same bits, one element a byte: only ever copied, never computed with."""


def dequantise(weight: Nf4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix [N, K] in a float dtype: level * scale in float32, rounded once to dtype.

    Bit-equal to bitsandbytes'. Pass `out`, a contiguous [N, K] of the dtype, to reuse
    memory: for large matrices the fresh pages of a new one cost more than the work.
    Raises ValueError if `out` does not fit.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype)
    elif (
        out.shape != weight.shape or out.dtype != dtype or not out.is_contiguous() or out.storage_offset() % 2
    ):
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, strides {out.stride()}, offset {out.storage_offset()}; "
            f"it must be {dtype} {list(weight.shape)}, contiguous, at an even offset in its storage"
        )
    scales = weight.scales if isinstance(weight.scales, Tensor) else un_nest(weight.scales)
    flat = out.view(-1)
    full = flat.numel() // BLOCK * BLOCK
    scratch = None if dtype == torch.float32 else torch.empty(min(_CHUNK, full), dtype=torch.float32)
    for start in range(0, full, _CHUNK):
        part = flat[start : min(start + _CHUNK, full)]
        values = part if scratch is None else scratch[: part.numel()]
        _look_up(weight.packed[start // 2 : (start + part.numel()) // 2], values)
        values.view(-1, BLOCK).mul_(scales[start // BLOCK : (start + part.numel()) // BLOCK, None])
        if scratch is not None:
            part.copy_(values)
    if full < flat.numel():
        tail = _PAIRS[weight.packed[full // 2 :].long()].view(-1)[: flat.numel() - full]
        flat[full:] = tail.mul_(scales[-1])
    return out


def _look_up(packed: Tensor, values: Tensor) -> None:
    """Bytes [n] -> their levels, float32 [2 n], written to `values`."""
    torch.index_select(_PAIRS_AS_DOUBLES, 0, packed.to(torch.int32), out=values.view(torch.float64))


def un_nest(scales: DoubleScales) -> Tensor:
    """The scales in float32 [blocks], bit-equal to bitsandbytes': the product is rounded, then the sum."""
    blocks = scales.codes.numel()
    absmax = scales.absmax[:, None].expand(-1, NESTED_BLOCK).reshape(-1)[:blocks]
    levels = DYNAMIC_LEVELS.index_select(0, scales.codes.to(torch.int32))
    return levels.mul_(absmax).add_(scales.offset)
