"""Frozen weights taken apart into tensors, and put together again around tensors that lie elsewhere, in a file, say.

Nothing is computed: a weight that was put together multiplies as the one that was taken apart, to the bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.kernels import library
from qlora_trainer.quantization.frozen_weight import FrozenWeight, UnquantizedWeight, check_tensor
from qlora_trainer.quantization.int8 import Int8Weight
from qlora_trainer.quantization.kernels.compiled import (
    CompiledDenseWeight,
    CompiledInt8Weight,
    CompiledNf4Weight,
)
from qlora_trainer.quantization.kernels.reference import Nf4Weight
from qlora_trainer.quantization.nf4 import FP4_LEVELS, NF4_LEVELS, NestedScales, Nf4Matrix

LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
COMPILED, REFERENCE = "compiled 4 bits", "4 bits"
COMPILED_INT8, INT8 = "compiled int8", "int8"
COMPILED_DENSE, DENSE = "compiled", "as it is"


@dataclass(frozen=True)
class Parts:
    """What a weight consists of."""

    kind: str
    """How it is put together."""
    facts: dict[str, Any]
    """What is no tensor, as JSON has it."""
    tensors: Mapping[str, Tensor]


def parts_of(weight: FrozenWeight) -> Parts:
    """What a weight consists of: its own tensors, not copies. Raises TypeError for one of another class."""
    match weight:
        case CompiledNf4Weight():
            return _four_bits(
                COMPILED, weight.codes, weight.scales, weight.shape, weight.block, weight.levels
            )
        case Nf4Weight(matrix=matrix):
            return _four_bits(
                REFERENCE, matrix.packed, matrix.scales, matrix.shape, matrix.block, matrix.levels
            )
        case CompiledInt8Weight():
            tensors = {"codes": weight.codes, "scales": weight.scales}
            return Parts(COMPILED_INT8, {"shape": list(weight.shape)}, tensors)
        case Int8Weight():
            return Parts(INT8, {}, {"codes": weight.codes, "absmax": weight.absmax})
        case CompiledDenseWeight():
            return Parts(COMPILED_DENSE, {"shape": list(weight.shape)}, {"numbers": weight.numbers})
        case UnquantizedWeight():
            return Parts(DENSE, {}, {"numbers": weight.tensor})
    raise TypeError(f"{type(weight).__name__} cannot be taken apart")


def weight_of(parts: Parts) -> FrozenWeight:
    """The weight of these parts, which takes them over.

    Raises:
        KeyError: a part is missing, or the kind is unknown.
        ValueError: the parts do not fit each other, or the kernel library that made them does not run here.
    """
    tensors, facts = parts.tensors, parts.facts
    if parts.kind == INT8:
        check_tensor("codes", tensors["codes"], torch.int8, tuple(tensors["codes"].shape))
        check_tensor("absmax", tensors["absmax"], torch.float32, tuple(tensors["codes"].shape[:1]))
        return Int8Weight(tensors["codes"], tensors["absmax"])
    if parts.kind == DENSE:
        if (dim := tensors["numbers"].dim()) != 2:
            raise ValueError(f"a weight has two dimensions, not {dim}")
        return UnquantizedWeight(tensors["numbers"])
    rows, columns = facts["shape"]
    if parts.kind == COMPILED_DENSE:
        return CompiledDenseWeight(tensors["numbers"], (rows, columns), _loaded())
    if parts.kind == COMPILED_INT8:
        return CompiledInt8Weight(tensors["codes"], tensors["scales"], (rows, columns), _loaded())
    scales: Tensor | NestedScales = (
        tensors["scales"]
        if "scales" in tensors
        else NestedScales(tensors["scale_codes"], tensors["scale_absmax"], tensors["scale_offset"])
    )
    block, levels = int(facts["block"]), LEVELS[facts["levels"]]
    if parts.kind == REFERENCE:
        check_tensor("codes", tensors["codes"], torch.uint8, (-(-rows * columns // 2),))
        return Nf4Weight(Nf4Matrix(tensors["codes"], scales, (rows, columns), block, levels))
    if parts.kind != COMPILED:
        raise KeyError(parts.kind)
    return CompiledNf4Weight(tensors["codes"], scales, (rows, columns), block, levels, _loaded())


def _loaded() -> library.Library:
    loaded = library.loaded()
    if loaded is None:
        raise ValueError("the kernel library does not run here")
    return loaded


def _four_bits(
    kind: str,
    codes: Tensor,
    scales: Tensor | NestedScales,
    shape: tuple[int, int],
    block: int,
    levels: Tensor,
) -> Parts:
    name = next(name for name, known in LEVELS.items() if known is levels)
    tensors = {"codes": codes}
    if isinstance(scales, NestedScales):
        tensors |= {
            "scale_codes": scales.codes,
            "scale_absmax": scales.absmax,
            "scale_offset": scales.offset,
        }
    else:
        tensors["scales"] = scales
    return Parts(kind, {"shape": list(shape), "block": block, "levels": name}, tensors)
