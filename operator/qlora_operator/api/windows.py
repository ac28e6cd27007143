"""When a job may run, by spec.schedule.

A window is a piece of local time, and becomes one of real time at its edges alone. An edge that the clock skips in
spring comes when it has skipped it, and one that comes twice in autumn counts the first time.
"""

import heapq
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from qlora_operator.api.cron import parse_cron
from qlora_operator.api.v1alpha1 import Schedule, Window

UTC_ZONE = "UTC"
IN_SIGHT = timedelta(days=8)
"""How far ahead the end of windows is looked for that follow each other without a gap: most schedules repeat within a
week."""
MAX_MERGED = 1500
"""Windows that are put together at most: a day of minutes."""
NO_ZONES = frozenset({"localtime", "posixrules", "Factory"})
"""Files beside the time zones, which each machine fills as it likes."""
UNKNOWN_LOOK = timedelta(hours=1)
"""When to look again at windows without an end in sight. MAX_MERGED of them reach farther."""


class Span(NamedTuple):
    """A time in which the job may run."""

    start: datetime
    end: datetime | None
    """None: not in sight."""


class _Piece(NamedTuple):
    start: datetime
    end: datetime


def schedule_fault(schedule: Schedule) -> tuple[str, str] | None:
    """What is wrong with a schedule that the API has accepted, as (field path, message); None if nothing is."""
    try:
        _zone(schedule)
    except (LookupError, ValueError, OSError):
        return "spec.schedule.timeZone", (
            f"{schedule.time_zone} is no time zone that is known here; it must be one of the IANA database, such as "
            "Europe/Berlin"
        )
    for number, window in enumerate(schedule.windows):
        for field, expression in (("start", window.start), ("end", window.end)):
            if expression is not None and parse_cron(expression).after(datetime(2000, 1, 1)) is None:
                return f"spec.schedule.windows[{number}].{field}", (
                    f"{expression} names no day that there is; the fields are minute, hour, day of the month, month, "
                    "day of the week"
                )
    return None


def spans(schedule: Schedule, now: datetime) -> Iterator[Span]:
    """The times from now on in which the job may run, in order and apart from each other: as a rule without an end. The
    first may have begun; when exactly is not looked for.

    Args:
        schedule: one without a `schedule_fault`.
        now: aware of its zone.
    """
    current: _Piece | None = None
    merged = 0
    for piece in heapq.merge(*(_pieces(window, _zone(schedule), now) for window in schedule.windows)):
        if current is None:
            current = piece
        elif piece.start > current.end:
            yield Span(*current)
            current, merged = piece, 0
        else:
            current, merged = _Piece(current.start, max(current.end, piece.end)), merged + 1
            if merged > MAX_MERGED or current.end - max(current.start, now) > IN_SIGHT:
                yield Span(current.start, None)
                return
    if current is not None:
        yield Span(*current)


def in_zone(schedule: Schedule, at: datetime) -> str:
    """A time as the schedule's clock shows it, RFC 3339."""
    return at.astimezone(_zone(schedule)).isoformat(timespec="seconds")


def _zone(schedule: Schedule) -> ZoneInfo:
    name = schedule.time_zone or UTC_ZONE
    if name in NO_ZONES:
        raise ValueError(name)
    return ZoneInfo(name)


def _pieces(window: Window, zone: ZoneInfo, now: datetime) -> Iterator[_Piece]:
    """The times of one window that are not over, by their starts."""
    start, end = parse_cron(window.start), None if window.end is None else parse_cron(window.end)
    at: datetime | None = _last_start(window, zone, now)
    while at is not None:
        begins = _comes(at, zone)
        if end is None:
            ends = begins + timedelta(seconds=window.duration_seconds or 0)
        else:
            closing = end.after(at)
            if closing is None:  # not in the next eight years
                return
            ends = _comes(closing, zone)
        if ends > max(begins, now):  # the clock may have skipped all of it
            yield _Piece(begins, ends)
        at = start.after(at)


def _last_start(window: Window, zone: ZoneInfo, now: datetime) -> datetime | None:
    """The local time of the last start that has come, else of the next."""
    start, local = parse_cron(window.start), now.astimezone(zone)
    # In the hour that comes twice the clock has already shown later times than it shows now.
    turned = (local.replace(fold=0).utcoffset() or timedelta()) - (local.utcoffset() or timedelta())
    shown = local.replace(tzinfo=None, fold=0)
    found = start.until(shown + max(turned, timedelta()))
    while found is not None and _comes(found, zone) > now:
        found = start.until(found - timedelta(minutes=1))
    return found or start.after(shown)


def _comes(local: datetime, zone: ZoneInfo) -> datetime:
    """When the clock shows this local time first, or has skipped it; UTC."""
    while True:
        found = local.replace(tzinfo=zone).astimezone(UTC)
        if found.astimezone(zone).replace(tzinfo=None, fold=0) == local:
            return found
        local += timedelta(minutes=1)
