"""When children that still run are asked to stop, and when they are killed.

A launcher decides so for its ranks, `qlora run` for its launchers. Pure: both watch, signal and kill by themselves.
"""

from dataclasses import dataclass
from typing import Literal

Action = Literal["wait", "terminate", "kill"]


@dataclass(frozen=True)
class Limits:
    """How long children may continue, in seconds."""

    grace: float
    """After a stop was requested: the time to save a checkpoint and leave."""
    peer_loss: float
    """After the first child ended: the time for the others to notice and end by themselves."""
    kill_delay: float = 10.0
    """From SIGTERM to SIGKILL for those that outlived `peer_loss`: without their peers they cannot save anything."""


def next_action(
    now: float,
    stop_requested_at: float | None,
    first_exit_at: float | None,
    limits: Limits,
    *,
    stop_now: bool = False,
) -> Action:
    """What is due for the children that still run.

    Args:
        now: seconds on a monotonic clock, as all times here.
        stop_requested_at: when we were asked to stop; None: not yet.
        first_exit_at: when the first child ended in a way that the others cannot outlive; None: not yet.
        limits: how long they may continue.
        stop_now: kill without waiting any longer, as after a second Ctrl-C.
    """
    stopping = stop_requested_at is not None
    grace_is_over = stop_requested_at is not None and now >= stop_requested_at + limits.grace
    since_loss = None if first_exit_at is None else now - first_exit_at - limits.peer_loss
    if stop_now or grace_is_over or (since_loss is not None and since_loss >= limits.kill_delay):
        return "kill"
    return "terminate" if stopping or (since_loss is not None and since_loss >= 0) else "wait"
