"""What keeps an attempt from starting, and its children from being created."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_operator.api.times import stamp
from qlora_operator.status.actions import Decision, DeleteAttemptJob, StartAttempt
from qlora_operator.status.observation import ReasonMessage

Status = Callable[..., dict[str, Any]]

START = "2026-01-31T11:00:00Z"


def began(seconds: float, now: datetime) -> dict[str, Any]:
    """An attempt whose Job nobody has seen, so many seconds old."""
    return {"attempt": 0, "start": stamp(now - timedelta(seconds=seconds))}


def test_no_job_is_created_beside_another(
    running: Status, ask: Callable[..., Decision], make_attempt_job: Any
) -> None:
    """While another attempt's Job may make pods, this one's is not created; the other one goes."""
    status = {**running(jobUid=None), "attempt": 1}
    status["attempts"] = [{"attempt": 1, "start": START}]
    decision = ask(status, [make_attempt_job(0)], [])
    assert decision.actions == (DeleteAttemptJob("job-a0", "job-uid-0"),)


@pytest.mark.parametrize("over", [{"failed": True}, {"complete": True}], ids=["failed", "complete"])
def test_a_finished_job_is_in_nobodys_way(
    running: Status, over: dict[str, bool], ask: Callable[..., Decision], make_attempt_job: Any
) -> None:
    """A Job that will have no more pods is in nobody's way."""
    status = {**running(), "attempt": 1, "attempts": [{"attempt": 1, "start": START}]}
    actions = ask(status, [make_attempt_job(0, **over)], []).actions
    assert any(isinstance(action, StartAttempt) and action.attempt == 1 for action in actions)


@pytest.mark.parametrize(("age", "seconds"), [(0, 0.5), (1, 1), (4, 4), (60, 10)])
def test_children_that_cannot_be_created_are_tried_again(
    starting: Status, ask: Callable[..., Decision], now: datetime, age: float, seconds: float
) -> None:
    """Soon at first, since a job of the same name may be on its way out, then every ten seconds."""
    decision = ask(
        starting(age, now, attempts=[began(age, now)]),
        [],
        [],
        create_error=ReasonMessage("NameConflict", "no"),
    )

    assert decision.look_at == now + timedelta(seconds=seconds)
    assert [type(action) for action in decision.actions] == [StartAttempt]
    assert decision.status.message == "no"


def test_a_job_whose_status_was_emptied_starts_nothing_beside_its_job(
    ask: Callable[..., Decision], make_attempt_job: Any
) -> None:
    """A job whose status somebody emptied starts nothing beside the Job that is there; that one goes."""
    decision = ask(None, [make_attempt_job(3)], [])
    assert decision.actions == (DeleteAttemptJob("job-a3", "job-uid-3"),)
