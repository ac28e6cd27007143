"""When launchers are ended, with real processes."""

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from qlora_contract.exit_codes import ExitCode
from qlora_contract.supervision import Limits, next_action
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli.outcome import Outcome, summarize
from qlora_operator.cli.processes import Launcher
from qlora_operator.cli.supervision import StopRequest, limits_of, supervise

pytestmark = pytest.mark.process

Start = Callable[..., list[Launcher]]
LIMITS = Limits(grace=30, peer_loss=300, kill_delay=20)
SHORT = Limits(grace=0.3, peer_loss=0.3, kill_delay=0.3)


def asked(*, forced: bool = False) -> StopRequest:
    """A request that came at time 0 of the clock."""
    return StopRequest(signal=signal.SIGINT, at=0.0, forced=forced)


@pytest.mark.parametrize(
    ("now", "stop", "ended_at", "due"),
    [
        pytest.param(1e6, StopRequest(), None, "wait", id="all goes well"),
        pytest.param(1.0, asked(), None, "terminate", id="asked to stop"),
        pytest.param(30.0, asked(), None, "kill", id="grace is over"),
        pytest.param(1.0, asked(forced=True), None, "kill", id="asked twice"),
        pytest.param(299.0, StopRequest(), 0.0, "wait", id="one has ended"),
        pytest.param(300.0, StopRequest(), 0.0, "terminate", id="the time for peers is over"),
        pytest.param(320.0, StopRequest(), 0.0, "kill", id="and SIGTERM did not help"),
        pytest.param(30.0, asked(), 29.0, "kill", id="grace counts from the signal"),
    ],
)
def test_living_launchers_are_due(now: float, stop: StopRequest, ended_at: float | None, due: str) -> None:
    """Launchers are let alone, then asked, then killed."""
    assert next_action(now, stop.at, ended_at, LIMITS, stop_now=stop.forced) == due


def test_launchers_get_more_time_than_they_give_their_ranks(a_job: Callable[..., QLoRAJob]) -> None:
    """A launcher that is still ending its ranks must not be killed for it."""
    run = to_run_config(a_job(), uid="u", attempt=0, isa="avx2")
    limits = limits_of(run)

    assert limits.grace > run.termination_grace_period_seconds
    assert limits.peer_loss > run.distributed.timeout_seconds


def supervised(launchers: list[Launcher], limits: Limits, stop: StopRequest | None = None) -> Outcome:
    """What became of the launchers."""
    for _ in supervise(launchers, limits, stop or StopRequest()):
        pass
    return summarize(launchers)


def wait_for(happened: Callable[[], Any]) -> None:
    """Return once it happened; the test's own time-out ends a wait in vain."""
    while not happened():
        time.sleep(0.02)


def test_a_launcher_that_never_ends_is_ended(start_launchers: Start) -> None:
    """Once another has failed and the time for its peers is up, one that ignores SIGTERM is killed, and is no cause."""
    launchers = start_launchers(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600) if index else report(40, 'rank 1 gave no sign of life')"
    )
    wait_for(lambda: launchers[1].log.read_text())

    outcome = supervised(launchers, SHORT)
    assert (outcome.code, outcome.cause) == (ExitCode.LOST_PEER, "rank 1 gave no sign of life")
    assert launchers[1].process.returncode == -signal.SIGKILL


def test_stopped_launchers_may_finish_what_they_do(start_launchers: Start) -> None:
    """SIGTERM goes to each of them once, and their own end counts."""
    launchers = start_launchers(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: report(50, 'a checkpoint holds all up to step 7'))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    wait_for(lambda: all(launcher.log.read_text() for launcher in launchers))
    stop = StopRequest()
    stop(signal.SIGINT)

    outcome = supervised(launchers, LIMITS, stop)
    assert (outcome.code, outcome.cause) == (ExitCode.TERMINATED, "a checkpoint holds all up to step 7")
    assert not any(launcher.ended_by_us for launcher in launchers)


def test_a_second_signal_kills(start_launchers: Start) -> None:
    """Whoever asks twice does not wait for a checkpoint."""
    launchers = start_launchers(
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    )
    wait_for(lambda: all(launcher.log.read_text() for launcher in launchers))
    stop = StopRequest()
    stop(signal.SIGINT)
    stop(signal.SIGINT)

    outcome = supervised(launchers, LIMITS, stop)
    assert outcome.code == 128 + signal.SIGKILL
    assert outcome.cause == "launcher 0 did not stop in time and was killed"
