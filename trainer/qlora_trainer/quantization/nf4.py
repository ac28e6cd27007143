"""NF4 quantization of a weight matrix (Dettmers et al. 2023, "QLoRA", section 3), and FP4, which has other levels.

A weight is cut, row after row, into blocks of 64 or 128. A block is stored as its
largest magnitude and, for each weight, the index of the nearest of 16 levels in
[-1, 1], which are quantiles of a normal distribution (NF4) or 4-bit floats (FP4).
Double quantization stores the magnitudes in 8 bits, too.

Bytes and scales equal those of bitsandbytes 0.50 on a CPU with one thread, and do
not depend on the number of threads here. The kernel library quantizes at memory speed;
where it is not compiled, plain torch does, to the same bits. That is fast because the
level is looked up, not searched: [-1, 1] is cut into cells so small that each holds one
threshold between levels at most, so two small tables and one comparison give the level
exactly.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_trainer.errors import ModelError
from qlora_trainer.kernels import library

BLOCK = 64
"""Weights that share one scale, unless a job says otherwise."""
NESTED_BLOCK = 256
"""Scales that share one scale of their own, under double quantization."""

# fmt: off
NF4_LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], dtype=torch.float32)
"""The 16 levels of 4-bit NormalFloat: appendix E of the QLoRA paper; bitsandbytes' get_4bit_type."""

# fmt: off
FP4_LEVELS = torch.tensor([
    0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0,
], dtype=torch.float32) / 12
# fmt: on
"""The 16 levels of bitsandbytes' FP4 by code: a bit of sign, two of exponent, one of mantissa; not in order of size."""
_FP4_BY_SIZE = torch.argsort(FP4_LEVELS, stable=True)
_FP4_THRESHOLDS = (FP4_LEVELS[_FP4_BY_SIZE][:-1] + FP4_LEVELS[_FP4_BY_SIZE][1:]) / 2

_DYNAMIC_POSITIVE = [
    5.5000004e-07,
    3.2500002e-06,
    7.75e-06,
    2.1249998e-05,
    4.375e-05,
    6.625e-05,
    8.875e-05,
    0.00015625001,
    0.00026875004,
    0.00038125002,
    0.00049375003,
    0.0006062501,
    0.00071875006,
    0.00083125,
    0.0009437501,
    0.0012812499,
    0.00184375,
    0.00240625,
    0.00296875,
    0.0035312497,
    0.00409375,
    0.0046562497,
    0.0052187503,
    0.00578125,
    0.00634375,
    0.00690625,
    0.00746875,
    0.00803125,
    0.00859375,
    0.009156249,
    0.00971875,
    0.01140625,
    0.01421875,
    0.01703125,
    0.019843752,
    0.02265625,
    0.02546875,
    0.028281251,
    0.03109375,
    0.03390625,
    0.036718752,
    0.03953125,
    0.042343747,
    0.04515625,
    0.04796875,
    0.05078125,
    0.05359375,
    0.05640625,
    0.059218753,
    0.06203125,
    0.06484375,
    0.067656256,
    0.070468746,
    0.07328125,
    0.07609375,
    0.07890625,
    0.08171876,
    0.08453125,
    0.08734375,
    0.09015625,
    0.092968754,
    0.09578126,
    0.09859375,
    0.107031256,
    0.12109375,
    0.13515624,
    0.14921875,
    0.16328125,
    0.17734376,
    0.19140625,
    0.20546874,
    0.21953125,
    0.23359375,
    0.24765624,
    0.26171875,
    0.27578127,
    0.28984374,
    0.30390626,
    0.31796873,
    0.33203125,
    0.34609374,
    0.36015624,
    0.37421876,
    0.38828123,
    0.40234375,
    0.41640624,
    0.43046874,
    0.44453126,
    0.45859373,
    0.47265625,
    0.4867187,
    0.50078124,
    0.5148437,
    0.5289062,
    0.54296875,
    0.5570313,
    0.5710938,
    0.58515626,
    0.5992187,
    0.61328125,
    0.6273438,
    0.6414063,
    0.65546876,
    0.6695312,
    0.68359375,
    0.6976563,
    0.7117188,
    0.72578126,
    0.7398437,
    0.75390625,
    0.7679688,
    0.78203124,
    0.79609376,
    0.8101562,
    0.82421875,
    0.8382813,
    0.85234374,
    0.86640626,
    0.8804687,
    0.89453125,
    0.9085938,
    0.92265624,
    0.93671876,
    0.9507812,
    0.96484375,
    0.9789063,
    0.99296874,
]
# fmt: on
DYNAMIC_LEVELS = torch.tensor(
    [-x for x in reversed(_DYNAMIC_POSITIVE)] + [0.0, *_DYNAMIC_POSITIVE, 1.0], dtype=torch.float32
)
"""The 256 levels of the signed dynamic 8-bit type (Dettmers 2016, "8-Bit Approximations for Parallelism in
Deep Learning"): bitsandbytes' create_dynamic_map. The scales' codes index it."""

