"""The kernels of frozen weights: the one place that says which implementation runs.

A kernel is a FrozenWeight of its own, made of a scheme's numbers when a model is loaded: thus it may keep them in the
order that it multiplies in. `compiled` is chosen where the kernel library is there and the weight fits, else plain
torch, called `reference`; never by timing them in the run: the choice must be the same after a restart.
"""

import functools
import logging
from dataclasses import replace

import torch
from torch import Tensor

from qlora_trainer.kernels import library
from qlora_trainer.quantization.frozen_weight import FrozenWeight, LowRank, UnquantizedWeight
from qlora_trainer.quantization.int8 import Int8Weight
from qlora_trainer.quantization.kernels import compiled, reference
from qlora_trainer.quantization.nf4 import Nf4Matrix, quantize_nf4

log = logging.getLogger(__name__)

COMPILED_SCHEMES = {"nf4", "fp4", "int8", "none"}
"""Schemes whose weights the kernel library multiplies with."""


@functools.cache
def name(scheme: str) -> str:
    """The implementation that multiplies with weights of a scheme on this processor: `reference` is plain torch.

    Else tier and build of the kernel library. Chosen once in a process, and logged then. A checkpoint records it, since
    a resume is bit-exact only under the same.

    Raises:
        ConfigurationError: QLORA_KERNELS names what cannot run here.
    """
    found = usable()
    chosen = found.name if found and scheme in COMPILED_SCHEMES else library.REFERENCE
    log.info("kernels of %s weights: %s", scheme, chosen)
    return chosen


def usable() -> library.Library | None:
    """The library, where it is there and multiplies rightly."""
    found = library.loaded()
    return found if found and is_right(found) else None


def nf4_weight(matrix: Nf4Matrix) -> FrozenWeight:
    """The weight (out, in) in the form of the implementation that runs. Takes the matrix over."""
    found = usable()
    if found is None:
        return reference.Nf4Weight(matrix)
    if not compiled.fits(matrix):
        _log_misfit(matrix.shape, matrix.block)
        return reference.Nf4Weight(matrix)
    return compiled.CompiledNf4Weight.of_matrix(matrix, found)


def int8_weight(weight: Int8Weight) -> FrozenWeight:
    """The same of 8 bits: every shape fits."""
    found = usable()
    return weight if found is None else compiled.CompiledInt8Weight.of_weight(weight, found)


def dense_weight(tensor: Tensor, dtype: torch.dtype) -> FrozenWeight:
    """A copy of a tensor (out, in) in the compute dtype, in the form of the implementation that runs."""
    found = usable()
    if found is None or dtype not in compiled.DENSE_TYPES:
        return UnquantizedWeight(tensor.to(dtype, copy=True))
    return compiled.CompiledDenseWeight.of_tensor(tensor.to(dtype), found)


def tensor_weight(tensor: Tensor, dtype: torch.dtype) -> compiled.CompiledTensor | None:
    """A tensor (out, in) itself as a weight, for products in `dtype`; None: plain torch is to multiply."""
    found = usable()
    types = compiled.DENSE_TYPES
    if found is None or dtype not in types or tensor.dtype not in types or not tensor.is_contiguous():
        return None
    return compiled.CompiledTensor(tensor, found)


@functools.cache
def is_right(found: library.Library) -> bool:
    """Whether the library multiplies rightly here. Where it uses the tile unit, a small product is tried first.

    A unit that is not what its emulation is (a hypervisor's, say) must not train anybody's adapter.
    """
    if found.tier != "amx_bf16":
        return True
    right = agree(found, replace(found, tier=library.EMULATED))
    if not right:
        log.warning(
            "kernels: the tile unit multiplies otherwise than its emulation; plain torch runs instead"
        )
    return right


def agree(one: library.Library, other: library.Library) -> bool:
    """Whether two tiers give the same products in bf16, forward and backward, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    matrix = quantize_nf4(torch.randn(80, 192, generator=generator), double=True, name="a trial")
    x = torch.randn(70, 192, generator=generator).bfloat16()
    dy = torch.randn(70, 80, generator=generator).bfloat16()
    low_rank = LowRank(torch.randn(8, 192, generator=generator), torch.randn(80, 8, generator=generator), 0.5)

    def products(tier: library.Library) -> Tensor:
        weight = compiled.CompiledNf4Weight.of_matrix(matrix, tier)
        results = [weight.linear(x, None), weight.linear_grad_input(dy)]
        results += weight.linear_with(x, None, low_rank, None)
        results += weight.linear_grad_input_with(dy, low_rank, added=True)
        results.append(weight.sum_of_outer(x, results[3], 1.0, transposed=False))
        # Each counts as much as the others, and as a whole: a product whose sum is nearly 0 is mostly rounding.
        return torch.cat([(result.float() / result.float().norm()).flatten() for result in results])

    return float((products(one) - products(other)).norm()) < 0.01


@functools.cache
def _log_misfit(shape: tuple[int, int], block: int) -> None:
    log.info(
        "kernels: reference for 4-bit weights of %d x %d: the kernel library needs rows that are a multiple of %d long",
        *shape, block,
    )  # fmt: skip
