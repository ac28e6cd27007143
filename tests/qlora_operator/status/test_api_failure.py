"""What a job says when the API server keeps failing."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import pytest

from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.status.actions import Decision
from qlora_operator.status.api_failure import api_failure
from qlora_operator.status.observation import AttemptJob, Observation

Tell = Callable[..., Decision | None]


@pytest.fixture
def tell(make_job: Callable[..., QLoRAJob], now: datetime) -> Tell:
    """tell(status, jobs) -> what is said of an error."""

    def made(status: dict[str, Any] | None = None, jobs: Sequence[AttemptJob] = ()) -> Decision | None:
        return api_failure(make_job(status), Observation(tuple(jobs)), "a webhook\nis down", now)

    return made


def conditions_of(decision: Decision) -> dict[str, tuple[str, str]]:
    """Status and reason of each condition."""
    return {each.type: (each.status, each.reason) for each in decision.status.conditions}


def test_a_job_that_has_not_begun_is_not_initialized(tell: Tell) -> None:
    """The message is the server's, on one line, and an Event says it, too."""
    decision = tell()

    assert decision is not None
    assert conditions_of(decision)["Initialized"] == ("False", "ApiServerError")
    assert str(decision.status.message).endswith(": a webhook is down")
    assert [(event.type, event.reason) for event in decision.events] == [("Warning", "ApiServerError")]
    assert decision.status.phase == "Pending"


@pytest.mark.parametrize(("with_job", "kind"), [(True, "Running"), (False, "Initialized")])
def test_an_attempt_that_starts_waits_for_its_job_or_for_its_pods(
    tell: Tell, starting: Any, make_attempt_job: Any, now: datetime, *, with_job: bool, kind: str
) -> None:
    """Whichever could not be read or created."""
    status = starting(60, now)
    del status["attempts"][0]["jobUid"]
    decision = tell(status, [make_attempt_job()] if with_job else [])

    assert decision is not None
    assert conditions_of(decision)[kind] == ("False", "ApiServerError")


def test_a_job_that_runs_goes_on(tell: Tell, running: Any, make_attempt_job: Any) -> None:
    """Only its message says what could not be read."""
    decision = tell(running(), [make_attempt_job()])

    assert decision is not None
    assert conditions_of(decision)["Running"] == ("True", "Training")
    assert "a webhook is down" in str(decision.status.message)
    assert len(decision.events) == 1


def test_it_is_said_once(tell: Tell, running: Any) -> None:
    """Until the job says something else; and a job that is over needs nothing."""
    told = tell()
    assert told is not None
    assert tell(told.status.model_dump(by_alias=True, exclude_none=True)) is None
    over = running()
    over["conditions"].append({**over["conditions"][1], "type": "Finished"})
    assert tell(over) is None
