"""Kubernetes quantities."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_operator.api.quantity import is_plausible_memory, parse_memory, parse_quantity


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
        ("0.00000000000000000001P", 1),
        ("1.0000000000000000000Pi", 2**50),
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
    with pytest.raises(ValueError, match="is not a quantity of memory such as 16Gi"):
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
        ("67108863.5", False),
        ("67108863.9999999999", True),
        ("16Gi", True),
        ("64Ti", True),
        ("65Ti", False),
    ],
)
def test_implausible_amounts_are_told_from_plausible_ones(quantity: str, plausible: bool) -> None:
    """A forgotten suffix gives less than any rank could run in."""
    assert is_plausible_memory(quantity) is plausible


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [
        ("3920m", Fraction(392, 100)),
        ("4", 4),
        ("0.5", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("+5", 5),
        ("-5", -5),
        ("100n", Fraction(1, 10**7)),
        ("100u", Fraction(1, 10**4)),
        ("1.5Gi", 3 * 2**29),
        ("129e6", 129 * 10**6),
        ("129E6", 129 * 10**6),
        ("12e-1", Fraction(12, 10)),
        ("12e+1", 120),
        ("12E", 12 * 10**18),
        ("12Ei", 12 * 2**60),
        ("16Ki", 2**14),
        ("7Mi", 7 * 2**20),
        ("128974848", 128974848),
        ("123456789012345678901234567890m", Fraction(123456789012345678901234567890, 1000)),
    ],
)
def test_every_form_of_the_api_server_is_read(quantity: str, expected: Fraction) -> None:
    """Binary and decimal suffixes, thousandths and exponents mean exactly their number."""
    assert parse_quantity(quantity) == expected


@pytest.mark.parametrize(
    "quantity",
    [
        "",
        ".",
        "m",
        "Gi",
        "1.2.3",
        "1 Gi",
        "1gi",
        "1K",
        "1mi",
        "1e",
        "1e6Gi",
        "1e999999999",
        "٣",
        "4\n",
        "1" * 65,
    ],
)
def test_what_is_no_quantity_is_refused(quantity: str) -> None:
    """The error shows it, and no exponent makes a number that fills the memory."""
    with pytest.raises(ValueError, match=r"is not a quantity such as 4, 3920m, 16Gi or 129e6"):
        parse_quantity(quantity)


@given(st.text(alphabet="0123456789.+-eEmkKMGTPinu \n", max_size=12))
def test_any_text_is_a_number_or_refused(text: str) -> None:
    """Nothing but ValueError is raised, and no number is larger than its form can mean."""
    try:
        number = parse_quantity(text)
    except ValueError:
        return

    assert abs(number) < 10**112


@given(st.integers(0, 10**9), st.sampled_from(["", "k", "M", "G", "Ki", "Mi", "Gi"]))
def test_a_user_s_memory_means_what_the_api_server_takes_it_for(number: int, suffix: str) -> None:
    """Both readings of a quantity agree."""
    assert parse_memory(f"{number}{suffix}") == parse_quantity(f"{number}{suffix}")
