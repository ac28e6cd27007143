"""Which forms of storage are refused, and with what words."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_trainer.modeling.stored import formats

pytestmark = pytest.mark.process

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "torchao"}, "is quantized by 'torchao', which is not read; read are fp8,.* GGUF"),
    (
        {"quant_method": "gptq", "bits": 3},
        "is stored in GPTQ of 3 bits; 2, 4 and 8 are read; use another copy",
    ),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "GPTQ's layout 'marlin'"),
    ({"quant_method": "awq", "version": "gemv"}, "AWQ of 4 bits in the layout 'gemv'"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
    (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "compressed sparsity",
    ),
    (
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
        "rotated weights",
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": {"weights": {"block_structure": [64, 64]}},
                "b": {"weights": {"block_structure": [128, 128]}},
            },
        },
        "blocks of several sizes",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_form_that_is_not_read_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    """The refusal says what the model is stored in and what would be right."""
    refused = formats.refusal(SimpleNamespace(quantization_config=settings))

    assert refused is not None
    assert re.search(message, refused)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "fp8", "weight_block_size": ["x" * 5000, 128]},
        {"quant_method": "gptq", "bits": "4" * 5000},
        {"quant_method": "awq", "bits": 4, "version": "x" * 5000},
        {"quant_method": "compressed-tensors", "format": "x" * 5000},
    ],
    ids=lambda settings: settings["quant_method"],
)
def test_a_refusal_repeats_no_long_text(settings: dict[str, Any]) -> None:
    """Whatever config.json says of the form, what is wrong with it fits into a message."""
    refused = formats.refusal(SimpleNamespace(quantization_config=settings))

    assert refused is not None
    assert len(refused) < 400


@pytest.mark.parametrize("settings", [None, {"quant_method": "mxfp4"}, {"quant_method": "gptq", "bits": 4}])
def test_a_form_that_is_read_is_not_refused(settings: dict[str, Any] | None) -> None:
    """Nor is an unquantized model."""
    assert formats.refusal(SimpleNamespace(quantization_config=settings)) is None
