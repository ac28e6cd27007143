"""When a job may run: windows, and clocks that are turned."""

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_operator.api.cron import parse_cron
from qlora_operator.api.v1alpha1 import Schedule
from qlora_operator.api.windows import in_zone, schedule_fault, spans

QUARTER = timedelta(minutes=15)


def schedule(*windows: Any, zone: str | None = "Europe/Berlin") -> Schedule:
    """A schedule of windows, each (start, end) or (start, seconds)."""
    made = [
        {"start": start, **({"end": end} if isinstance(end, str) else {"durationSeconds": end})}
        for start, end in windows
    ]
    return Schedule.model_validate({"timeZone": zone, "windows": made})


def utc(text: str) -> datetime:
    """A time in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


NIGHTS = ("0 20 * * *", "0 6 * * *")
HOURS = ("0 20 * * *", 10 * 3600)


@pytest.mark.parametrize(
    ("windows", "now", "expected"),
    [
        pytest.param([NIGHTS], "2026-12-01 12:00", ["12-01 19:00 12-02 05:00", "12-02 19:00 12-03 05:00"],
                     id="by day"),
        pytest.param([NIGHTS], "2026-12-01 23:00", ["12-01 19:00 12-02 05:00", "12-02 19:00 12-03 05:00"],
                     id="by night"),
        pytest.param([NIGHTS], "2026-12-01 19:00", ["12-01 19:00 12-02 05:00"], id="it opens"),
        pytest.param([NIGHTS], "2026-12-02 05:00", ["12-02 19:00 12-03 05:00"], id="it closes"),
        pytest.param(
            [("0 20 * * MON-THU", "0 6 * * *"), ("0 20 * * FRI", "0 6 * * MON")], "2026-12-04 12:00",
            ["12-04 19:00 12-07 05:00", "12-07 19:00 12-08 05:00"], id="nights and weekends"),
        pytest.param(
            [("0 0 * * SAT,SUN", "0 0 * * *")], "2026-12-04 12:00",
            ["12-04 23:00 12-06 23:00", "12-11 23:00 12-13 23:00"], id="days that meet are one"),
        pytest.param(
            [("0 20 * * *", 7200), ("0 21 * * *", 7200)], "2026-12-01 12:00",
            ["12-01 19:00 12-01 22:00", "12-02 19:00 12-02 22:00"], id="windows that overlap are one"),
        pytest.param([("* * * * *", 60)], "2026-12-01 12:00", ["12-01 12:00 -"], id="always open, minute by minute"),
        pytest.param([("0 0 * * *", 86400)], "2026-12-01 12:00", ["11-30 23:00 -"], id="always open, day by day"),
        pytest.param(
            [("* 20-21 * * *", 60)], "2026-12-01 12:00",
            ["12-01 19:00 12-01 21:00", "12-02 19:00 12-02 21:00"], id="written minute by minute"),
        # The clock is turned from 02:00 to 03:00 on 29 March 2026, and from 03:00 to 02:00 on 25 October.
        pytest.param([NIGHTS], "2026-03-28 12:00", ["03-28 19:00 03-29 04:00", "03-29 18:00 03-30 04:00"],
                     id="a night of nine hours, by the clock"),
        pytest.param([NIGHTS], "2026-10-24 12:00", ["10-24 18:00 10-25 05:00", "10-25 19:00 10-26 05:00"],
                     id="a night of eleven hours, by the clock"),
        pytest.param([HOURS], "2026-03-28 12:00", ["03-28 19:00 03-29 05:00", "03-29 18:00 03-30 04:00"],
                     id="ten hours whatever the clock shows, in spring"),
        pytest.param([HOURS], "2026-10-24 12:00", ["10-24 18:00 10-25 04:00", "10-25 19:00 10-26 05:00"],
                     id="ten hours whatever the clock shows, in autumn"),
        pytest.param([("30 2 * * *", "30 4 * * *")], "2026-03-29 00:00", ["03-29 01:00 03-29 02:30"],
                     id="a start that is skipped comes when the clock was turned"),
        pytest.param([("0 2 * * *", "0 3 * * *")], "2026-03-28 12:00", ["03-30 00:00 03-30 01:00"],
                     id="a window that is skipped does not come"),
        pytest.param([("30 2 * * *", "0 5 * * *")], "2026-10-25 01:15", ["10-25 00:30 10-25 04:00"],
                     id="a start that comes twice came the first time"),
        pytest.param([("0 20 * * *", "30 2 * * *")], "2026-10-25 01:15", ["10-25 19:00 10-26 01:30"],
                     id="an end that comes twice came the first time"),
        pytest.param([("15 2 * * *", "45 2 * * *")], "2026-10-25 01:20", ["10-26 01:15 10-26 01:45"],
                     id="a window that comes twice came the first time"),
    ],
)  # fmt: skip
def test_when_a_job_may_run(windows: list[Any], now: str, expected: list[str]) -> None:
    """In Berlin, told in UTC; the first window may have begun."""

    def told(at: datetime | None) -> str:
        return "-" if at is None else at.astimezone(UTC).strftime("%m-%d %H:%M")

    found = itertools.islice(spans(schedule(*windows), utc(now)), len(expected))

    assert [f"{told(start)} {told(end)}" for start, end in found] == expected


def test_without_a_time_zone_the_clock_is_utc() -> None:
    """Not the operator's own clock."""
    (first, *_) = itertools.islice(spans(schedule(NIGHTS, zone=None), utc("2026-12-01 12:00")), 1)

    assert first == (utc("2026-12-01 20:00"), utc("2026-12-02 06:00"))
    assert in_zone(schedule(NIGHTS), first.start) == "2026-12-01T21:00:00+01:00"


