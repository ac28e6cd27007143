"""What the launcher makes of living ranks: decisions. With real processes: test_launch.py."""

from collections.abc import Callable

import pytest

from qlora_contract.run import RunConfig
from qlora_trainer.supervise import Limits, action, limits_of

LIMITS = Limits(grace=10, patience=40, kill_delay=5)


@pytest.mark.parametrize(
    ("now", "stopped", "died", "due"),
    [
        pytest.param(1000, None, None, "wait", id="all is well"),
        pytest.param(100, 100, None, "terminate", id="told to stop"),
        pytest.param(109, 100, None, "terminate", id="within the grace"),
        pytest.param(110, 100, None, "kill", id="grace is over"),
        pytest.param(139, None, 100, "wait", id="peers have time to notice a death"),
        pytest.param(140, None, 100, "terminate", id="they did not notice"),
        pytest.param(145, None, 100, "kill", id="nor obey"),
        pytest.param(101, 100, 99, "terminate", id="told to stop after a death"),
        pytest.param(110, 100, 99, "kill", id="grace counts after a death"),
    ],
)
def test_what_living_ranks_are_due(now: float, stopped: float | None, died: float | None, due: str) -> None:
    """Nothing lives past the grace period, nor past its patience with a dead peer."""
    assert action(now, stopped, died, LIMITS) == due


@pytest.mark.parametrize(("period", "grace"), [(300, 295), (10, 5), (4, 2), (1, 0.5)])
def test_the_grace_is_shorter_than_the_pods(
    a_run: Callable[..., RunConfig], period: int, grace: float
) -> None:
    """The launcher keeps part of the period for its own end, at most half of it."""
    assert limits_of(a_run(terminationGracePeriodSeconds=period)).grace == grace


def test_patience_outlasts_the_ranks_own_heartbeat(a_run: Callable[..., RunConfig]) -> None:
    """Ranks get their heartbeat's time-out and the collateral wait, and more, before they are told."""
    run = a_run(distributed={"timeoutSeconds": 60})

    assert limits_of(run).patience > 60 + 5
