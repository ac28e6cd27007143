"""Dequantization against bitsandbytes and against its definition."""

from unittest.mock import patch

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_trainer.quantization.kernels import reference
from qlora_trainer.quantization.kernels.reference import dequantize, dequantize_scales
from qlora_trainer.quantization.nf4 import BLOCK, NF4_LEVELS, NestedScales, Nf4Matrix, quantize_nf4

pytestmark = pytest.mark.process

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal values, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_bitsandbytes(weight: Nf4Matrix, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' dequantized matrix; right only where rows are whole blocks."""
    assert weight.shape[1] % BLOCK == 0
    scales = weight.scales
    nested = isinstance(scales, NestedScales)
    state = bnb.QuantState(
        absmax=scales.codes if nested else scales,
        shape=torch.Size(weight.shape),
        dtype=dtype,
        blocksize=BLOCK,
        quant_type="nf4",
        offset=scales.offset if nested else None,
        state2=bnb.QuantState(
            scales.absmax, code=bnb.create_dynamic_map(), blocksize=256, dtype=torch.float32
        )
        if nested
        else None,
    )
    return bnb.dequantize_4bit(weight.packed[:, None], state)


def by_definition(weight: Nf4Matrix, dtype: torch.dtype) -> Tensor:
    """The definition, weight by weight: level * scale in float32, rounded once."""
    count = weight.shape[0] * weight.shape[1]
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).view(-1)[:count].long()
    scales = weight.scales if isinstance(weight.scales, Tensor) else dequantize_scales(weight.scales)
    return (NF4_LEVELS[codes] * scales[torch.arange(count) // BLOCK]).to(dtype).view(weight.shape)


def bits(tensor: Tensor) -> Tensor:
    """The floats' bits, which tell 0 from -0."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_under_a_thousand_scales(dtype: torch.dtype) -> None:
    """Every code dequantizes under 1000 scales, of all sizes, to the bits that bitsandbytes gives."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.arange(16, dtype=torch.uint8).repeat(1000, BLOCK // 16)
    exponents = torch.rand(1000, generator=generator) * 60 - 30
    weight = Nf4Matrix((codes[:, ::2] << 4 | codes[:, 1::2]).view(-1), 10**exponents, (1000, BLOCK))

    expected = by_bitsandbytes(weight, dtype)

    assert torch.equal(bits(expected), bits(dequantize(weight, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1, 64), (3, 128), (301, 1536)], ids=str)
def test_equals_bitsandbytes(shape: tuple[int, int], double: bool, dtype: torch.dtype) -> None:
    """A quantized matrix dequantizes to the bits that bitsandbytes gives."""
    weight = quantize_nf4(randn(*shape) * 0.02, double=double, name="w")

    expected = by_bitsandbytes(weight, dtype)

    assert torch.equal(bits(expected), bits(dequantize(weight, dtype)))


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    double=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    chunk_blocks=st.sampled_from([1, 2, 5, 1 << 30]),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_in_any_chunks(
    rows: int, columns: int, double: bool, dtype: torch.dtype, chunk_blocks: int
) -> None:
    """Whatever the shape, and in however many chunks, the matrix is that of the definition."""
    weight = quantize_nf4(randn(rows, columns), double=double, name="w")
    with patch.object(reference, "_CHUNK", chunk_blocks * BLOCK):
        actual = dequantize(weight, dtype)

    assert actual.shape == (rows, columns)
    assert torch.equal(bits(by_definition(weight, dtype)), bits(actual))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    """The number of threads changes no bit."""
    weight = quantize_nf4(randn(777, 643), double=True, name="w")
    torch.set_num_threads(threads)

    assert torch.equal(by_definition(weight, torch.bfloat16), dequantize(weight, torch.bfloat16))


def test_default_dtype_changes_nothing() -> None:
    """Code that runs while torch's default dtype is another still quantizes and dequantizes in float32."""
    matrix = randn(50, 70)
    expected = dequantize(quantize_nf4(matrix, double=True, name="w"), torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = dequantize(quantize_nf4(matrix, double=True, name="w"), torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)

    assert torch.equal(expected, actual)


def test_identity_matrix_passes_exactly() -> None:
    """The identity matrix, whose weights are levels, is exactly itself."""
    identity = torch.eye(256)

    assert torch.equal(identity, dequantize(quantize_nf4(identity, double=False, name="w"), torch.float32))


@pytest.mark.parametrize(
    ("double", "absolute", "relative"), [(False, 0.0735, 0.2055), (True, 0.11, 0.28)], ids=["plain", "double"]
)
def test_error_on_normal_weights(double: bool, absolute: float, relative: float) -> None:
    """The mean errors on normal weights are those that bitsandbytes' own tests allow."""
    weight = randn(1024, 1024)

    error = (dequantize(quantize_nf4(weight, double=double, name="w"), torch.float32) - weight).abs()

    assert error.mean() < absolute
    assert (error / (weight.abs() + 1e-8)).mean() < relative


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_to_the_memory_it_is_given(dtype: torch.dtype) -> None:
    """With out, the result is written there, every element of it, and nothing beyond."""
    weight = quantize_nf4(randn(33, 70), double=True, name="w")
    memory = torch.full((33 * 70 + 10,), 7.0, dtype=dtype)

    result = dequantize(weight, dtype, out=memory[2 : 2 + 33 * 70].view(33, 70))

    assert result.data_ptr() == memory[2:].data_ptr()
    assert torch.equal(dequantize(weight, dtype), result)
    assert memory[:2].tolist() == [7.0] * 2
    assert memory[-8:].tolist() == [7.0] * 8


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(70, 33),
        torch.empty(33, 70, dtype=torch.bfloat16),
        torch.empty(70, 33).t(),
        torch.empty(33 * 70 + 1)[1:].view(33, 70),
    ],
    ids=["shape", "dtype", "transposed", "odd offset"],
)
def test_memory_that_does_not_fit_is_refused(out: Tensor) -> None:
    """An out of another shape, dtype or layout is refused with what is needed."""
    weight = quantize_nf4(randn(33, 70), double=False, name="w")

    with pytest.raises(ValueError, match=r"it must be torch.float32 \[33, 70\], contiguous"):
        dequantize(weight, torch.float32, out=out)