_THRESHOLDS = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2
_CELLS_PER_UNIT = 32
_PLACES = 1 << 16
_CHUNK = 1024 * BLOCK
"""Weights quantized at once: the temporaries, 20 bytes a weight, fit a core's second-level cache."""
_SMALLEST_SCALE = 1e-38
"""What bitsandbytes divides by at least, so that a block of zeros gives no NaN."""


@dataclass(frozen=True, eq=False)
class NestedScales:
    """Scales of blocks in 8 bits: DYNAMIC_LEVELS[codes] * absmax[of its 256 blocks] + offset."""

    codes: Tensor
    """uint8 (blocks,)."""
    absmax: Tensor
    """float32 (blocks / 256, rounded up)."""
    offset: Tensor
    """float32 (): the mean scale."""

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes


@dataclass(frozen=True, eq=False)
class Nf4Matrix:
    """A matrix in 4 bits: weight i, counted row after row, is levels[code i] * scale[i // block]."""

    packed: Tensor
    """uint8 (weights / 2, rounded up): two codes a byte, the earlier in the high nibble."""
    scales: Tensor | NestedScales
    """float32 (blocks,), or the same in 8 bits."""
    shape: tuple[int, int]
    """(out, in) of the linear layer."""
    block: int = BLOCK
    """Weights that share a scale."""
    levels: Tensor = NF4_LEVELS
    """NF4_LEVELS or FP4_LEVELS."""

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return self.packed.nbytes + self.scales.nbytes


def quantize_nf4(
    weight: Tensor, *, double: bool, name: str, block: int = BLOCK, levels: Tensor = NF4_LEVELS
) -> Nf4Matrix:
    """Quantize a matrix (out, in) of any float dtype.

    Takes about 1.5 MiB at most besides the result and float32 scales, whatever the size
    (a weight that is not contiguous is copied first).

    Args:
        weight: the matrix; left as it is.
        double: quantize the scales, too.
        name: of the tensor, for errors.
        block: weights that share a scale: 64 or 128.
        levels: NF4_LEVELS or FP4_LEVELS.

    Raises:
        ModelError: the weight is not a matrix of floats, is empty, or holds a NaN or an infinity.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ModelError(
            f"{name}: a matrix of floats is needed, not {weight.dtype} of shape {list(weight.shape)}"
        )
    flat = weight.detach().reshape(-1).contiguous()
    packed = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-flat.numel() // block), dtype=torch.float32)
    kernels = library.loaded()
    finite = (
        _quantize_reference(flat, packed, absmax, block, levels)
        if kernels is None or block != BLOCK or levels is not NF4_LEVELS
        else _quantize_compiled(kernels, flat, packed, absmax)
    )
    if not finite:
        raise ModelError(_describe_non_finite(weight, name))
    n, k = weight.shape
    return Nf4Matrix(packed, _quantize_scales(absmax) if double else absmax, (n, k), block, levels)


_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernel library reads; other types are widened first."""


def _quantize_compiled(kernels: library.Library, flat: Tensor, packed: Tensor, absmax: Tensor) -> bool:
    """Weights (n,) -> their bytes and scales, by the kernel library; False where a weight is not finite."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    quantize = kernels.function("quantize_nf4", ctypes.c_int, pointer, integer, pointer, pointer, pointer)
    count = flat.numel()
    step = count if flat.dtype in _TYPES else _CHUNK
    for start in range(0, count, step):
        part = flat[start : start + step]
        if part.dtype not in _TYPES:
            part = part.float()
        finite = ctypes.c_int()
        quantize(
            torch.get_num_threads(), _TYPES[part.dtype], part.data_ptr(), part.numel(),
            packed[start // 2 :].data_ptr(), absmax[start // BLOCK :].data_ptr(), ctypes.byref(finite),
        )  # fmt: skip
        if not finite.value:
            return False
    return True


def _quantize_reference(flat: Tensor, packed: Tensor, absmax: Tensor, block: int, levels: Tensor) -> bool:
    """The same in plain torch, for blocks and levels of any kind."""
    count = flat.numel()
    codes_of = _codes if levels is NF4_LEVELS else _fp4_codes
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        scaled, scales = _scale(flat[start:stop].float(), block)
        if not scales.isfinite().all():
            return False
        if scaled.numel() % 2:
            scaled = torch.cat([scaled, scaled.new_zeros(1)])
        packed[start // 2 : -(-stop // 2)] = _pack(codes_of(scaled))
        absmax[start // block : -(-stop // block)] = scales
    return True


def _scale(chunk: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Weights (n,) -> weights divided by their block's scale (n,), scales (blocks,).

    Full blocks are multiplied by the reciprocal and a last short one is divided:
    bitsandbytes does so, and the two round differently.
    """
    full = chunk.numel() // block * block
    blocks = chunk[:full].view(-1, block)
    absmax = blocks.abs().amax(dim=1) if full else chunk.new_empty(0)
    scaled = blocks.mul(absmax.clamp(min=_SMALLEST_SCALE).reciprocal()[:, None]).view(-1)
    if full == chunk.numel():
        return scaled, absmax
    tail = chunk[full:]
    tail_absmax = tail.abs().amax().clamp(min=_SMALLEST_SCALE)
    return torch.cat([scaled, tail / tail_absmax]), torch.cat([absmax, tail_absmax[None]])


