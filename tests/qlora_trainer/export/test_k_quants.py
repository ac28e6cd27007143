"""K-quants, judged by the package that reads them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from torch import Tensor

from qlora_trainer.export import k_quants

pytestmark = pytest.mark.process

Quantize = Callable[[Tensor], Any]
KINDS = [
    pytest.param(k_quants.quantize_q4_k, Type.Q4_K, id="Q4_K"),
    pytest.param(k_quants.quantize_q5_k, Type.Q5_K, id="Q5_K"),
    pytest.param(k_quants.quantize_q6_k, Type.Q6_K, id="Q6_K"),
]
WEIGHTS = {
    "normal": torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 0.02,
    "positive": torch.randn(16, 512, generator=torch.Generator().manual_seed(1)).abs(),
    "negative": -torch.rand(16, 512, generator=torch.Generator().manual_seed(2)),
    "zero": torch.zeros(3, 256),
    "constant": torch.full((3, 256), -3.0),
    "tiny": torch.randn(8, 512, generator=torch.Generator().manual_seed(3)) * 1e-6,
    "outlier": torch.randn(4, 256, generator=torch.Generator().manual_seed(4)).index_fill_(
        1, torch.tensor([7]), 100.0
    ),
}


def relative_error(weight: Tensor, back: Any) -> float:
    """Root of the mean squared error, in units of the weight's own."""
    return float(
        np.sqrt(((back - weight.numpy()) ** 2).mean()) / (float(weight.square().mean().sqrt()) or 1.0)
    )


@pytest.mark.parametrize(("make", "kind"), KINDS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_written_is_read_as_about_the_same(make: Quantize, kind: Type, name: str) -> None:
    """The reader of gguf's package gives the weight's shape, and never more than its numbers' own size of error."""
    weight = WEIGHTS[name]

    back = dequantize(make(weight), kind)

    assert back.shape == weight.shape
    assert np.isfinite(back).all()
    assert relative_error(weight, back) <= (1.01 if name == "tiny" else 0.1)


@pytest.mark.parametrize(
    ("make", "kind", "most"),
    [
        pytest.param(k_quants.quantize_q4_k, Type.Q4_K, 0.074, id="Q4_K"),
        pytest.param(k_quants.quantize_q5_k, Type.Q5_K, 0.037, id="Q5_K"),
        pytest.param(k_quants.quantize_q6_k, Type.Q6_K, 0.0185, id="Q6_K"),
    ],
)
def test_errors_of_normal_weights_are_those_of_the_format(make: Quantize, kind: Type, most: float) -> None:
    """Each bit halves the error; four bits with a minimum beat those without one."""
    weight = WEIGHTS["normal"]

    error = relative_error(weight, dequantize(make(weight), kind))

    assert error < most
    assert error < relative_error(weight, dequantize(quantize(weight.numpy(), Type.Q4_0), Type.Q4_0))


@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_what_the_format_can_say_is_kept_exactly(make: Quantize, kind: Type) -> None:
    """Quantizing what was dequantized gives nearly the same numbers again: places and bits are the reader's."""
    once = dequantize(make(WEIGHTS["normal"]), kind)

    twice = dequantize(make(torch.from_numpy(once.copy())), kind)

    assert relative_error(torch.from_numpy(once.copy()), twice) < 0.02
