"""MXFP4: experts of gpt-oss."""

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_trainer.modeling.stored import mxfp4

pytestmark = pytest.mark.process


def test_experts_are_those_of_transformers() -> None:
    """Every code, under small and large scales, has transformers' value, in its shape, exactly."""
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 48, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 48, 3), dtype=torch.uint8)
    found = mxfp4.dequantize({"blocks": blocks, "scales": scales})

    assert found.shape == (2, 96, 48)
    assert torch.equal(found.float(), convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


def test_a_byte_holds_the_earlier_number_in_its_lower_half() -> None:
    """0x2F at the scale 2 is -6 * 2 and then 1 * 2."""
    blocks = torch.full((1, 1, 1, 16), 0x2F, dtype=torch.uint8)
    found = mxfp4.dequantize({"blocks": blocks, "scales": torch.full((1, 1, 1), 128, dtype=torch.uint8)})

    assert found[0, :2, 0].tolist() == [-12.0, 2.0]


def test_parts_that_do_not_fit_are_refused() -> None:
    """Scales for other blocks are a ValueError that names both."""
    blocks = torch.zeros(1, 4, 2, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"blocks of \[1, 4, 2, 16\] with torch.uint8 scales of \[1, 4, 3\]"):
        mxfp4.dequantize({"blocks": blocks, "scales": torch.zeros(1, 4, 3, dtype=torch.uint8)})


def test_both_parts_are_the_expert_s_parameter() -> None:
    """Names end in _blocks and _scales, and the parameter's name has neither."""
    form = mxfp4.matches({"quant_method": "mxfp4"})

    assert form is not None
    assert not isinstance(form, str)
    assert form.part_of("mlp.experts.gate_up_proj_blocks") == ("mlp.experts.gate_up_proj", "blocks")
    assert form.part_of("mlp.experts.gate_up_proj_bias") == ("mlp.experts.gate_up_proj_bias", "weight")
