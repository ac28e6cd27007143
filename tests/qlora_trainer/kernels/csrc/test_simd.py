"""The vector layer of every tier, a primitive each, against torch."""

import ctypes
import math

import pytest
import torch
from torch import Tensor

from kernel_tiers import EVERY_TIER, library_of

pytestmark = pytest.mark.process

SIZES = [0, 1, 7, 8, 15, 16, 17, 31, 100]


def apply(tier: str, function: str, x: Tensor, y: Tensor) -> Tensor:
    """function(x) written to y, which has a guard of four elements behind it."""
    call = library_of(tier).function(function, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    memory = torch.cat([y, torch.full((4,), 7.0, dtype=y.dtype)])
    call(1, x.data_ptr(), memory.data_ptr(), x.numel())
    assert memory[-4:].tolist() == [7.0] * 4
    return memory[:-4]


def edge_cases() -> Tensor:
    """Ties, the largest and smallest floats, denormals, zeros of both signs, infinities, NaN, and random bits."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x00000001, 0x00008000]
    bits += [0x80000000, 0, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFF8000]
    chosen = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    noise = torch.randint(-(2**31), 2**31, (1003,), generator=torch.Generator().manual_seed(0))
    return torch.cat([chosen, noise.to(torch.int32).view(torch.float32)])


@EVERY_TIER
def test_rounding_to_bf16_is_torch_s(tier: str) -> None:
    """To the nearest, ties to even, for every kind of float; a NaN stays one."""
    x = edge_cases()
    expected = x.to(torch.bfloat16)

    actual = apply(tier, "to_bf16", x, torch.empty(x.numel(), dtype=torch.bfloat16))

    assert torch.equal(expected.isnan(), actual.isnan())
    kept = ~expected.isnan()
    assert torch.equal(expected[kept].view(torch.int16), actual[kept].view(torch.int16))


@EVERY_TIER
@pytest.mark.parametrize("n", SIZES)
def test_short_vectors_are_whole_and_nothing_beyond(tier: str, n: int) -> None:
    """Every length is converted both ways, and no element beyond it is written."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))

    narrow = apply(tier, "to_bf16", x, torch.empty(n, dtype=torch.bfloat16))
    wide = apply(tier, "from_bf16", narrow, torch.empty(n))

    assert torch.equal(x.to(torch.bfloat16), narrow)
    assert torch.equal(narrow.float(), wide)


@EVERY_TIER
def test_powers_of_two(tier: str) -> None:
    """Two units in the last place over the whole range; zero below it, infinity above."""
    x = torch.cat(
        [torch.linspace(-126, 127.9, 10007), torch.randn(1000, generator=torch.Generator().manual_seed(0))]
    )
    expected = torch.exp2(x.double())

    actual = apply(tier, "exp2", x, torch.empty(x.numel()))

    assert ((actual.double() - expected).abs() / expected).max() < 2 * 2**-23
    ends = torch.tensor([0.0, 1.0, -1.0, 128.0, 1e30, math.inf, -160.0, -1e30, -math.inf, math.nan])
    got = apply(tier, "exp2", ends, torch.empty(ends.numel()))
    assert got[:-1].tolist() == [1.0, 2.0, 0.5, math.inf, math.inf, math.inf, 0.0, 0.0, 0.0]
    assert got[-1].isnan()


@EVERY_TIER
@pytest.mark.parametrize("n", SIZES)
def test_reductions(tier: str, n: int) -> None:
    """The sum and the largest magnitude of all elements."""
    x = torch.randint(-100, 100, (n,), generator=torch.Generator().manual_seed(n)).float()
    call = library_of(tier).function("reduce", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    got = torch.full((2,), 7.0)
    call(1, x.data_ptr(), got.data_ptr(), n)

    assert got.tolist() == [float(x.sum()), float(x.abs().max()) if n else 0.0]
