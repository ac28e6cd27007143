"""The schemes of qlora_contract.quantization at work: a tensor of the checkpoint becomes a weight to multiply with."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qlora_contract.quantization import QuantizationSettings
from qlora_trainer.errors import ModelError
from qlora_trainer.quantization import kernels
from qlora_trainer.quantization.frozen_weight import FrozenWeight, UnquantizedWeight
from qlora_trainer.quantization.int8 import quantize_int8
from qlora_trainer.quantization.nf4 import BLOCK, FP4_LEVELS, quantize_nf4


class Scheme(Protocol):
    """How linear weights are kept."""

    def freeze(self, name: str, tensor: Tensor, dtype: torch.dtype) -> FrozenWeight:
        """Make a weight of a tensor of the checkpoint, one at a time.

        Args:
            name: of the tensor, for errors.
            tensor: (out, in), any float dtype, mapped from its file: what is kept of it must be a copy.
            dtype: what is computed in.

        Raises:
            ModelError: the numbers cannot be kept so, such as NaN.
        """


@dataclass(frozen=True)
class Nf4:
    """4-bit NormalFloat."""

    double: bool
    """The scales are quantized, too."""
    block: int = BLOCK
    """Weights that share a scale."""

    def freeze(self, name: str, tensor: Tensor, _dtype: torch.dtype) -> FrozenWeight:
        """(out, in) -> 4 bits a number and the scales."""
        return kernels.nf4_weight(quantize_nf4(tensor, double=self.double, name=name, block=self.block))


@dataclass(frozen=True)
class Fp4:
    """4-bit floats."""

    double: bool
    """The scales are quantized, too."""
    block: int = BLOCK
    """Weights that share a scale."""

    def freeze(self, name: str, tensor: Tensor, _dtype: torch.dtype) -> FrozenWeight:
        """(out, in) -> 4 bits a number and the scales."""
        matrix = quantize_nf4(tensor, double=self.double, name=name, block=self.block, levels=FP4_LEVELS)
        return kernels.nf4_weight(matrix)


@dataclass(frozen=True)
class Int8:
    """8 bits, a scale for each row."""

    def freeze(self, name: str, tensor: Tensor, _dtype: torch.dtype) -> FrozenWeight:
        """(out, in) -> 8 bits a number and a scale for each row."""
        return kernels.int8_weight(quantize_int8(tensor, name=name))


@dataclass(frozen=True)
class Unquantized:
    """In the compute dtype."""

    def freeze(self, name: str, tensor: Tensor, dtype: torch.dtype) -> FrozenWeight:
        """(out, in) -> a copy in `dtype`."""
        return kernels.dense_weight(finite(name, tensor), dtype)


@dataclass(frozen=True)
class AsStored:
    """As the file has it, mapped and not copied: for one pass over the unquantized base, not for training."""

    def freeze(self, _name: str, tensor: Tensor, _dtype: torch.dtype) -> FrozenWeight:
        """(out, in) -> the very tensor; whether it is finite is not looked at, which would read the whole file."""
        return UnquantizedWeight(tensor)


IMPLEMENTATIONS: dict[str, Callable[[QuantizationSettings], Scheme]] = {
    "nf4": lambda settings: Nf4(settings.double_quantization, settings.block_size),
    "fp4": lambda settings: Fp4(settings.double_quantization, settings.block_size),
    "int8": lambda _settings: Int8(),
    "none": lambda _settings: Unquantized(),
}
"""By the names of qlora_contract.quantization.SCHEMES: what makes the scheme of a job's settings."""


def scheme_of(settings: QuantizationSettings) -> Scheme:
    """The scheme that a job's `quantization` asks for. Raises KeyError for one that is not in IMPLEMENTATIONS."""
    return IMPLEMENTATIONS[settings.scheme](settings)


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself. Raises ModelError, with its name, if it holds NaN or infinite numbers."""
    low, high = torch.aminmax(tensor)  # NaN if any is; isfinite(tensor) would make copies of it
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ModelError(f"{name} holds NaN or infinite numbers")
    return tensor
