"""Which implementation multiplies with quantized weights."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernel_tiers import library_of
from qlora_contract.quantization import SCHEMES
from qlora_trainer.kernels import library
from qlora_trainer.kernels.library import KERNELS_ENV, Library
from qlora_trainer.quantization import kernels
from qlora_trainer.quantization.frozen_weight import UnquantizedWeight
from qlora_trainer.quantization.int8 import Int8Weight, quantize_int8
from qlora_trainer.quantization.kernels import reference
from qlora_trainer.quantization.kernels.compiled import (
    CompiledDenseWeight,
    CompiledInt8Weight,
    CompiledNf4Weight,
)
from qlora_trainer.quantization.nf4 import Nf4Matrix, quantize_nf4

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def chosen_anew() -> Iterator[None]:
    """Each test chooses for itself, and leaves nothing chosen."""
    caches = (library.loaded, kernels.name, kernels.is_right, kernels._log_misfit)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> Library:
    """The library, forced to a tier that any processor has."""
    found = library_of("avx2")
    monkeypatch.setenv(KERNELS_ENV, "avx2")
    return found


@pytest.mark.parametrize(
    ("scheme", "compiled"), [*((scheme, True) for scheme in SCHEMES), ("unheard of", False)]
)
def test_the_choice_is_logged_once(
    scheme: str, compiled: bool, avx2: Library, caplog: pytest.LogCaptureFixture
) -> None:
    """However often it is asked for, the implementation is the same, and is logged at the first time only. What a
    checkpoint records has the library's tier and build."""
    with caplog.at_level("INFO"):
        names = {kernels.name(scheme) for _ in range(3)}

    expected = f"avx2/{avx2.build}" if compiled else "reference"
    assert names == {expected}
    assert caplog.messages == ["kernels: avx2 (by QLORA_KERNELS)", f"kernels of {scheme} weights: {expected}"]


def test_without_the_library_the_reference_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loader gets is the reference's weight, with the quantizer's own bytes in it."""
    monkeypatch.setenv(KERNELS_ENV, "reference")
    matrix = quantize_nf4(torch.randn(4, 64), double=True, name="w")
    weight = kernels.nf4_weight(matrix)

    assert isinstance(weight, reference.Nf4Weight)
    assert weight.matrix is matrix
    assert isinstance(kernels.int8_weight(quantize_int8(torch.randn(4, 64), name="w")), Int8Weight)
    assert isinstance(kernels.dense_weight(torch.randn(4, 64), torch.float32), UnquantizedWeight)
    assert {kernels.name(scheme) for scheme in SCHEMES} == {"reference"}


@pytest.mark.parametrize("shape", [(5, 96), (1, 1), (70, 33)], ids=str)
def test_of_8_bits_and_of_unquantized_weights_every_shape_fits(avx2: Library, shape: tuple[int, int]) -> None:
    """Their rows have no blocks. What is computed in float64, as checks of gradients do, is left to plain torch."""
    tensor = torch.randn(shape)

    assert isinstance(kernels.int8_weight(quantize_int8(tensor, name="w")), CompiledInt8Weight)
    assert isinstance(kernels.dense_weight(tensor, torch.bfloat16), CompiledDenseWeight)
    assert isinstance(kernels.dense_weight(tensor, torch.float64), UnquantizedWeight)


def test_shapes_that_do_not_fit_are_left_to_the_reference(
    avx2: Library, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows must begin with a block of their own; each shape that does not fit is logged once."""
    fitting = quantize_nf4(torch.randn(5, 128), double=True, name="w")
    others = [quantize_nf4(torch.randn(5, 96), double=True, name="w") for _ in range(3)]
    with caplog.at_level("INFO"):
        assert isinstance(kernels.nf4_weight(fitting), CompiledNf4Weight)
        assert {type(kernels.nf4_weight(other)) for other in others} == {reference.Nf4Weight}

    assert [line for line in caplog.messages if "reference for" in line] == [
        "kernels: reference for 4-bit weights of 5 x 96: the kernel library needs rows that are a multiple of 64 long"
    ]


def test_a_tile_unit_that_multiplies_wrongly_is_not_used(
    avx2: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried first; then plain torch runs, a checkpoint records that, and the log says why."""
    found = replace(avx2, tier="amx_bf16")
    monkeypatch.setattr(library, "loaded", lambda: found)
    monkeypatch.setattr(kernels, "agree", lambda one, other: (one, other.tier) != (found, "amx_emulated"))

    assert isinstance(kernels.nf4_weight(reference_matrix()), reference.Nf4Weight)
    assert isinstance(kernels.dense_weight(torch.randn(4, 64), torch.bfloat16), UnquantizedWeight)
    assert kernels.name("nf4") == kernels.name("none") == "reference"
    assert sum("tile unit multiplies otherwise" in message for message in caplog.messages) == 1


def test_products_of_two_tiers_are_told_apart_where_they_differ(
    avx2: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding is no difference; a bias that nobody asked for is."""
    emulated = library_of("amx_emulated")
    assert kernels.agree(avx2, emulated)

    linear = CompiledNf4Weight.linear

    def wrong(weight: CompiledNf4Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = linear(weight, x, bias)
        return y.roll(1, dims=1) if weight._call is compiled_call else y

    compiled_call = CompiledNf4Weight.of_matrix(reference_matrix(), emulated)._call
    monkeypatch.setattr(CompiledNf4Weight, "linear", wrong)
    assert not kernels.agree(avx2, emulated)


def reference_matrix() -> Nf4Matrix:
    """A small matrix of a shape that fits, quantized by plain torch."""
    return quantize_nf4(torch.randn(4, 64), double=True, name="w")
