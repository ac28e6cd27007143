"""Quantities of memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_operator.api.quantity import is_plausible_memory, parse_memory


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [
        ("16Gi", 16 * 2**30),
        ("16G", 16 * 10**9),
        ("512Mi", 512 * 2**20),
        ("900M", 900 * 10**6),
        ("1.5Gi", 3 * 2**29),
        ("0.1", 1),
        ("17179869184", 2**34),
        ("2Ti", 2**41),
        ("1Pi", 2**50),
        ("1P", 10**15),
        ("4096Ki", 2**22),
        ("8k", 8000),
        ("0Gi", 0),
    ],
)
def test_a_quantity_is_a_number_of_bytes(quantity: str, expected: int) -> None:
    """Each suffix has Kubernetes' factor, and a part of a byte counts as a whole one."""
    assert parse_memory(quantity) == expected


@pytest.mark.parametrize(
    "quantity",
    [
        "",
        "Gi",
        "16GB",
        "16gi",
        "16 Gi",
        "-1Gi",
        "+1Gi",
        "100m",
        "1e9",
        "1.Gi",
        ".5Gi",
        "1.2.3Gi",
        "16Gi\n",
        "٣Gi",
        "1" * 25,
    ],
)
def test_anything_else_is_refused(quantity: str) -> None:
    """What is no quantity of memory, or counts thousandths of a byte, raises an error that shows it."""
    with pytest.raises(ValueError, match="is no quantity of memory such as 16Gi"):
        parse_memory(quantity)


@given(st.integers(1, 10**6), st.sampled_from(["Ki", "Mi", "Gi", "Ti"]))
def test_a_suffix_is_worth_1024_of_the_one_before(number: int, suffix: str) -> None:
    """N of a suffix are 1024 N of the next smaller one."""
    smaller = {"Ki": "", "Mi": "Ki", "Gi": "Mi", "Ti": "Gi"}[suffix]

    assert parse_memory(f"{number}{suffix}") == parse_memory(f"{number * 1024}{smaller}")


@pytest.mark.parametrize(
    ("quantity", "plausible"),
    [
        ("16", False),
        ("0", False),
        ("63Mi", False),
        ("64Mi", True),
        ("16Gi", True),
        ("64Ti", True),
        ("65Ti", False),
    ],
)
def test_implausible_amounts_are_told_from_plausible_ones(quantity: str, plausible: bool) -> None:
    """A forgotten suffix gives less than any rank could run in."""
    assert is_plausible_memory(quantity) is plausible
