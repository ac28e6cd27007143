"""The table of schemes: their names and what their weights take."""

from typing import get_args

import pytest

from qlora_contract.quantization import SCHEMES, SchemeName, is_mapped, weight_bytes
from qlora_contract.run_config import Quantization


@pytest.mark.parametrize(
    ("quantization", "compute_bytes", "expected"),
    [
        pytest.param(Quantization(scheme="none"), 4, 4 * 6400, id="none, fp32"),
        pytest.param(Quantization(scheme="none"), 2, 2 * 6400, id="none, bf16"),
        pytest.param(Quantization(double_quantization=False), 4, 3200 + 400, id="nf4"),
        pytest.param(Quantization(), 4, int(3200 + 100 * (1 + 4 / 256)), id="nf4, double"),
        pytest.param(
            Quantization(block_size=128), 4, int(3200 + 50 * (1 + 4 / 256)), id="nf4, blocks of 128"
        ),
        pytest.param(Quantization(scheme="fp4", double_quantization=False), 4, 3200 + 400, id="fp4"),
        pytest.param(Quantization(scheme="int8"), 4, int(6400 * (1 + 4 / 576)), id="int8"),
        pytest.param(Quantization(), 2, int(3200 + 100 * (1 + 4 / 256)), id="nf4, double, bf16"),
    ],
)
def test_weights_take_what_their_scheme_says(
    quantization: Quantization, compute_bytes: int, expected: int
) -> None:
    """6400 linear weights are 100 blocks: half a byte each and their scales, or the compute dtype's bytes."""
    assert weight_bytes(6400, quantization, compute_bytes) == expected


@pytest.mark.parametrize(
    ("scheme", "ranks", "mapped"),
    [("nf4", 1, True), ("int8", 4, True), ("none", 1, False), ("none", 2, True)],
)
def test_an_unquantized_base_is_mapped_where_ranks_share_it(scheme: str, ranks: int, mapped: bool) -> None:
    """Its file is as large as the model; a quantized one spares later starts the work."""
    assert is_mapped(Quantization.model_validate({"scheme": scheme}), ranks) == mapped


def test_a_started_block_has_a_scale() -> None:
    """65 weights are two blocks."""
    assert weight_bytes(65, Quantization(double_quantization=False), 4) == int(32.5 + 8)


def test_the_names_of_the_api_are_those_of_the_table() -> None:
    """The names spelled out for type checkers are the table's, in its order, and each is described in one line."""
    assert list(get_args(SchemeName)) == list(SCHEMES)
    assert all(facts.description and "\n" not in facts.description for facts in SCHEMES.values())


def test_the_api_takes_every_scheme_of_the_table() -> None:
    """Whatever is in the table is a job's valid quantization.scheme."""
    assert [Quantization.model_validate({"scheme": name}).scheme for name in SCHEMES] == list(SCHEMES)
