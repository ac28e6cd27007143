"""MXFP4 (OCP Microscaling Formats 1.0): 4-bit floats, 32 of which share a power of two. So gpt-oss has its experts."""

import torch
from torch import Tensor

from qlora_trainer.modeling.stored.format import Format, Parts, Settings, nibbles

# fmt: off
E2M1_LEVELS = torch.tensor(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], dtype=torch.bfloat16
)
# fmt: on
"""By code: 1 bit of sign, 2 of exponent, 1 of mantissa."""


def matches(settings: Settings) -> Format | str | None:
    """The form that quant_method `mxfp4` names."""
    if settings.get("quant_method") != "mxfp4":
        return None
    return Format(
        description="MXFP4",
        dequantize=dequantize,
        parts={"_blocks": "blocks", "_scales": "scales"},
        weight="",
    )


def dequantize(parts: Parts) -> Tensor:
    """(experts, out, blocks, 16 bytes) -> (experts, in, out), as transformers' graph has them; exact in bf16."""
    blocks, scales = parts["blocks"], parts["scales"]
    if blocks.dim() != 4 or blocks.shape[:-1] != scales.shape or scales.dtype != torch.uint8:
        raise ValueError(f"blocks of {list(blocks.shape)} with {scales.dtype} scales of {list(scales.shape)}")
    experts, out, count, _ = blocks.shape
    weight = torch.empty(experts, count * 2 * blocks.shape[3], out, dtype=torch.bfloat16)
    for expert, block, scale in zip(weight, blocks, scales, strict=True):
        numbers = E2M1_LEVELS.take(nibbles(block, high_first=False).long())
        numbers *= torch.exp2(scale.float() - 127).to(torch.bfloat16)[..., None]
        expert.copy_(numbers.view(out, -1).t())
    return weight
