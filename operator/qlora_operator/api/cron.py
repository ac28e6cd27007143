"""Cron expressions, over the local time of a clock that is never turned.

When a local time comes is for windows.py to say. Libraries mix the two: around the hour that comes twice their next
time may lie in the past.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta

MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
WEEKDAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
MAX_CRON = 256
"""Characters."""

_SEARCHED = 366 * 8 + 2
"""Days that are looked at for the next match: between two 29 February lie eight years at most."""


@dataclass(frozen=True)
class _Field:
    """One of the five fields: its values, and how they are written."""

    values: range
    number: str
    names: tuple[str, ...] = ()
    """Of the values, in their order."""

    @property
    def pattern(self) -> str:
        words = "".join(f"|{''.join(f'[{c}{c.lower()}]' for c in name)}" for name in self.names)
        value = f"({self.number}{words})"
        item = f"([*]|{value}(-{value})?)(/[1-9][0-9]?)?"
        return f"{item}(,{item})*"

    def parse(self, text: str) -> frozenset[int]:
        return frozenset(value for item in text.split(",") for value in self._parse_item(item))

    def _parse_item(self, item: str) -> Iterator[int]:
        what, _, step = item.partition("/")
        begin, _, end = what.partition("-")
        first, last = self.values[0], self.values[-1]
        if what != "*":
            first = self._value(begin)
            # `8/2` means from 8 on.
            last = self._value(end) if end else last if step else first
        # A range may go round: `FRI-MON`, `22-5`. So does `SUN-7`, which is the whole week.
        length = last - first + (len(self.values) if last < first else 0)
        for count in range(0, length + 1, int(step or 1)):
            yield (first + count - self.values.start) % len(self.values) + self.values.start

    def _value(self, text: str) -> int:
        name = text.upper()
        return self.names.index(name) + self.values.start if name in self.names else int(text)


_FIELDS = (
    _Field(range(60), "[0-5]?[0-9]"),
    _Field(range(24), "[01]?[0-9]|2[0-3]"),
    _Field(range(1, 32), "0?[1-9]|[12][0-9]|3[01]"),
    _Field(range(1, 13), "0?[1-9]|1[0-2]", MONTHS),
    _Field(range(7), "[0-7]", WEEKDAYS),  # Sunday is 0 and 7
)
CRON_PATTERN = f"^{' +'.join(field.pattern for field in _FIELDS)}$"
"""Minute, hour, day of the month, month, day of the week: all that matches has a meaning."""


@dataclass(frozen=True)
class Cron:
    """The minutes that an expression names."""

    minutes: tuple[int, ...]
    """In order, as are the hours."""
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    """0 is Sunday."""
    either_day: bool
    """A day matches by its date or by its weekday, as in cron where both are restricted; otherwise by both."""

    def matches(self, day: date) -> bool:
        """Whether any minute of the day is named."""
        by_date, by_weekday = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        by_day = by_date or by_weekday if self.either_day else by_date and by_weekday
        return by_day and day.month in self.months

    def after(self, at: datetime) -> datetime | None:
        """The first minute after this local time; None if there is none in the next eight years."""
        return next((found for found in self._minutes(at, 1) if found > at), None)

    def until(self, at: datetime) -> datetime | None:
        """The last minute that has begun by this local time; None if there was none in the last eight years."""
        return next((found for found in self._minutes(at, -1) if found <= at), None)

    def _minutes(self, at: datetime, step: int) -> Iterator[datetime]:
        """From the hour of this time on, or back."""
        for count in range(_SEARCHED):
            day = at.date() + timedelta(days=count * step)
            if self.matches(day):
                for hour in self.hours[::step]:
                    if count or (hour - at.hour) * step >= 0:
                        yield from (
                            datetime.combine(day, time(hour, minute)) for minute in self.minutes[::step]
                        )


def is_cron(text: str) -> bool:
    """Whether it is an expression."""
    return re.fullmatch(CRON_PATTERN[1:-1], text) is not None


@functools.lru_cache(maxsize=1024)
def parse_cron(expression: str) -> Cron:
    """What an expression names."""
    assert is_cron(expression), "the API has checked it"
    fields = expression.split()
    minutes, hours, days, months, weekdays = (
        field.parse(text) for field, text in zip(_FIELDS, fields, strict=True)
    )
    # As in cron: `*/2` is no restriction.
    either_day = not (fields[2].startswith("*") or fields[4].startswith("*"))
    return Cron(tuple(sorted(minutes)), tuple(sorted(hours)), days, months, weekdays, either_day)
