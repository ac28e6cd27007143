"""FP8: e4m3 numbers with a scale for each block, row or tensor. DeepSeek, Qwen3, Mistral and FBGEMM store so."""

from functools import partial

import torch
from torch import Tensor

from qlora_trainer.modeling.stored.format import Format, Parts, Settings

FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def matches(settings: Settings) -> Format | str | None:
    """The form that quant_method `fp8` or `fbgemm_fp8` names."""
    if settings.get("quant_method") not in ("fp8", "fbgemm_fp8"):
        return None
    block = settings.get("weight_block_size")
    if block is not None and (
        len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block)
    ):
        return f"FP8 with weight_block_size {block}, which should be two sizes"
    scales = (
        "a scale for each row or tensor"
        if block is None
        else f"a scale for each {block[0]} x {block[1]} weights"
    )
    return Format(
        description=f"FP8, {scales}",
        dequantize=partial(dequantize, block=block),
        parts={".weight_scale_inv": "scale", ".weight_scale": "scale"},
        unused=(".activation_scale", ".input_scale", ".input_scale_ub", ".k_scale", ".v_scale"),
    )


def dequantize(parts: Parts, block: list[int] | None) -> Tensor:
    """weight * scale in float32; `weight_scale_inv` is a factor like any other, for all its name."""
    weight, scale = parts["weight"], parts["scale"]
    if weight.dtype not in FP8_TYPES:
        raise ValueError(f"the weight is {weight.dtype}, not one of FP8")
    if scale.dtype == torch.uint8:  # an exponent, biased by 127
        scale = torch.exp2(scale.float() - 127)
    scale = scale.float()
    rows, columns = weight.shape
    out = weight.float()
    if block is None or scale.numel() == 1:
        if scale.numel() not in (1, rows):
            raise ValueError(f"scales of shape {list(scale.shape)} for a weight of {[rows, columns]}")
        return out.mul_(scale.reshape(-1, 1))
    down, across = -(-rows // block[0]), -(-columns // block[1])
    if scale.shape != (down, across):
        raise ValueError(
            f"scales of shape {list(scale.shape)} for {[down, across]} blocks of {block[0]} x {block[1]} in a weight "
            f"of {[rows, columns]}"
        )
    wide = scale.repeat_interleave(block[1], 1)[:, :columns]  # the last blocks may be cut off
    for number, first in enumerate(range(0, rows, block[0])):
        out[first : first + block[0]] *= wide[number]
    return out
