"""Sees to it that every launcher of `qlora run` ends: by itself, when the user asks, or when another one has failed."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_contract.exit_codes import COLLATERAL_DELAY_SECONDS
from qlora_contract.run_config import RunConfig
from qlora_contract.signals import stop_by
from qlora_contract.supervision import Limits, next_action
from qlora_operator.cli.processes import Launcher, kill

POLL_SECONDS = 0.1
PEER_LOSS_MARGIN_SECONDS = 60.0
"""What launchers get beyond their ranks' heartbeat timeout to notice that another one has ended; more than a launcher
gives its own ranks."""
KILL_DELAY_SECONDS = 20.0
"""From SIGTERM to SIGKILL; more than launchers give their ranks."""
GRACE_MARGIN_SECONDS = 10.0
"""What launchers get beyond the grace period to end by themselves."""


@dataclass
class StopRequest:
    """Signals that ask `qlora run` to stop. Itself the handler of them."""

    signal: int | None = None
    """The first of them; None: there was none."""
    at: float | None = None
    """When it came, on the monotonic clock."""
    forced: bool = False
    """There was a second one: stop without waiting for a checkpoint."""

    def __call__(self, number: int, _: object = None) -> None:
        """Handle a signal."""
        if self.signal is None:
            self.signal, self.at = number, time.monotonic()
        else:
            self.forced = True

    def listen(self) -> None:
        """Handle Ctrl-C, SIGTERM and the end of the terminal."""
        stop_by(self)


def limits_of(run: RunConfig) -> Limits:
    """How long a run's launchers may continue, in seconds."""
    return Limits(
        grace=run.termination_grace_period_seconds + GRACE_MARGIN_SECONDS,
        peer_loss=COLLATERAL_DELAY_SECONDS + run.distributed.timeout_seconds + PEER_LOSS_MARGIN_SECONDS,
        kill_delay=KILL_DELAY_SECONDS,
    )


def supervise(launchers: Sequence[Launcher], limits: Limits, stop: StopRequest) -> Iterator[None]:
    """Wait until every launcher has ended, and end those whose time is up.

    Yields every POLL_SECONDS meanwhile, so that the caller can show progress.
    """
    first_exit_at: float | None = None
    terminated = False
    while running := [launcher for launcher in launchers if launcher.is_running]:
        now = time.monotonic()
        if first_exit_at is None and len(running) < len(launchers):
            first_exit_at = now
        action = next_action(now, stop.at, first_exit_at, limits, stop_now=stop.forced)
        if action == "terminate" and not terminated:
            terminated = True
            for launcher in running:
                launcher.ended_by_us = stop.at is None
                launcher.process.terminate()
        elif action == "kill":
            kill(running)
        yield
        time.sleep(POLL_SECONDS)
