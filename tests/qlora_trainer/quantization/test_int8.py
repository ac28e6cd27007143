"""8 bits by row, against bitsandbytes."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qlora_trainer.errors import ModelError
from qlora_trainer.quantization.int8 import quantize_int8

pytestmark = pytest.mark.process


def randn(*shape: int) -> Tensor:
    """Normal values, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_codes_and_scales_are_those_of_bitsandbytes(scale: float) -> None:
    """Without a threshold for outliers, its vector-wise quantization of half-precision weights is ours."""
    weight = (randn(257, 192) * scale).half()
    theirs, absmax, _ = bnb.int8_vectorwise_quant(weight)
    found = quantize_int8(weight, name="w")

    assert torch.equal(found.absmax, absmax)
    assert torch.equal(found.codes, theirs)


def test_products_are_those_of_the_dequantized_weight() -> None:
    """Forward and backward multiply with the numbers that dequantize gives, in the input's type."""
    weight = quantize_int8(randn(96, 64), name="w")
    x, dy, bias = randn(5, 64).bfloat16(), randn(5, 96).bfloat16(), randn(96).bfloat16()
    whole = weight.dequantize(torch.bfloat16)

    assert torch.equal(weight.linear(x, bias), torch.nn.functional.linear(x, whole, bias))
    assert torch.equal(weight.linear_grad_input(dy), dy @ whole)
    out = torch.empty(96, 64, dtype=torch.bfloat16)
    assert torch.equal(weight.dequantize(torch.bfloat16, out), whole)


@pytest.mark.parametrize(
    "weight", [torch.zeros(3, 64), torch.full((3, 64), 1e-40)], ids=["zeros", "denormals"]
)
def test_rows_without_a_scale_are_zeros(weight: Tensor) -> None:
    """Nothing is divided by 0."""
    found = quantize_int8(weight, name="w").dequantize(torch.float32)

    assert torch.equal(found, torch.zeros(3, 64))


def test_the_error_is_at_most_half_a_code() -> None:
    """Of each row's largest magnitude, over several pieces of rows."""
    weight = randn(3000, 192)
    found = quantize_int8(weight, name="w").dequantize(torch.float32)

    assert bool(((found - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all())


def test_a_vector_is_refused() -> None:
    """Only matrices of floats can be quantized, and the message names the tensor."""
    with pytest.raises(ModelError, match=r"^w: a matrix of floats is needed"):
        quantize_int8(torch.zeros(5), name="w")
