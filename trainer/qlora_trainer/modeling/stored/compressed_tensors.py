"""compressed-tensors: what vLLM's compressor writes. 4 and 8 bit integers, packed or not, and FP8."""

from functools import partial

import torch
from torch import Tensor

from qlora_trainer.modeling.stored import fp8
from qlora_trainer.modeling.stored.format import Format, Parts, Settings, scale_groups, unpack_bits

READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
"""Its formats that are read."""


def matches(settings: Settings) -> Format | str | None:
    """The form that quant_method `compressed-tensors` names."""
    if settings.get("quant_method") != "compressed-tensors":
        return None
    groups = settings.get("config_groups") or {}
    for group in (settings, *groups.values()):
        name = group.get("format")
        if name is not None and name not in READ:
            return f"compressed-tensors' {name}; of its formats {', '.join(READ)} are read"
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return "compressed-tensors with compressed sparsity, which is not read"
    if (settings.get("transform_config") or {}).get("config_groups"):
        return "compressed-tensors with rotated weights (transform_config), which are not read"
    weights = [group.get("weights") or {} for group in groups.values()]
    kinds = sorted({_kind(each) for each in weights})
    blocks = {tuple(each["block_structure"]) for each in weights if each.get("block_structure")}
    if len(blocks) > 1:
        return f"compressed-tensors with blocks of several sizes, {sorted(blocks)}; one size is read"
    return Format(
        description=f"compressed-tensors, {', '.join(kinds)}" if kinds else "compressed-tensors",
        dequantize=partial(dequantize, block=list(*blocks) or None),
        parts={
            ".weight_packed": "packed",
            ".weight_scale": "scale",
            ".weight_shape": "shape",
            ".weight_zero_point": "zero",
            ".weight_g_idx": "group of column",
        },
        unused=(
            ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point",
            ".k_scale", ".v_scale", ".q_scale",
        ),
    )  # fmt: skip


def _kind(weights: Settings) -> str:
    """A group's weights, such as `int4 in groups of 128`."""
    kind = f"{weights.get('type', 'int')}{weights.get('num_bits', '')}"
    group = weights.get("group_size")
    return f"{kind} in groups of {group}" if group and group > 0 else f"{kind} by {weights.get('strategy')}"


def dequantize(parts: Parts, block: list[int] | None) -> Tensor:
    """(weight - zero) * scale in float32."""
    if "packed" in parts:
        return _dequantize_packed(parts)
    weight = parts["weight"]
    if weight.dtype in fp8.FP8_TYPES:
        return fp8.dequantize(parts, block)
    if weight.dtype != torch.int8:
        raise ValueError(f"the weight is {weight.dtype}, neither int8 nor FP8")
    return _scaled(weight.float(), parts, parts.get("zero"))


def _dequantize_packed(parts: Parts) -> Tensor:
    packed = parts["packed"]
    rows, columns = (int(size) for size in parts["shape"])
    fitting = [bits for bits in (4, 8) if packed.shape == (rows, -(-columns * bits // 32))]
    if not fitting:
        raise ValueError(
            f"packed {list(packed.shape)} is neither 4 nor 8 bits a weight for a weight of {[rows, columns]}"
        )
    bits, middle = fitting[0], 1 << (fitting[0] - 1)
    weight = unpack_bits(packed, bits)[:, :columns].sub_(middle).float()
    zero = parts.get("zero")
    if zero is not None and zero.dtype == torch.int32:  # packed down the rows
        zero = unpack_bits(zero.t(), bits)[:, :rows].t().sub(middle)
    return _scaled(weight.contiguous(), parts, zero)


def _scaled(weight: Tensor, parts: Parts, zero: Tensor | None) -> Tensor:
    """(out, in) float32, scaled in place, column by column where columns were put into groups by importance."""
    scale = parts["scale"]
    if "group of column" not in parts:
        return scale_groups(weight, scale, zero)
    group = parts["group of column"].long()
    if group.numel() != weight.shape[1]:
        raise ValueError(f"{group.numel()} columns are put into groups, of {weight.shape[1]}")
    if zero is not None:
        weight -= zero.float()[:, group]
    return weight.mul_(scale.float()[:, group])
