"""Others' words in a status."""

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.progress import ProgressReport, RankFacts
from qlora_operator.status.quote import QUOTED_CHARACTERS, last_line, presentable, quote


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        ("", ""),
        ("two\n lines\t", "two lines"),
        ("\x1b[1;31mred\x1b[0m and\x07 bell", "red and bell"),
        ("left\u202eto right", "left to right"),
        ("Speicher für 大", "Speicher für 大"),
        ("x" * (QUOTED_CHARACTERS + 1), "x" * (QUOTED_CHARACTERS - 1) + "…"),
        ("x" * QUOTED_CHARACTERS, "x" * QUOTED_CHARACTERS),
    ],
    ids=["nothing", "lines", "terminal", "bidirectional", "letters", "long", "just-right"],
)
def test_quote(words: str, quoted: str) -> None:
    """Words become one printable line of bounded length, and stay what they are otherwise."""
    assert quote(words) == quoted


@given(st.text(max_size=2 * QUOTED_CHARACTERS))
def test_quote_any(words: str) -> None:
    """Whatever is said, the quote fits, can be printed, and is its own quote."""
    quoted = quote(words)
    assert len(quoted) <= QUOTED_CHARACTERS
    assert not [each for each in quoted if unicodedata.category(each).startswith("C")]
    assert quote(quoted) == quoted


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
def test_last_line(words: str, line: str) -> None:
    """The last line of a log that says anything."""
    assert last_line(words) == line


def test_what_is_told_is_presentable() -> None:
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

    shown = presentable(told)

    assert (shown.loss, shown.eval_loss, shown.compute_dtype) == (None, 1.5, "bf16")
    assert shown.ranks[0].host == "h ost"
    assert len(shown.ranks[0].isa) == QUOTED_CHARACTERS
