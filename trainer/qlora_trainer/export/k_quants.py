"""Quantization to llama.cpp's block formats that gguf's own package only reads: Q4_K, Q5_K and Q6_K.

A block is 256 numbers of a row. In Q4_K and Q5_K its 8 parts of 32 have a scale and a minimum of 6 bits each, in units
of two fp16 numbers of the block:

    w = d s q - dmin m,    q of 4 or 5 bits

In Q6_K its 16 parts of 16 have a signed scale of 8 bits, in units of one fp16 number:

    w = d s (q - 32),    q of 6 bits

Scale and minimum of a part are fitted: for candidates around the range's, numbers are rounded, and scale and minimum
that are best for these integers follow by weighted least squares; the candidate of least error stays.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 256
CANDIDATES = 21
"""Scales that are tried for each part."""
AT_ONCE = 1 << 11
"""Blocks that are quantized at once: what they take stays in a processor's caches."""
LARGEST_FP16 = 65504.0


def quantize_q4_k(rows: Tensor) -> NDArray[np.uint8]:
    """(rows, columns) fp32, columns a multiple of 256 -> (rows, columns / 256 * 144) bytes."""
    return _by_chunks(rows, lambda blocks: _with_minimum(blocks, bits=4))


def quantize_q5_k(rows: Tensor) -> NDArray[np.uint8]:
    """(rows, columns) fp32, columns a multiple of 256 -> (rows, columns / 256 * 176) bytes."""
    return _by_chunks(rows, lambda blocks: _with_minimum(blocks, bits=5))


def quantize_q6_k(rows: Tensor) -> NDArray[np.uint8]:
    """(rows, columns) fp32, columns a multiple of 256 -> (rows, columns / 256 * 210) bytes."""
    return _by_chunks(rows, _symmetric)


def _by_chunks(rows: Tensor, quantize: Callable[[Tensor], Tensor]) -> NDArray[np.uint8]:
    blocks = rows.float().reshape(-1, BLOCK)
    parts = [quantize(chunk) for chunk in torch.split(blocks, AT_ONCE)]
    return torch.cat(parts).view(rows.shape[0], -1).numpy()


# --- Q4_K and Q5_K


def _with_minimum(blocks: Tensor, bits: int) -> Tensor:
    """(n, 256) -> (n, bytes of a block)."""
    parts = blocks.view(-1, 8, 32)
    scales, minima = _fit_scale_and_minimum(parts, (1 << bits) - 1)  # (n, 8) each
    d, s = _six_bits(scales)
    # A scale that fp16 rounds to 0 leaves the minimum alone to stand for the numbers.
    lost = (d[:, None] * s == 0) & (scales > 0)
    dmin, m = _six_bits(torch.where(lost, -parts.mean(-1).clamp(max=0.0), minima))
    step, low = (d[:, None] * s)[..., None], (dmin[:, None] * m)[..., None]
    q = torch.where(step > 0, (parts + low) / step, 0.0).round_().clamp_(0, (1 << bits) - 1).to(torch.uint8)
    head = torch.cat([_fp16_bytes(d), _fp16_bytes(dmin), _pack_six_bits(s, m)], dim=1)
    q = q.view(-1, 4, 2, 32)
    nibbles = ((q[:, :, 0] & 15) | ((q[:, :, 1] & 15) << 4)).view(-1, 128)
    if bits == 4:
        return torch.cat([head, nibbles], dim=1)
    # The fifth bits of part p of all 8 are bit p of 32 bytes.
    shifts = torch.arange(8, dtype=torch.uint8)[None, :, None]
    high = ((q.view(-1, 8, 32) >> 4) << shifts).sum(dim=1).to(torch.uint8)
    return torch.cat([head, high, nibbles], dim=1)


