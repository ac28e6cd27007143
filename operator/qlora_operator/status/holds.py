"""What suspends a job: its user, or the time of day."""

from dataclasses import dataclass
from datetime import datetime

from qlora_contract.units import parse_time, rfc3339
from qlora_operator.api.names import Reason
from qlora_operator.api.status import WindowStatus
from qlora_operator.api.v1alpha1 import QLoRAJobSpec, Schedule
from qlora_operator.api.windows import UNKNOWN_LOOK, in_zone, schedule_fault, spans


@dataclass(frozen=True)
class Hold:
    """Why a job that is not over has no pods."""

    reason: Reason
    """Of the condition Suspended, and of the end of an attempt."""
    why: str
    """The condition's message."""
    message: str
    """The job's, and an Event's."""


def hold(spec: QLoRAJobSpec, now: datetime) -> Hold | None:
    """What suspends the job now; the user goes first."""
    if spec.suspend:
        return Hold(Reason.SUSPENDED, "spec.suspend is true", "held by spec.suspend")
    if spec.schedule is None:
        return None
    window = window_status(spec.schedule, now)
    if window is not None and window.open:
        return None
    if window is None:
        path, message = schedule_fault(spec.schedule) or ("", "")
        why = f"suspended until {path} is corrected: {message}"
    elif window.until is None:
        why = "spec.schedule has no window in the next eight years"
    else:
        why = f"outside the windows of spec.schedule until {in_zone(spec.schedule, parse_time(window.until))}"
    return Hold(Reason.OUTSIDE_WINDOWS, why, why)


def resumed(spec: QLoRAJobSpec, held_by: str) -> tuple[Reason, str]:
    """Why a job that was held for this reason no longer is: the condition's reason and message."""
    if held_by == Reason.SUSPENDED:
        return Reason.RESUMED, "spec.suspend is false again"
    if spec.schedule is None:
        return Reason.RESUMED, "spec.schedule was removed"
    return Reason.WINDOW_OPEN, "a window of spec.schedule is open"


def window_status(schedule: Schedule, now: datetime) -> WindowStatus | None:
    """Whether a window is open, and until when; None for a schedule that cannot be followed."""
    if schedule_fault(schedule) is not None:
        return None
    span = next(spans(schedule, now), None)
    if span is None:
        return WindowStatus(open=False)
    is_open = span.start <= now
    until = span.end if is_open else span.start
    return WindowStatus(open=is_open, until=None if until is None else rfc3339(until))


def column(schedule: Schedule, window: WindowStatus) -> str:
    """`closed until 2026-12-01T20:00:00+01:00`, for `kubectl get`."""
    state = "open" if window.open else "closed"
    return state if window.until is None else f"{state} until {in_zone(schedule, parse_time(window.until))}"


def look_at(window: WindowStatus, now: datetime) -> datetime | None:
    """When a window opens, closes, or may close."""
    if window.until is not None:
        return parse_time(window.until)
    return now + UNKNOWN_LOOK if window.open else None
