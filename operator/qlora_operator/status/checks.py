"""What checks return. A check is a pure function of a JobView; None means that it has nothing to say."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from qlora_operator.api.names import Reason
from qlora_operator.status.actions import Action
from qlora_operator.status.view import JobView


class Budget(StrEnum):
    """What the end of an attempt costs."""

    NONE = "none"
    """Nothing: no one is at fault."""
    USER = "user"
    """One of the restarts in spec.backoffLimit."""
    INFRASTRUCTURE = "infrastructure"
    """One of the restarts in spec.infrastructureBackoffLimit."""
    PERMANENT = "permanent"
    """The job: another attempt would end the same way."""


@dataclass(frozen=True)
class AttemptEnd:
    """Why an attempt is over, or must be."""

    reason: Reason
    message: str
    budget: Budget
    exit_codes: tuple[int, ...] = ()
    node: str | None = None
    """Of the pod that failed by itself, or that the kubelet refused."""
    placed: int | None = None
    """Pods that the next attempt makes do with."""
    workload: str | None = None
    """Kueue's Workload that the next attempt takes over."""


@dataclass(frozen=True)
class NotYet:
    """Not now, but perhaps then: when to look again."""

    at: datetime


@dataclass(frozen=True)
class Blocked:
    """What keeps the next attempt from starting."""

    look_at: datetime
    """When to look again."""
    reason: Reason | None = None
    """Of the condition Initialized. None: nothing is said."""
    message: str = ""
    event: bool = True
    """Whether a new reason is worth an Event."""
    actions: tuple[Action, ...] = ()
    """What removes the obstacle."""


EndCheck = Callable[[JobView], AttemptEnd | NotYet | None]
StartCheck = Callable[[JobView], Blocked | None]


def first_end(view: JobView, checks: Iterable[EndCheck]) -> AttemptEnd | NotYet | None:
    """The first end that a check finds; else the earliest time at which one may."""
    soonest: NotYet | None = None
    for check in checks:
        found = check(view)
        if isinstance(found, AttemptEnd):
            return found
        if found is not None and (soonest is None or found.at < soonest.at):
            soonest = found
    return soonest


def first_obstacle(view: JobView, checks: Iterable[StartCheck]) -> Blocked | None:
    """The first thing in the way; the checks after it are not made, nor what they need read."""
    return next((found for check in checks if (found := check(view)) is not None), None)
