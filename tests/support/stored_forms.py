"""Models stored in the forms that are read: writers of each, which remember what every weight is worth.

Integers are drawn first and scaled then, so that the value of a weight never comes from code that unpacks.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_folders import configure

Encoded = tuple[dict[str, Tensor], Tensor]
"""Ending of a name -> what is stored; the float32 weight (out, in) that it means."""


@dataclass(frozen=True)
class Form:
    """A form of safetensors."""

    settings: dict[str, Any]
    """config.json's quantization_config."""
    encode: Callable[[Tensor], Encoded]
    """Of a weight (out, in)."""
    says: str
    """A part of its description."""


def words(numbers: Tensor, bits: int) -> Tensor:
    """Unsigned numbers (rows, n) -> int32 (rows, n * bits / 32), rounded up, the first in the lowest bits."""
    each = 32 // bits
    filled = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[1] % each))
    shifted = filled.view(len(numbers), -1, each) << (torch.arange(each) * bits)
    return torch.from_numpy(shifted.sum(-1).numpy().astype(np.uint32).view(np.int32))


def fp8(rows: int, columns: int, name: str) -> Callable[[Tensor], Encoded]:
    """Blocks of so many rows and columns; 0: all."""

    def encode(weight: Tensor) -> Encoded:
        down, across = rows or len(weight), columns or weight.shape[1]
        blocks = [-(-len(weight) // down), -(-weight.shape[1] // across)]
        scale = torch.rand(blocks) / 64 + 1 / 256
        wide = torch.empty_like(weight)
        for row in range(len(weight)):
            for column in range(weight.shape[1]):
                wide[row, column] = scale[row // down, column // across]
        codes = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {".weight": codes, name: scale[0, 0] if blocks == [1, 1] else scale}, codes.float() * wide

    return encode


def compressed(bits: int, group: int, *, symmetric: bool) -> Callable[[Tensor], Encoded]:
    """compressed-tensors' packed integers."""

    def encode(weight: Tensor) -> Encoded:
        half = 1 << (bits - 1)
        count = weight.shape[1] // group
        codes = torch.randint(-half, half, weight.shape)
        scale = (torch.rand(len(weight), count) / 64).bfloat16()
        zero = torch.zeros_like(scale) if symmetric else torch.randint(-half, half, scale.shape)
        stored = {
            ".weight_packed": words(codes + half, bits),
            ".weight_scale": scale,
            ".weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            stored[".weight_zero_point"] = words(zero.t() + half, bits).t().contiguous()
        grouped = codes.float().view(len(weight), count, group)
        worth = (grouped - zero.float()[..., None]) * scale.float()[..., None]
        return stored, worth.view(weight.shape)

    return encode


def int8_rows(weight: Tensor) -> Encoded:
    """compressed-tensors' int8, a scale for each row."""
    codes, scale = torch.randint(-128, 128, weight.shape, dtype=torch.int8), torch.rand(len(weight), 1) / 900
    return {".weight": codes, ".weight_scale": scale}, codes.float() * scale


def four_bits(kind: str, *, nested: bool) -> Callable[[Tensor], Encoded]:
    """By bitsandbytes itself."""

    def encode(weight: Tensor) -> Encoded:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(
            weight.bfloat16(), quant_type=kind, blocksize=64, compress_statistics=nested
        )
        stored = {f".weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        # In one row: where rows do not begin with a block, bitsandbytes 0.50 takes wrong scales on a CPU.
        state.dtype, state.shape = torch.float32, torch.Size((1, weight.numel()))
        return stored | {".weight": packed}, dequantize_4bit(packed, state).view(weight.shape)

    return encode


def eight_bits(weight: Tensor) -> Encoded:
    """bitsandbytes' int8, the largest magnitude of each row stored."""
    codes, largest = torch.randint(-127, 128, weight.shape, dtype=torch.int8), torch.rand(len(weight))
    stored = {".weight": codes, ".SCB": largest, ".weight_format": torch.zeros((), dtype=torch.uint8)}
    return stored, codes.float() * largest[:, None] * (1 / 127)


def gptq(*, layout: str, by_importance: bool) -> Callable[[Tensor], Encoded]:
    """4 bits in groups of 32 inputs, which act-order spreads over the row."""

    def encode(weight: Tensor) -> Encoded:
        out, in_ = weight.shape
        codes, zeros = torch.randint(0, 16, (in_, out)), torch.randint(1, 16, (in_ // 32, out))
        scales, group = (torch.rand(in_ // 32, out) / 64).half(), torch.arange(in_) // 32
        if by_importance:
            group = group[torch.randperm(in_)]
        stored = {
            ".qweight": words(codes.t(), 4).t().contiguous(),
            ".qzeros": words(zeros - 1 if layout == "gptq" else zeros, 4),
            ".scales": scales,
            ".g_idx": group.int(),
        }
        return stored, ((codes - zeros[group]).float() * scales.float()[group]).t().contiguous()

    return encode


def awq(weight: Tensor) -> Encoded:
    """4 bits in groups of 32 inputs; the columns of a word in AWQ's order."""
    out, in_ = weight.shape
    codes, zeros = torch.randint(0, 16, (in_, out)), torch.randint(0, 16, (in_ // 32, out))
    scales = (torch.rand(in_ // 32, out) / 64).half()
    stored = {".qweight": _interleaved(codes), ".qzeros": _interleaved(zeros), ".scales": scales}
    worth = (codes - zeros.repeat_interleave(32, 0)).float() * scales.float().repeat_interleave(32, 0)
    return stored, worth.t().contiguous()


def _interleaved(numbers: Tensor) -> Tensor:
    order = numbers.view(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    return words(order.reshape(numbers.shape), 4)


def _group(**weights: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


FORMS: dict[str, Form] = {
    "fp8 blocks": Form(
        {"quant_method": "fp8", "weight_block_size": [32, 32]}, fp8(32, 32, ".weight_scale_inv"), "32 x 32"
    ),
    "fp8 blocks cut off": Form(
        {"quant_method": "fp8", "weight_block_size": [48, 40]}, fp8(48, 40, ".weight_scale_inv"), "48 x 40"
    ),
    "fp8 tensors": Form({"quant_method": "fp8", "weight_block_size": None}, fp8(0, 0, ".weight_scale_inv"), "FP8"),
    "fbgemm": Form({"quant_method": "fbgemm_fp8"}, fp8(1, 0, ".weight_scale"), "FP8"),
    "compressed fp8 rows": Form(
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": _group(type="float", num_bits=8, strategy="channel"),
        },
        fp8(1, 0, ".weight_scale"),
        "float8 by channel",
    ),
    "compressed fp8 blocks": Form(
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": _group(type="float", num_bits=8, strategy="block", block_structure=[48, 40]),
        },
        fp8(48, 40, ".weight_scale"),
        "float8 by block",
    ),
    "compressed int8": Form(
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": _group(type="int", num_bits=8, strategy="channel"),
        },
        int8_rows,
        "int8 by channel",
    ),
    "compressed int4": Form(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": _group(type="int", num_bits=4, strategy="group", group_size=32),
        },
        compressed(4, 32, symmetric=True),
        "int4 in groups of 32",
    ),
    "compressed int4, zeros": Form(
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        compressed(4, 16, symmetric=False),
        "compressed-tensors",
    ),
    "compressed packed int8": Form(
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        compressed(8, 32, symmetric=False),
        "compressed-tensors",
    ),
    "bitsandbytes nf4": Form(
        {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}, four_bits("nf4", nested=False), "nf4"
    ),
    "bitsandbytes nf4, nested": Form(
        {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        four_bits("nf4", nested=True),
        "nf4, double quantization",
    ),
    "bitsandbytes fp4": Form(
        {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}, four_bits("fp4", nested=True), "fp4"
    ),
    "bitsandbytes int8": Form({"quant_method": "bitsandbytes", "load_in_8bit": True}, eight_bits, "8 bits"),
    "gptq": Form(
        {"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq(layout="gptq", by_importance=True), "GPTQ, 4 bits"
    ),
    "gptq_v2": Form(
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        gptq(layout="gptq_v2", by_importance=False),
        "GPTQ, 4 bits",
    ),
    "awq": Form({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq, "AWQ"),
}  # fmt: skip


def store(folder: Path, form: Form) -> dict[str, Tensor]:
    """Store a folder's linear layers in a form, in place; the float32 weights that they now mean, by path."""
    torch.manual_seed(5)
    tensors, worth = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        path = name.removesuffix(".weight")
        stored, worth[path] = form.encode(tensors.pop(name).float())
        tensors |= {path + ending: tensor.contiguous() for ending, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    configure(folder, quantization_config=form.settings)
    return worth


def plain_twin(folder: Path, target: Path, worth: dict[str, Tensor]) -> Path:
    """The model that a folder stores in some form, unquantized in another folder."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    stored = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] not in worth}
    kept = {name: t for name, t in kept.items() if not any(name.startswith(f"{path}.") for path in worth)}
    save_file(
        kept | {f"{path}.weight": w for path, w in worth.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    return target
