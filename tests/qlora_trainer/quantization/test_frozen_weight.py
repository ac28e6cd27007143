"""What every frozen weight promises to the layers above it.

Products bit for bit are plain torch's promise; those of the kernel library are held against it in test_compiled.py.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_tiers import running
from qlora_trainer.kernels.library import REFERENCE
from qlora_trainer.quantization.frozen_weight import FrozenWeight, UnquantizedWeight
from qlora_trainer.quantization.kernels import reference
from qlora_trainer.quantization.nf4 import quantize_nf4
from qlora_trainer.quantization.schemes import AsStored, Int8, Nf4, Scheme, Unquantized

pytestmark = pytest.mark.process

SCHEMES = {
    "nf4": Nf4(double=False),
    "nf4-double": Nf4(double=True),
    "int8": Int8(),
    "none": Unquantized(),
    "as stored": AsStored(),
}
FLOATS = [torch.float32, torch.bfloat16]
OUT, IN, ROWS = 10, 70, 6


@pytest.fixture(autouse=True)
def plain_torch() -> Iterator[None]:
    """Whatever is compiled."""
    with running(REFERENCE):
        yield


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def frozen(scheme: Scheme, dtype: torch.dtype) -> FrozenWeight:
    """A random weight, stored in bf16, to be computed with in `dtype`."""
    return scheme.freeze("w", randn(OUT, IN, seed=1, dtype=torch.bfloat16), dtype)


@pytest.mark.parametrize("bias", [None, randn(OUT, seed=2)], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_linear_is_the_product_with_the_dequantized_weight(
    scheme: Scheme, dtype: torch.dtype, bias: Tensor | None
) -> None:
    """x W^T + bias, bit for bit what torch gives for the dequantized matrix."""
    weight, x = frozen(scheme, dtype), randn(ROWS, IN, seed=3, dtype=dtype)
    constant = None if bias is None else bias.to(dtype)

    assert torch.equal(weight.linear(x, constant), F.linear(x, weight.dequantize(dtype), constant))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_linear_grad_input_is_the_gradient_of_linear(scheme: Scheme, dtype: torch.dtype) -> None:
    """dy W, bit for bit autograd's gradient of x in the product with the dequantized matrix."""
    weight = frozen(scheme, dtype)
    x, dy = randn(ROWS, IN, seed=3, dtype=dtype).requires_grad_(), randn(ROWS, OUT, seed=4, dtype=dtype)
    expected = torch.autograd.grad(F.linear(x, weight.dequantize(dtype)), x, dy)[0]

    assert torch.equal(weight.linear_grad_input(dy), expected)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_results_are_the_caller_s_to_write_to(scheme: Scheme) -> None:
    """Writing to a product changes neither the weight nor another product."""
    weight, x, dy = frozen(scheme, torch.float32), randn(ROWS, IN), randn(ROWS, OUT)
    before = [weight.linear(x, None), weight.linear_grad_input(dy)]
    for result in (weight.linear(x, None), weight.linear_grad_input(dy)):
        result.fill_(7.0)

    assert torch.equal(weight.linear(x, None), before[0])
    assert torch.equal(weight.linear_grad_input(dy), before[1])


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_no_rows_give_no_rows(scheme: Scheme) -> None:
    """An empty batch is multiplied to an empty one."""
    weight = frozen(scheme, torch.float32)

    assert weight.linear(torch.empty(0, IN), torch.zeros(OUT)).shape == (0, OUT)
    assert weight.linear_grad_input(torch.empty(0, OUT)).shape == (0, IN)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_dequantize_writes_to_the_memory_it_is_given(scheme: Scheme) -> None:
    """With out, the matrix is written there; one that does not fit is refused."""
    weight, out = frozen(scheme, torch.float32), torch.full((OUT, IN), 7.0)

    assert weight.dequantize(torch.float32, out).data_ptr() == out.data_ptr()
    assert torch.equal(out, weight.dequantize(torch.float32))
    with pytest.raises(ValueError, match=r"it must be torch.float32 \[10, 70\], contiguous"):
        weight.dequantize(torch.float32, torch.empty(IN, OUT))


def test_weights_in_turn_do_not_disturb_each_other() -> None:
    """The reference's layers of different sizes share one buffer, and each multiplies with its own weight all the
    same."""
    sizes = [(3, 64), (20, 128), (5, 7), (20, 128)]
    weights = [
        reference.Nf4Weight(quantize_nf4(randn(*size, seed=n), double=True, name="w"))
        for n, size in enumerate(sizes)
    ]
    for weight in weights + weights[::-1]:
        x = randn(2, weight.shape[1])
        assert torch.equal(weight.linear(x, None), F.linear(x, weight.dequantize(torch.float32)))


def test_an_unquantized_weight_is_the_tensor_itself() -> None:
    """It takes no memory besides, and tells the tensor's shape and bytes."""
    tensor = randn(OUT, IN, dtype=torch.bfloat16)
    weight = UnquantizedWeight(tensor)

    assert (weight.shape, weight.nbytes) == ((OUT, IN), OUT * IN * 2)
    assert weight.dequantize(torch.bfloat16).data_ptr() == tensor.data_ptr()
