"""Which implementation multiplies with quantized weights."""

import pytest
import torch

from qlora_contract.quantization import SCHEMES
from qlora_trainer.quantization import kernels
from qlora_trainer.quantization.kernels import reference
from qlora_trainer.quantization.nf4 import quantize_nf4

pytestmark = pytest.mark.process


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_choice_is_logged_once(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    """However often it is asked for, the implementation is the same, and is logged at the first time only."""
    kernels.name.cache_clear()
    with caplog.at_level("INFO"):
        names = {kernels.name(scheme) for _ in range(3)}

    assert names == {"reference"}
    assert caplog.messages == [
        f"kernels of {scheme} weights: reference (plain torch; no compiled kernels are installed)"
    ]


def test_nf4_weights_are_those_of_the_implementation_named() -> None:
    """What the loader gets is the reference's weight, with the quantizer's own bytes in it."""
    matrix = quantize_nf4(torch.randn(4, 64), double=True, name="w")
    weight = kernels.nf4_weight(matrix)

    assert isinstance(weight, reference.Nf4Weight)
    assert weight.matrix is matrix
