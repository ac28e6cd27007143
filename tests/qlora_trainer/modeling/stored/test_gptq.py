"""GPTQ's zeros."""

import pytest
import torch

from qlora_trainer.modeling.stored import gptq

pytestmark = pytest.mark.process


def test_zeros_of_the_first_layout_borrow_from_the_next_field() -> None:
    """Zeros 0 and 8 are the fields 0 and 8 of a word, less 0x11: 0x6F. Fields alone would give 0 and 7."""
    parts = {
        "codes": torch.full((1, 8), 0x11111111, dtype=torch.int32),
        "zeros": torch.tensor([[0x6F]], dtype=torch.int32),
        "scales": torch.ones(1, 8),
        "group of row": torch.zeros(8, dtype=torch.int32),
    }
    found = gptq.dequantize(parts, bits=4, zero_offset=1)

    assert found.shape == (8, 8)
    assert found[:2, 0].tolist() == [1.0, -7.0]
