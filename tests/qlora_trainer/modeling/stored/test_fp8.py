"""FP8 against transformers' own code."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from qlora_trainer.modeling.stored import fp8

pytestmark = pytest.mark.process


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 6)])
def test_blocks_are_scaled_as_transformers_does(grid: tuple[int, int]) -> None:
    """Every finite code of e4m3 has the value that transformers gives it, bit for bit."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(96)
    codes = torch.where(codes & 127 == 127, 0, codes)  # NaN
    weight = codes.view(128, 192).view(torch.float8_e4m3fn)
    scale = torch.rand(grid, generator=torch.Generator().manual_seed(0)) + 0.1
    theirs: Any = Fp8Dequantize(SimpleNamespace())
    block = [128 // grid[0], 192 // grid[1]]

    expected = theirs._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(fp8.dequantize({"weight": weight, "scale": scale}, block), expected)
    exponents = torch.randint(100, 130, grid, dtype=torch.uint8)
    expected = theirs._dequantize_one(weight, exponents, torch.float32)
    assert torch.equal(fp8.dequantize({"weight": weight, "scale": exponents}, block), expected)


def test_other_numbers_are_refused() -> None:
    """Integers under FP8's name are a ValueError."""
    with pytest.raises(ValueError, match=r"the weight is torch\.int8, not one of FP8"):
        fp8.dequantize({"weight": torch.zeros(2, 2, dtype=torch.int8), "scale": torch.ones(())}, None)
