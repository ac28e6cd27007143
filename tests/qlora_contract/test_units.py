"""How numbers, times and errors are written for people."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from qlora_contract import units


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 2**20, "10.0 MiB"),
        (440 * 2**20, "440 MiB"),
        (1000 * 2**20, "1000 MiB"),
        (1_300_000_000, "1.21 GiB"),
        (6 * 2**30, "6.00 GiB"),
        (16 * 2**30, "16.0 GiB"),
        (9_996 * 2**30 // 1000, "10.0 GiB"),
        (2**30 - 1, "1.00 GiB"),
        (1023 * 2**40, "1023 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_bytes_are_three_digits_of_the_largest_unit_they_fill(count: int, text: str) -> None:
    """Small counts are exact, and a count that rounds up to 1024 of a unit is one of the next."""
    assert units.format_bytes(count) == text


@pytest.mark.parametrize(
    ("done", "total", "text"),
    [
        (0, 512, "0 of 512 bytes"),
        (0, 8 * 2**30, "0.00 of 8.00 GiB"),
        (2**28, 2**30, "0.25 of 1.00 GiB"),
        (123 * 2**20, 456 * 2**20, "123 of 456 MiB"),
    ],
)
def test_a_part_is_in_the_unit_of_the_whole(done: int, total: int, text: str) -> None:
    """Both numbers can be compared at a glance."""
    assert units.format_bytes_done(done, total) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m 00s"),
        (552, "9m 12s"),
        (3599.9, "59m 59s"),
        (7500, "2h 05m"),
        (86_399, "23h 59m"),
        (273_600, "3d 04h"),
    ],
)
def test_a_duration_is_its_two_largest_units(seconds: float, text: str) -> None:
    """Hours do not hide the minutes, and days do not show the seconds."""
    assert units.format_duration(seconds) == text


def test_times_are_utc_and_whole_seconds_as_kubernetes_writes_them() -> None:
    """A time of another zone is converted, and what is written can be read back."""
    time = datetime(2026, 1, 31, 10, 30, 0, 999_999, timezone(timedelta(hours=1)))

    assert units.rfc3339(time) == "2026-01-31T09:30:00Z"
    assert units.parse_time("2026-01-31T09:30:00Z") == datetime(2026, 1, 31, 9, 30, tzinfo=UTC)


def test_now_is_between_before_and_after() -> None:
    """It is the machine's clock, cut to whole seconds."""
    before = datetime.now(UTC).replace(microsecond=0)

    assert before <= units.parse_time(units.now()) <= datetime.now(UTC)


def test_a_text_that_is_not_a_time_is_refused() -> None:
    """The caller decides what a damaged stamp means."""
    with pytest.raises(ValueError, match="yesterday"):
        units.parse_time("yesterday")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("what is wrong\nand a page of advice"), "what is wrong"),
        (ValueError("\n  first words\n"), "first words"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_the_first_line_of_an_error_stands_for_it(error: Exception, line: str) -> None:
    """An error without a message is named by its class."""
    assert units.first_line(error) == line