def _fit_scale_and_minimum(parts: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Scale s and minimum m >= 0 of each part (..., 32), such that w is about s q - m with q from 0 to `largest`."""
    # Large numbers matter more, as they carry more of a product.
    weight = parts.square().mean(dim=-1, keepdim=True).sqrt() + parts.abs()
    total, wx = weight.sum(-1), (weight * parts).sum(-1)
    low = parts.amin(-1).clamp(max=0.0)
    span = parts.amax(-1) - low
    best_scale, best_minimum = span / largest, -low
    best_error = torch.full_like(span, torch.inf)
    for number in range(CANDIDATES):
        inverse = torch.where(span > 0, (largest - 1.0 + 0.1 * number) / span, 0.0)
        q = ((parts - low[..., None]) * inverse[..., None]).round_().clamp_(0, largest)
        wq = weight * q
        sq, sqq, sqx = wq.sum(-1), (wq * q).sum(-1), (wq * parts).sum(-1)
        determinant = total * sqq - sq * sq
        scale = (total * sqx - wx * sq) / determinant
        minimum = (sq * sqx - sqq * wx) / determinant
        # A minimum below zero cannot be stored: the best without one.
        without = minimum < 0
        scale = torch.where(without, sqx / sqq, scale)
        minimum = minimum.clamp(min=0.0)
        error = (weight * (scale[..., None] * q - minimum[..., None] - parts).square()).sum(-1)
        better = (error < best_error) & (scale > 0) & (determinant > 0)  # False where any is NaN
        best_scale = torch.where(better, scale, best_scale)
        best_minimum = torch.where(better, minimum, best_minimum)
        best_error = torch.where(better, error, best_error)
    return best_scale, best_minimum


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 8) numbers from 0 -> their common unit (n,), as fp16 keeps it, and integers from 0 to 63."""
    unit = _as_fp16(values.amax(dim=1) / 63)
    numbers = torch.where(unit[:, None] > 0, values / unit[:, None], 0.0).round_().clamp_(0, 63)
    return unit, numbers


def _pack_six_bits(s: Tensor, m: Tensor) -> Tensor:
    """8 scales and 8 minima of 6 bits -> 12 bytes: (n, 8) each -> (n, 12)."""
    s, m = s.to(torch.uint8), m.to(torch.uint8)
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    third = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return torch.cat([first, second, third], dim=1)


# --- Q6_K


def _symmetric(blocks: Tensor) -> Tensor:
    """(n, 256) -> (n, 210)."""
    parts = blocks.view(-1, 16, 16)
    scales = _fit_scale(parts)  # (n, 16)
    extreme = torch.gather(scales, 1, scales.abs().argmax(dim=1, keepdim=True))[:, 0]
    d = _as_fp16(extreme / -128)
    s = torch.where(d[:, None] != 0, scales / d[:, None], 0.0).round_().clamp_(-128, 127)
    step = (d[:, None] * s)[..., None]
    q = torch.where(step != 0, parts / step, 0.0).round_().clamp_(-32, 31).add_(32).to(torch.uint8)
    # Halves of 128 numbers; in each, numbers l, l + 32, l + 64 and l + 96 share bytes.
    q = q.view(-1, 2, 4, 32)
    low = torch.cat(
        [(q[:, :, 0] & 15) | ((q[:, :, 2] & 15) << 4), (q[:, :, 1] & 15) | ((q[:, :, 3] & 15) << 4)], 2
    )
    high = (q[:, :, 0] >> 4) | (q[:, :, 1] >> 4 << 2) | (q[:, :, 2] >> 4 << 4) | (q[:, :, 3] >> 4 << 6)
    return torch.cat(
        [low.view(-1, 128), high.view(-1, 64), s.to(torch.int8).view(torch.uint8), _fp16_bytes(d)], dim=1
    )


def _fit_scale(parts: Tensor) -> Tensor:
    """Scale s of each part (..., 16), such that w is about s q with q from -32 to 31."""
    weight = parts.square()
    extreme = torch.gather(parts, -1, parts.abs().argmax(dim=-1, keepdim=True))[..., 0]
    best_scale, best_gain = extreme / -32, torch.zeros_like(extreme)
    for number in range(-9, 10):
        inverse = torch.where(extreme != 0, -(32.0 + 0.1 * number) / extreme, 0.0)
        q = (parts * inverse[..., None]).round_().clamp_(-32, 31)
        sqx, sqq = (weight * q * parts).sum(-1), (weight * q * q).sum(-1)
        # With the best scale, sqx / sqq, the error is that of zeros less this.
        gain = sqx * sqx / sqq
        better = gain > best_gain
        best_scale, best_gain = (
            torch.where(better, sqx / sqq, best_scale),
            torch.where(better, gain, best_gain),
        )
    return best_scale


# --- numbers of 16 bits


def _as_fp16(values: Tensor) -> Tensor:
    """What fp16 keeps of them, in fp32."""
    return values.clamp(-LARGEST_FP16, LARGEST_FP16).half().float()


def _fp16_bytes(values: Tensor) -> Tensor:
    """(n,) -> (n, 2) bytes, little endian."""
    return values.half().view(torch.uint8).view(-1, 2)