def _cell(scaled: Tensor) -> Tensor:
    """The cell of each value (n,), int32 (n,): values in [-1, 1] (or an ulp beyond) give 0 to 64, never decreasing."""
    return scaled.add(1.0).mul_(_CELLS_PER_UNIT).to(torch.int32)


def _cell_tables() -> tuple[Tensor, Tensor]:
    """Of each cell: the threshold in it, float32 (65,), or 2, never reached; the level below it, int32 (65,)."""
    cells = _cell(_THRESHOLDS).long()
    assert bool((cells[1:] > cells[:-1]).all()), "two thresholds share a cell"
    every = torch.arange(2 * _CELLS_PER_UNIT + 1)
    thresholds = torch.full((every.numel(),), 2.0, dtype=torch.float32)
    thresholds[cells] = _THRESHOLDS
    return thresholds, torch.bucketize(every, cells, out_int32=True)


_CELL_THRESHOLD, _CELL_LEVEL = _cell_tables()


def _codes(scaled: Tensor) -> Tensor:
    """Values (n,) -> index of the nearest level (n,), int32: how many thresholds are below the value."""
    cell = _cell(scaled)
    # The sign of (threshold - value), as an integer of 0 or -1, is cheaper here than a comparison.
    below = _CELL_THRESHOLD.index_select(0, cell).sub_(scaled).view(torch.int32).bitwise_right_shift_(31)
    return _CELL_LEVEL.index_select(0, cell).sub_(below)


def _fp4_codes(scaled: Tensor) -> Tensor:
    """Values (n,) -> index of the nearest level of FP4 (n,), int32."""
    by_size = torch.bucketize(scaled.clamp(-1.0, 1.0), _FP4_THRESHOLDS, out_int32=True)
    return _FP4_BY_SIZE.to(torch.int32).index_select(0, by_size)


def _pack(codes: Tensor) -> Tensor:
    """An even number of codes (n,), int32 -> bytes (n / 2,)."""
    pairs = codes.to(torch.int16).view(torch.int32)
    # A pair is earlier + later * 2**16; times 2**20 + 1 its upper half is earlier * 16 + later.
    return pairs.mul_((1 << 20) + 1).bitwise_right_shift_(16).to(torch.uint8)


_PLACE_CODE = torch.bucketize(
    torch.arange(_PLACES, dtype=torch.float32).mul_(2).div_(_PLACES - 1).sub_(1.0),
    (DYNAMIC_LEVELS[:-1] + DYNAMIC_LEVELS[1:]) / 2,
).to(torch.uint8)
"""uint8 (65536,): the code of each place, evenly spread over [-1, 1]."""


def _quantize_scales(absmax: Tensor) -> NestedScales:
    """Scales in 8 bits, as bitsandbytes does it on a CPU: by a table of 65,536 places in [-1, 1]."""
    # The rows of a matrix are each summed in one piece; a vector is summed in pieces, one a thread, and
    # the mean's last bits would depend on how many there are.
    offset = absmax.expand(2, -1).mean(dim=1)[0].clone()
    codes = torch.empty(absmax.numel(), dtype=torch.uint8)
    nested = torch.empty(-(-absmax.numel() // NESTED_BLOCK), dtype=torch.float32)
    for start in range(0, absmax.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        nested_part = slice(start // NESTED_BLOCK, (start + _CHUNK) // NESTED_BLOCK)
        codes[part], nested[nested_part] = _dynamic_codes(absmax[part] - offset)
    return NestedScales(codes, nested, offset)


def _dynamic_codes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (n,) -> uint8 codes (n,), absmax (n / 256 rounded up,)."""
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    # 0 / 0 and 0 * (1 / denormal) are NaN; they get code 0, as they do there.
    scaled = blocks.mul(absmax.reciprocal()[:, None]).nan_to_num_(nan=-1.0).clamp_(-1.0, 1.0)
    place = scaled.add_(1.0).mul_(0.5).mul_(_PLACES - 1).add_(0.5).to(torch.int32)
    return _PLACE_CODE.index_select(0, place.view(-1))[:count], absmax


def _describe_non_finite(weight: Tensor, name: str) -> str:
    """The sentence that says how many weights are not finite in float32, and where the first is."""
    bad_per_row = torch.stack([(~row.float().isfinite()).sum() for row in weight.detach()])
    row = int(bad_per_row.nonzero()[0])
    column = int((~weight[row].detach().float().isfinite()).nonzero()[0])
    return (
        f"{name}: {int(bad_per_row.sum())} of {weight.numel()} weights are NaN or infinite in float32, the first "
        f"({float(weight[row, column])}) at row {row}, column {column}; every weight must be finite"
    )
