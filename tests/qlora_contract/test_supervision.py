"""What children that still run are due, by the clock."""

import pytest

from qlora_contract.supervision import Limits, next_action

LIMITS = Limits(grace=10, peer_loss=40, kill_delay=5)


@pytest.mark.parametrize(
    ("now", "stop_requested", "first_exit", "action"),
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
def test_what_children_that_still_run_are_due(
    now: float, stop_requested: float | None, first_exit: float | None, action: str
) -> None:
    """No child outlives the grace period, nor the loss of a peer for long."""
    assert next_action(now, stop_requested, first_exit, LIMITS) == action


@pytest.mark.parametrize(("stop_requested", "first_exit"), [(None, None), (100, None), (None, 100)])
def test_whoever_insists_does_not_wait(stop_requested: float | None, first_exit: float | None) -> None:
    """A second request to stop kills at once, whatever the limits say."""
    assert next_action(100, stop_requested, first_exit, LIMITS, stop_now=True) == "kill"
