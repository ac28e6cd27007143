"""The schemes in which frozen linear weights are kept: what they are called, what they mean, what a weight takes.

The one table that the API, its reference, the memory estimate and the trainer's loader share. A new scheme is a name
and an entry here, and its arithmetic in `qlora_trainer.quantization.schemes`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

SchemeName = Literal["nf4", "fp4", "int8", "none"]
"""The names in the API: the keys of SCHEMES, spelled out for type checkers and for the schema of the CRD."""


class QuantizationSettings(Protocol):
    """What a scheme reads of a job's `quantization`."""

    @property
    def scheme(self) -> str:
        """A key of SCHEMES."""

    @property
    def block_size(self) -> int:
        """Weights that share one scale."""

    @property
    def double_quantization(self) -> bool:
        """Whether the scales are quantized, too."""


@dataclass(frozen=True)
class SchemeFacts:
    """What everyone but the loader needs to know of a scheme."""

    description: str
    """One line for the reference."""
    weight_bytes: Callable[[int, QuantizationSettings, int], float]
    """(weights, the job's settings, bytes of the compute dtype) -> bytes of anonymous memory that the weights take."""


def _four_bits(weights: int, settings: QuantizationSettings, _compute_bytes: int) -> float:
    """Half a byte a weight, and a scale per block: 4 bytes, or 1 byte and 4 bytes per 256 blocks when nested."""
    scale = 1 + 4 / 256 if settings.double_quantization else 4
    return weights / 2 + -(-weights // settings.block_size) * scale


SCHEMES: dict[str, SchemeFacts] = {
    "nf4": SchemeFacts("4-bit NormalFloat (Dettmers et al. 2023), bytes equal to bitsandbytes'", _four_bits),
    "fp4": SchemeFacts("4-bit floats, bytes equal to bitsandbytes'", _four_bits),
    "int8": SchemeFacts(
        "8 bits and a scale for each row",
        # 4 bytes of scale for each row; a row of the smallest models has 576 weights, so that it is less elsewhere.
        lambda weights, _settings, _compute_bytes: weights * (1 + 4 / 576),
    ),
    "none": SchemeFacts(
        "plain LoRA",
        lambda weights, _settings, compute_bytes: weights * compute_bytes,
    ),
}


def is_mapped(settings: QuantizationSettings, ranks_of_pod: int) -> bool:
    """Whether a pod's ranks map the base from one file of the workspace's cache, where it has room for it.

    That of an unquantized model is as large as the model, so it is written only where ranks share it.
    """
    return settings.scheme != "none" or ranks_of_pod > 1


def weight_bytes(weights: int, settings: QuantizationSettings, compute_bytes: int) -> int:
    """Bytes of anonymous memory that so many linear weights take.

    Args:
        weights: their number.
        settings: the job's `quantization`.
        compute_bytes: of one number of the compute dtype.

    Raises:
        KeyError: the scheme is not in SCHEMES.
    """
    return int(SCHEMES[settings.scheme].weight_bytes(weights, settings, compute_bytes))
