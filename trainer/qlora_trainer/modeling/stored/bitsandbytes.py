"""bitsandbytes: 4 bits (NF4, FP4), its scales in 8 bits or not, and 8 bits by row."""

import json

import torch
from torch import Tensor

from qlora_trainer.modeling.stored.format import Format, Parts, Settings, nibbles

STATE = "quant state"


def matches(settings: Settings) -> Format | str | None:
    """The form that quant_method `bitsandbytes` names."""
    if settings.get("quant_method") != "bitsandbytes":
        return None
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        description = "bitsandbytes' 8 bits"
    else:
        nested = ", double quantization" if settings.get("bnb_4bit_use_double_quant") else ""
        description = f"bitsandbytes' {settings.get('bnb_4bit_quant_type', '4 bits')}{nested}"
    return Format(
        description=description,
        dequantize=dequantize,
        parts={
            ".weight.absmax": "absmax",
            ".weight.quant_map": "levels",
            ".weight.nested_absmax": "nested absmax",
            ".weight.nested_quant_map": "nested levels",
            ".weight.quant_state.bitsandbytes__nf4": STATE,
            ".weight.quant_state.bitsandbytes__fp4": STATE,
            ".SCB": "row absmax",
            ".weight_format": "layout",
        },
    )


def dequantize(parts: Parts) -> Tensor:
    """Level * absmax of its block, in float32."""
    if "row absmax" in parts:
        weight, absmax = parts["weight"], parts["row absmax"].float()
        if weight.dtype != torch.int8 or absmax.shape != weight.shape[:1]:
            raise ValueError(f"{weight.dtype} {list(weight.shape)} with {absmax.numel()} scales of rows")
        if int(parts.get("layout", torch.zeros(1))) != 0:
            raise ValueError("the rows are in the order of a GPU's tiles")
        return weight.float().mul_(absmax[:, None]).mul_(1 / 127)
    levels, absmax = parts["levels"].float(), parts["absmax"]
    state = json.loads(bytes(parts[STATE].tolist()))
    if "nested absmax" in parts:
        of_block = (
            parts["nested absmax"].float().repeat_interleave(state["nested_blocksize"])[: absmax.numel()]
        )
        absmax = parts["nested levels"].float()[absmax.long()].mul_(of_block).add_(state["nested_offset"])
    absmax, size = absmax.float(), state["blocksize"]
    rows, columns = state["shape"]
    codes = nibbles(parts["weight"].reshape(-1), high_first=True)[: rows * columns]
    if codes.numel() != rows * columns or absmax.numel() != -(-codes.numel() // size):
        raise ValueError(
            f"{codes.numel()} codes and {absmax.numel()} scales of {size} for a weight of {[rows, columns]}"
        )
    weight = levels.index_select(0, codes)
    full = weight.numel() // size * size
    weight[:full].view(-1, size).mul_(absmax[: full // size, None])
    weight[full:] *= absmax[-1]
    return weight.view(rows, columns)
