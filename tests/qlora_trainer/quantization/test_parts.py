"""Frozen weights taken apart and put together again."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernel_tiers import running
from qlora_contract.run_config import Quantization
from qlora_trainer.kernels.library import REFERENCE
from qlora_trainer.quantization.frozen_weight import FrozenWeight, UnquantizedWeight, UnreadWeight
from qlora_trainer.quantization.int8 import Int8Weight
from qlora_trainer.quantization.kernels.compiled import (
    CompiledDenseWeight,
    CompiledInt8Weight,
    CompiledNf4Weight,
)
from qlora_trainer.quantization.kernels.reference import Nf4Weight
from qlora_trainer.quantization.parts import Parts, parts_of, weight_of
from qlora_trainer.quantization.schemes import IMPLEMENTATIONS, Fp4, Int8, Nf4, Scheme, Unquantized, scheme_of

pytestmark = pytest.mark.process

SCHEMES: dict[str, Scheme] = {
    "nf4": Nf4(double=False),
    "nf4-double": Nf4(double=True),
    "nf4-128": Nf4(double=True, block=128),
    "fp4-double": Fp4(double=True),
    "int8": Int8(),
    "none": Unquantized(),
}


def _made(scheme: Scheme, rows: int = 80, columns: int = 192) -> FrozenWeight:
    generator = torch.Generator().manual_seed(rows)
    return scheme.freeze("w", torch.randn(rows, columns, generator=generator), torch.float32)


def _results(weight: FrozenWeight) -> list[Tensor]:
    """All that is ever asked of a weight, of its shape."""
    generator = torch.Generator().manual_seed(1)
    out, in_ = weight.shape
    x, dy = torch.randn(7, in_, generator=generator), torch.randn(7, out, generator=generator)
    return [weight.dequantize(torch.float32), weight.linear(x, None), weight.linear_grad_input(dy)]


@pytest.mark.parametrize("tier", [REFERENCE, "avx2"])
@pytest.mark.parametrize(("rows", "columns"), [(80, 256), (64, 128), (3, 100)])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_a_weight_that_was_put_together_is_the_same_to_the_bit(
    scheme: Scheme, rows: int, columns: int, tier: str
) -> None:
    """Of every scheme, by the library and in plain torch, also where the shape does not fit the library."""
    with running(tier):
        weight = _made(scheme, rows, columns)
        parts = parts_of(weight)
        again = weight_of(replace(parts, tensors={name: t.clone() for name, t in parts.tensors.items()}))

    assert type(again) is type(weight)
    assert (again.shape, again.nbytes) == (weight.shape, weight.nbytes)
    for found, expected in zip(_results(again), _results(weight), strict=True):
        assert torch.equal(found, expected)


def test_parts_are_the_weights_own_memory() -> None:
    """Nothing is copied, neither way: a mapped file stays mapped."""
    for scheme in SCHEMES.values():
        parts = parts_of(_made(scheme))
        again = parts_of(weight_of(parts))

        assert {name: t.data_ptr() for name, t in again.tensors.items()} == {
            name: t.data_ptr() for name, t in parts.tensors.items()
        }


def _cut(name: str) -> Callable[[Parts], Parts]:
    return lambda parts: replace(parts, tensors={**parts.tensors, name: parts.tensors[name][1:]})


def _of_type(name: str, dtype: torch.dtype) -> Callable[[Parts], Parts]:
    return lambda parts: replace(parts, tensors={**parts.tensors, name: parts.tensors[name].to(dtype)})


@pytest.mark.parametrize("tier", [REFERENCE, "avx2"])
@pytest.mark.parametrize(
    ("scheme", "change"),
    [
        ("nf4", _cut("codes")),
        ("int8", _cut("codes")),
        ("int8", _of_type("codes", torch.int16)),
        ("nf4", _of_type("codes", torch.int16)),
        ("none", lambda parts: replace(parts, tensors={"numbers": parts.tensors["numbers"].flatten()})),
    ],
)
def test_parts_that_do_not_fit_are_refused(scheme: str, change: Callable[[Parts], Parts], tier: str) -> None:
    """They are never multiplied with."""
    with running(tier), pytest.raises(ValueError, match=r"belongs|two dimensions"):
        weight_of(change(parts_of(_made(SCHEMES[scheme]))))


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("nf4-double", "scale_codes"),
        ("nf4-double", "scale_absmax"),
        ("int8", "scales"),
        ("none", "numbers"),
    ],
)
def test_scales_past_whose_end_the_library_would_read_are_refused(scheme: str, name: str) -> None:
    """And so are scales of another shape than the matrix's."""
    with running("avx2"):
        parts = parts_of(_made(SCHEMES[scheme]))
        with pytest.raises(ValueError, match="belongs"):
            weight_of(_cut(name)(parts))
        with pytest.raises(ValueError, match="belongs"):
            weight_of(replace(parts, facts={**parts.facts, "shape": [80, 256]}))


def test_what_the_library_made_needs_the_library() -> None:
    """Where it does not run, its order of codes means nothing."""
    with running("avx2"):
        parts = parts_of(_made(SCHEMES["nf4"]))
    with running(REFERENCE), pytest.raises(ValueError, match="does not run here"):
        weight_of(parts)


def test_every_scheme_can_be_taken_apart() -> None:
    """By a job's settings."""
    for scheme in IMPLEMENTATIONS:
        settings = Quantization.model_validate({"scheme": scheme})
        weight = _made(scheme_of(settings))
        assert torch.equal(
            weight_of(parts_of(weight)).dequantize(torch.float32), weight.dequantize(torch.float32)
        )


def test_kinds_are_told_apart() -> None:
    """By what multiplies; what nobody knows is refused."""
    with running("avx2"):
        assert isinstance(weight_of(parts_of(_made(SCHEMES["nf4"]))), CompiledNf4Weight)
        assert isinstance(weight_of(parts_of(_made(SCHEMES["int8"]))), CompiledInt8Weight)
        assert isinstance(weight_of(parts_of(_made(SCHEMES["none"]))), CompiledDenseWeight)
    with running(REFERENCE):
        assert isinstance(weight_of(parts_of(_made(SCHEMES["nf4"]))), Nf4Weight)
        assert isinstance(weight_of(parts_of(_made(SCHEMES["int8"]))), Int8Weight)
        assert isinstance(weight_of(parts_of(_made(SCHEMES["none"]))), UnquantizedWeight)
    with pytest.raises(TypeError):
        parts_of(UnreadWeight(lambda: torch.zeros(2, 2), (2, 2), 16))
    with pytest.raises(KeyError):
        weight_of(replace(parts_of(_made(SCHEMES["nf4"])), kind="other"))