def test_windows_whose_end_never_comes_again_are_none() -> None:
    """A leap day that is a Sunday is rarer than eight years: nothing waits for it in a loop."""
    assert list(spans(schedule(("0 0 29 2 */7", "0 1 * * *")), utc("2033-01-01 00:00"))) == []


@pytest.mark.parametrize(
    ("windows", "zone", "phrase"),
    [
        ([NIGHTS], "Europe/Berlin", None),
        ([NIGHTS], None, None),
        ([NIGHTS], "Europe/Berln", "Europe/Berln is no time zone"),
        ([NIGHTS], "Europe", "Europe is no time zone"),
        ([NIGHTS], "CEST", "CEST is no time zone"),
        ([NIGHTS], "localtime", "localtime is no time zone"),  # a file that machines have beside the zones
        ([NIGHTS, ("0 0 30 2 *", 60)], None, "windows[1].start: 0 0 30 2 * names no day"),
        ([("0 0 1 1 *", "0 0 31 6 *")], None, "windows[0].end: 0 0 31 6 * names no day"),
    ],
)
def test_what_the_api_server_cannot_know(windows: list[Any], zone: str | None, phrase: str | None) -> None:
    """Time zones and days that there are not are told in a sentence."""
    fault = schedule_fault(schedule(*windows, zone=zone))

    assert (phrase or "") in ": ".join(fault or ())
    assert (fault is None) == (phrase is None)


# --- as if somebody had watched the clock, minute by minute

TURNS = {
    "Europe/Berlin": ("2026-03-29 01:00", "2026-10-25 01:00"),
    "America/New_York": ("2026-03-08 07:00", "2026-11-01 06:00"),
    "Australia/Lord_Howe": ("2026-10-03 15:30", "2026-04-04 15:00"),  # half an hour
    "America/Santiago": ("2026-09-06 04:00", "2026-04-05 03:00"),  # at midnight
    "Asia/Kathmandu": ("2026-03-29 00:00",),  # never, and 5:45 from UTC
    "UTC": ("2026-03-29 01:00",),
}
times = st.sampled_from(
    ["0 1", "30 1", "0 2", "15 2", "30 2", "0 3", "30 23", "0 0", "45 0", "0 12", "*/30 *"]
)
crons = st.builds(lambda time, day: f"{time} * * {day}", times, st.sampled_from(["*", "SUN", "SAT-MON"]))
closings = crons | st.sampled_from([900, 3600, 36_000])


def names(expression: str, at: datetime) -> bool:
    """Whether an expression names this local time."""
    cron = parse_cron(expression)
    return cron.matches(at.date()) and at.hour in cron.hours and at.minute in cron.minutes


def watched(start: str, closing: str | int, zone: ZoneInfo, begin: datetime, end: datetime) -> Iterator[bool]:
    """Whether the window is open, each quarter of an hour: somebody looks at the clock and crosses off each time of day
    once it is reached or skipped, and none twice."""
    crossed_off = begin.astimezone(zone).replace(tzinfo=None, fold=0)
    is_open, until, at = False, begin, begin
    while at < end:
        shown = at.astimezone(zone).replace(tzinfo=None, fold=0)
        while crossed_off < shown:
            crossed_off += QUARTER
            if isinstance(closing, str) and names(closing, crossed_off):
                is_open = False
            if names(start, crossed_off):
                is_open, until = True, at + timedelta(seconds=closing if isinstance(closing, int) else 0)
        yield is_open if isinstance(closing, str) else at < until
        at += QUARTER


@settings(max_examples=60, deadline=None)
@given(
    turn=st.sampled_from([(zone, at) for zone, found in TURNS.items() for at in found]),
    windows=st.lists(st.tuples(crons, closings), min_size=1, max_size=2),
    look=st.integers(0, 95),
)
def test_windows_are_as_on_a_clock_that_somebody_watches(
    turn: tuple[str, str], windows: list[tuple[str, str | int]], look: int
) -> None:
    """Around the hour in which a clock is turned, or on any other day: who looks at any time finds a window open just
    when it is, and is told when that changes."""
    zone, middle = turn[0], utc(turn[1])
    now = middle + (look - 48) * QUARTER
    begin, end = middle - timedelta(days=9), now + timedelta(days=1)
    clocks = zip(
        *(watched(start, closing, ZoneInfo(zone), begin, end) for start, closing in windows), strict=True
    )
    known = [any(each) for each in clocks][-96:]
    found = list(
        itertools.takewhile(lambda span: span.start < end, spans(schedule(*windows, zone=zone), now))
    )

    def is_open(at: datetime) -> bool:
        return any(span.start <= at and (span.end is None or at < span.end) for span in found)

    assert [is_open(now + count * QUARTER) for count in range(96)] == known
    assert all(one.end is None or one.end < other.start for one, other in itertools.pairwise(found))
