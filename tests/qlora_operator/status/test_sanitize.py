"""Text of others in a status."""

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.progress import ProgressReport, RankFacts
from qlora_operator.status.sanitize import MAX_CHARACTERS, last_line, sanitize, sanitized


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        ("", ""),
        ("two\n lines\t", "two lines"),
        ("\x1b[1;31mred\x1b[0m and\x07 bell", "red and bell"),
        ("left\u202eto right", "left to right"),
        ("Speicher für 大", "Speicher für 大"),
        ("x" * (MAX_CHARACTERS + 1), "x" * (MAX_CHARACTERS - 1) + "…"),
        ("x" * MAX_CHARACTERS, "x" * MAX_CHARACTERS),
    ],
    ids=["nothing", "lines", "terminal", "bidirectional", "letters", "long", "just-right"],
)
def test_text_becomes_one_printable_line(words: str, quoted: str) -> None:
    """Words become one printable line of bounded length, and stay what they are otherwise."""
    assert sanitize(words) == quoted


@given(st.text(max_size=2 * MAX_CHARACTERS))
def test_any_text_fits_and_can_be_printed(words: str) -> None:
    """Whatever is said, the quote fits, can be printed, and is its own quote."""
    quoted = sanitize(words)
    assert len(quoted) <= MAX_CHARACTERS
    assert not [each for each in quoted if unicodedata.category(each).startswith("C")]
    assert sanitize(quoted) == quoted


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", ""),
        ("\n \n", ""),
        ("first\nlast", "last"),
        ("last\n\x1b[0m\n\n", "last"),
        ("10 %\r 20 %\r 30 %", "30 %"),
    ],
    ids=["nothing", "blank", "two", "colour-after", "progress-bar"],
)
def test_the_last_line_that_is_not_empty(words: str, line: str) -> None:
    """The last line of a log that says anything."""
    assert last_line(words) == line


def test_a_report_is_sanitized_throughout() -> None:
    """Every text of a report is quoted, however deep, and a number that no JSON holds is left out."""
    told = ProgressReport(
        job_uid="uid",
        attempt=0,
        stage="Training",
        step=1,
        total_steps=2,
        epoch=0.5,
        loss=math.nan,
        eval_loss=1.5,
        compute_dtype="\x1b[31mbf16\x1b[0m\n",
        ranks=[RankFacts(rank=0, host="h\x00ost", isa="x" * 1000, cpus="0", threads=1)],
        updated_time="2026-01-31T12:00:00Z",
    )

    shown = sanitized(told)

    assert (shown.loss, shown.eval_loss, shown.compute_dtype) == (None, 1.5, "bf16")
    assert shown.ranks[0].host == "h ost"
    assert len(shown.ranks[0].isa) == MAX_CHARACTERS
