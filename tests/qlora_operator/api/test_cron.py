"""Cron expressions."""

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_operator.api.cron import MONTHS, WEEKDAYS, is_cron, parse_cron

At = Callable[[str], datetime]


@pytest.fixture
def at() -> At:
    """at("2026-12-01 20:00") -> that local time."""
    return datetime.fromisoformat


@pytest.mark.parametrize(
    ("expression", "before", "after"),
    [
        pytest.param("0 20 * * *", "2026-11-29 20:00", "2026-11-30 20:00", id="each evening"),
        pytest.param("0 20 * * MON-FRI", "2026-11-27 20:00", "2026-11-30 20:00", id="of working days"),
        pytest.param("0 6 * * 0", "2026-11-29 06:00", "2026-12-06 06:00", id="Sunday is 0"),
        pytest.param("0 6 * * 7", "2026-11-29 06:00", "2026-12-06 06:00", id="and 7"),
        pytest.param("0 6 * * 0-7", "2026-11-30 06:00", "2026-12-01 06:00", id="the whole week"),
        pytest.param("0 6 * * sat-Mon/2", "2026-11-30 06:00", "2026-12-05 06:00", id="a range goes round"),
        pytest.param("15,45 8-9 1 jan *", "2026-01-01 09:45", "2027-01-01 08:15", id="lists and ranges"),
        pytest.param("*/20 22-5 * * *", "2026-11-30 05:40", "2026-11-30 22:00", id="steps, over midnight"),
        pytest.param("0 8/6 * * *", "2026-11-30 08:00", "2026-11-30 14:00", id="from eight on"),
        pytest.param("0 0 13 * FRI", "2026-11-27 00:00", "2026-12-04 00:00", id="a date, or a weekday"),
        pytest.param("0 0 13 * *", "2026-11-13 00:00", "2026-12-13 00:00", id="a date"),
        pytest.param("0 0 */2 * FRI", "2026-11-27 00:00", "2026-12-11 00:00", id="a step restricts no date"),
        pytest.param("0  0 29  2 *", "2024-02-29 00:00", "2028-02-29 00:00", id="a leap day"),
        pytest.param("0 0 31 4,6,9,11 *", None, None, id="a day that no month has"),
    ],
)
def test_when_an_expression_comes(expression: str, before: str | None, after: str | None, at: At) -> None:
    """The last minute until a Monday at noon, and the first after it."""
    cron, noon = parse_cron(expression), at("2026-11-30 12:00")

    assert is_cron(expression)
    assert cron.until(noon) == (None if before is None else at(before))
    assert cron.after(noon) == (None if after is None else at(after))


def test_a_minute_has_begun_when_it_comes(at: At) -> None:
    """A minute is the last until itself, and not the first after itself."""
    cron = parse_cron("0 12 * * *")

    assert cron.until(at("2026-11-30 12:00")) == at("2026-11-30 12:00")
    assert cron.after(at("2026-11-30 12:00")) == at("2026-12-01 12:00")


@pytest.mark.parametrize(
    "text",
    ["", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *", "* * * 13 *", "* * * * 8",
     "*/0 * * * *", "1- * * * *", "1,,2 * * * *", "* * * * MONDAY", "* * MON * *", "@daily", "TZ=UTC * * * * *",
     "-1 * * * *", "* * L * *", "* * * * MON#2", " * * * * *", "*\t* * * *", "0 20 * * *\n"],
)  # fmt: skip
def test_what_is_no_expression(text: str) -> None:
    """Numbers out of bounds, seconds, macros, and what only some programs know."""
    assert not is_cron(text)


def item(first: int, last: int, names: tuple[str, ...] = ()) -> st.SearchStrategy[tuple[str, set[int]]]:
    """An item of a field, and what it means, said without the parser."""
    values = list(range(first, last + 1))

    def written(value: int) -> st.SearchStrategy[str]:
        forms = [str(value)] + ([names[value - first], names[value - first].lower()] if names else [])
        return st.sampled_from(forms)

    def walk(begin: int, end: int, step: int) -> set[int]:
        met, place = [begin], values.index(begin)
        while met[-1] != end:
            place = (place + 1) % len(values)
            met.append(values[place])
        return set(met[::step])

    single = st.sampled_from(values).flatmap(lambda v: written(v).map(lambda text: (text, {v})))
    steps = st.integers(1, 99)
    stars = st.just(("*", set(values))) | steps.map(lambda s: (f"*/{s}", set(values[::s])))
    ends = st.tuples(st.sampled_from(values), st.sampled_from(values))
    ranges = ends.flatmap(
        lambda e: st.tuples(written(e[0]), written(e[1]), steps).map(
            lambda w: (f"{w[0]}-{w[1]}/{w[2]}", walk(*e, w[2]))
        )
    )
    return single | stars | ranges


def field(first: int, last: int, names: tuple[str, ...] = ()) -> st.SearchStrategy[tuple[str, set[int]]]:
    """A field, and what it means."""
    items = st.lists(item(first, last, names), min_size=1, max_size=3)
    return items.map(lambda found: (",".join(t for t, _ in found), set().union(*(v for _, v in found))))


FIELDS = st.tuples(field(0, 59), field(0, 23), field(1, 31), field(1, 12, MONTHS), field(0, 6, WEEKDAYS))


@settings(max_examples=40, deadline=None)
@given(fields=FIELDS, minutes=st.integers(0, 3 * 525_600))
def test_no_minute_is_missed_or_made_up(fields: tuple[tuple[str, set[int]], ...], minutes: int) -> None:
    """As if every minute had been looked at, one by one."""
    expression = " ".join(text for text, _ in fields)
    in_minutes, in_hours, in_days, in_months, in_weekdays = (values for _, values in fields)
    cron, now = parse_cron(expression), datetime(2026, 1, 1) + timedelta(minutes=minutes)

    def named(at: datetime) -> bool:
        by_date, by_weekday = at.day in in_days, (at.weekday() + 1) % 7 in in_weekdays
        star = fields[2][0].startswith("*") or fields[4][0].startswith("*")
        day = by_date and by_weekday if star else by_date or by_weekday
        return at.minute in in_minutes and at.hour in in_hours and at.month in in_months and day

    looked_at = [timedelta(minutes=count) for count in range(2 * 1440)]
    later = next((now + each for each in looked_at[1:] if named(now + each)), None)
    earlier = next((now - each for each in looked_at if named(now - each)), None)
    after, until = cron.after(now), cron.until(now)

    assert is_cron(expression)
    assert after == later if later else after is None or (after > now + looked_at[-1] and named(after))
    assert until == earlier if earlier else until is None or (until < now - looked_at[-1] and named(until))
