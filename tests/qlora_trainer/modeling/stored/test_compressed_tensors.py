"""compressed-tensors' packing, by words that its own compressor wrote."""

import pytest
import torch

from qlora_trainer.modeling.stored import compressed_tensors

pytestmark = pytest.mark.process


def test_columns_that_were_put_into_groups_by_importance() -> None:
    """With weight_g_idx the scale and the zero of a column are those of its group, wherever the column is."""
    weight = torch.tensor([[1, 2, 3, 4], [-1, -2, -3, -4]], dtype=torch.int8)
    parts = {
        "weight": weight,
        "scale": torch.tensor([[10.0, 1.0], [2.0, 0.5]]),
        "zero": torch.tensor([[1, 0], [0, 2]], dtype=torch.int8),
        "group of column": torch.tensor([1, 0, 1, 0]),
    }

    found = compressed_tensors.dequantize(parts, None)
    assert found.tolist() == [[1.0, 10.0, 3.0, 30.0], [-1.5, -4.0, -2.5, -8.0]]


def test_the_first_number_of_a_word_is_in_its_lowest_bits() -> None:
    """-8 is stored as 0: of the word 0x76543210 the numbers are -8 to -1."""
    parts = {
        "packed": torch.tensor([[0x76543210]], dtype=torch.int32),
        "scale": torch.tensor([[0.5]]),
        "shape": torch.tensor([1, 8]),
    }

    assert compressed_tensors.dequantize(parts, None).tolist() == [
        [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]
    ]
