"""When: deadlines, back-off between attempts, and how long nodes, and pods that start, are waited for."""

import hashlib
from datetime import datetime, timedelta

from qlora_operator.api.names import ConditionType, Reason
from qlora_operator.api.times import parse
from qlora_operator.api.types import Attempt, QLoRAJobSpec, QLoRAJobStatus
from qlora_operator.status import conditions

GAVE_UP = frozenset({Reason.STEPPED_DOWN, Reason.RELEASED})
"""Ends of an attempt whose pods found no room: the next tier has its turn."""
DONE = frozenset({Reason.FETCHED, Reason.TRAINED, Reason.SUCCEEDED})
"""Ends of an attempt that did what it was to do."""
FREE = DONE | {Reason.SUSPENDED, Reason.STEPPED_DOWN, Reason.RELEASED, Reason.FINISHED}
"""Ends of an attempt that cost nothing and are no failure."""
FIRST_BACKOFF_SECONDS = 10.0
MAX_BACKOFF_SECONDS = 360.0
"""As of batch/v1's own Jobs."""
PATIENCE = timedelta(seconds=3)
"""How long pods may take to start before anybody looks why, when no other gang starts."""
MAX_PATIENCE = timedelta(seconds=60)
LOOKS_PER_SECOND = 10
"""How often pods that do not start yet are looked at, those of all jobs together, as long as patience lasts."""


def patience(starting: int) -> timedelta:
    """How long pods may take to start, when so many gangs have pods that are not up: in a rush all of them take
    longer, and what is looked at then is mostly no longer so when it is written."""
    return min(max(PATIENCE, timedelta(seconds=starting / LOOKS_PER_SECOND)), MAX_PATIENCE)


def backoff(uid: str, attempts: list[Attempt]) -> float:
    """Seconds between the end of the last attempt and the next.

    The first restart in a row is prompt, since most failures are singular. From the second on: 10 s, doubled
    each time, at most 6 minutes, and up to a fifth more or less, by a hash of job and attempt: gangs that
    failed together do not come back together.
    """
    row = _in_a_row(attempts)
    if row < 2 and not (attempts and attempts[-1].reason == Reason.RELEASED):
        return 0.0
    seconds = min(FIRST_BACKOFF_SECONDS * float(2 ** max(row - 2, 0)), MAX_BACKOFF_SECONDS)
    return seconds * _jitter(uid, attempts[-1].attempt)


def _in_a_row(attempts: list[Attempt]) -> int:
    """Attempts at the end of the list that failed, or had to let go of what they held."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.reason in FREE - {Reason.RELEASED}:
            break
        count += 1
    return count


def _jitter(uid: str, attempt: int) -> float:
    """From 0.8 to 1.2, the same for the same job and attempt."""
    digest = hashlib.sha256(f"{uid}/{attempt}".encode()).digest()
    return 0.8 + 0.4 * digest[0] / 255


def released_spread(uid: str, attempt: int) -> float:
    """A share, from 0 to 1, of the time after which a half-placed gang lets go: two that block each other
    must not do so at once."""
    return hashlib.sha256(f"{attempt}/{uid}".encode()).digest()[0] / 255


def pending_since(status: QLoRAJobStatus, now: datetime) -> datetime:
    """Since when the job, unless it is suspended, wants ranks and has not had all of them."""
    said = (
        conditions.find(status.conditions, kind) for kind in (ConditionType.RUNNING, ConditionType.SUSPENDED)
    )
    times = [parse(each.last_transition_time) for each in said if each is not None and each.status == "False"]
    return max(times, default=now)


def pending_deadline(spec: QLoRAJobSpec, status: QLoRAJobStatus, now: datetime) -> datetime | None:
    """When the job will have waited for its ranks for too long; None without a limit, and while they run."""
    if spec.pending_deadline_seconds is None or conditions.is_true(status.conditions, ConditionType.RUNNING):
        return None
    return pending_since(status, now) + timedelta(seconds=spec.pending_deadline_seconds)


def active_deadline(spec: QLoRAJobSpec, status: QLoRAJobStatus) -> datetime | None:
    """When the job will have been active for too long; None without a limit, and while it waits in a queue."""
    if spec.active_deadline_seconds is None or status.start_time is None:
        return None
    if conditions.is_false(status.conditions, ConditionType.QUOTA_RESERVED):
        return None
    return parse(status.start_time) + timedelta(seconds=spec.active_deadline_seconds)


def expiry(spec: QLoRAJobSpec, status: QLoRAJobStatus) -> datetime | None:
    """When a finished job is to be deleted."""
    if spec.ttl_seconds_after_finished is None or status.completion_time is None:
        return None
    return parse(status.completion_time) + timedelta(seconds=spec.ttl_seconds_after_finished)
