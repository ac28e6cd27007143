"""When: deadlines, back-off between attempts, and how long nodes, and pods that start, are waited for."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import takewhile

from qlora_contract.units import parse_time
from qlora_operator.api.names import ConditionType, Reason
from qlora_operator.api.status import Attempt, QLoRAJobStatus
from qlora_operator.api.v1alpha1 import QLoRAJobSpec
from qlora_operator.status import conditions

LOOK_SECONDS = 10.0
"""How often pods are looked at while an attempt starts or ends."""
UNSCHEDULED = frozenset({Reason.STEPPED_DOWN, Reason.RELEASED})
"""Ends of an attempt whose pods found no nodes: the next tier has its turn."""
DONE = frozenset({Reason.FETCHED, Reason.TRAINED, Reason.EXPORTED, Reason.SUCCEEDED})
"""Ends of an attempt that did what it was for."""
HELD = frozenset({Reason.SUSPENDED, Reason.OUTSIDE_WINDOWS})
"""Ends of an attempt whose job is suspended, by its user or by the time of day."""
NO_COST = (
    DONE | UNSCHEDULED | HELD | {Reason.REQUEUED, Reason.NOT_READY_IN_TIME, Reason.SHRUNK, Reason.FINISHED}
)
"""Ends of an attempt that cost no restart and are no failure."""
FIRST_BACKOFF_SECONDS = 10.0
MAX_BACKOFF_SECONDS = 360.0
"""As of batch/v1's own Jobs."""
FIRST_NOT_READY_SECONDS = 60.0
MAX_NOT_READY_SECONDS = 3600.0
"""As of Kueue's own Workloads (waitForPodsReady.requeuingStrategy), each of which is but one attempt of ours."""
MIN_STARTUP_GRACE = timedelta(seconds=3)
"""How long pods may take to start before they are looked at, when hardly any other attempt starts."""
MAX_STARTUP_GRACE = timedelta(seconds=60)
SHUNNED = timedelta(hours=1)
"""How long a node is left to others on which attempts of a job ended."""
LOOKS_PER_SECOND = 10
"""How often pods that do not start yet are looked at, those of all jobs together, below MAX_STARTUP_GRACE."""


def shunned(attempts: Sequence[Attempt], now: datetime) -> tuple[str, ...]:
    """Nodes that the next attempt rather leaves to others: where the kubelet refused a pod of the job, or two attempts
    ended by themselves, within the last hour. The labels say that they fit, and something else is wrong there."""
    recent = [each for each in attempts if each.node and each.end and now < parse_time(each.end) + SHUNNED]
    strikes: Counter[str] = Counter()
    for each in recent:
        strikes[each.node or ""] += 2 if each.reason == Reason.ADMISSION_REJECTED else 1
    return tuple(sorted(node for node, count in strikes.items() if count > 1))


def startup_grace(starting: int) -> timedelta:
    """How long pods may take to start, when the pods of so many attempts are not ready.

    Under load all of them take longer, and what a look finds is mostly outdated before it is written.
    """
    return min(max(MIN_STARTUP_GRACE, timedelta(seconds=starting / LOOKS_PER_SECOND)), MAX_STARTUP_GRACE)


def made_progress(attempts: Sequence[Attempt]) -> bool:
    """Whether the last of these attempts has made a checkpoint of more steps than any before it."""
    *earlier, last = attempts
    return (last.checkpoint_step or 0) > max((each.checkpoint_step or 0 for each in earlier), default=0)


def backoff(uid: str, attempts: list[Attempt]) -> float:
    """Seconds between the end of the last attempt and the next.

    The first restart in a row is prompt, since most failures are singular. From the second on: 10 s, doubled
    each time, at most 6 minutes, and up to a fifth more or less, by a hash of job and attempt: attempts that
    failed together do not come back together. An attempt that made a new checkpoint begins another row: what was in
    the way of those before it was not in its way.

    After an attempt whose pods were not ready in time for its queue: a minute, doubled each time, at most an hour.
    """
    if not_ready := len(
        list(takewhile(lambda each: each.reason == Reason.NOT_READY_IN_TIME, reversed(attempts)))
    ):
        seconds = min(FIRST_NOT_READY_SECONDS * 2.0 ** (not_ready - 1), MAX_NOT_READY_SECONDS)
        return _spread(seconds, uid, attempts)
    in_a_row = 0
    for number in range(len(attempts), 0, -1):
        if attempts[number - 1].reason in NO_COST - {Reason.RELEASED}:
            break
        in_a_row += 1
        if made_progress(attempts[:number]):
            break
    if in_a_row < 2 and not (attempts and attempts[-1].reason == Reason.RELEASED):
        return 0.0
    seconds = min(FIRST_BACKOFF_SECONDS * float(2 ** max(in_a_row - 2, 0)), MAX_BACKOFF_SECONDS)
    return _spread(seconds, uid, attempts)


def _spread(seconds: float, uid: str, attempts: Sequence[Attempt]) -> float:
    """Up to a fifth more or less."""
    return seconds * (0.8 + 0.4 * _fraction(f"{uid}/{attempts[-1].attempt}"))


def release_jitter(uid: str, attempt: int) -> float:
    """A fraction, from 0 to 1, of the time after which a half-placed attempt releases its nodes: two that block
    each other must not do so at once."""
    return _fraction(f"{attempt}/{uid}")


def _fraction(text: str) -> float:
    """From 0 to 1, the same for the same text."""
    return hashlib.sha256(text.encode()).digest()[0] / 255


def pending_since(status: QLoRAJobStatus, now: datetime) -> datetime:
    """Since when the job, unless it is suspended, has wanted ranks that do not all run."""
    found = (
        conditions.find(status.conditions, kind) for kind in (ConditionType.RUNNING, ConditionType.SUSPENDED)
    )
    times = [
        parse_time(condition.last_transition_time)
        for condition in found
        if condition is not None and condition.status == "False"
    ]
    return max(times, default=now)


def pending_deadline(spec: QLoRAJobSpec, status: QLoRAJobStatus, now: datetime) -> datetime | None:
    """When the job will have waited for its ranks for too long; None without a limit, while they run, and once they
    have trained the adapter."""
    if spec.pending_deadline_seconds is None or conditions.is_true(status.conditions, ConditionType.RUNNING):
        return None
    if status.adapter is not None:
        return None
    return pending_since(status, now) + timedelta(seconds=spec.pending_deadline_seconds)


def active_deadline(spec: QLoRAJobSpec, status: QLoRAJobStatus) -> datetime | None:
    """When the job will have been active for too long; None without a limit, while it waits in a queue, and once it has
    trained the adapter: what is verified and stored is not given up because it could not be sent in time."""
    if spec.active_deadline_seconds is None or status.start_time is None or status.adapter is not None:
        return None
    if conditions.is_false(status.conditions, ConditionType.QUOTA_RESERVED):
        return None
    return parse_time(status.start_time) + timedelta(seconds=spec.active_deadline_seconds)


def expiry(spec: QLoRAJobSpec, status: QLoRAJobStatus) -> datetime | None:
    """When a finished job is to be deleted; None if it never is."""
    if spec.ttl_seconds_after_finished is None or status.completion_time is None:
        return None
    return parse_time(status.completion_time) + timedelta(seconds=spec.ttl_seconds_after_finished)
