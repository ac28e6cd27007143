"""The status of a job that this operator cannot read."""

from datetime import UTC, datetime
from typing import Any

import pytest

from qlora_operator.api.names import CONTROLLER
from qlora_operator.status.invalid_spec import invalid_spec_status

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
RUNNING = {
    "type": "Running",
    "status": "True",
    "reason": "Training",
    "message": "",
    "lastTransitionTime": "2026-01-31T11:00:00Z",
}


def job(status: Any = None, metadata: Any = None, **spec: Any) -> dict[str, Any]:
    """A job from the API."""
    return {"metadata": {"name": "job", "generation": 3, **(metadata or {})}, "spec": spec, "status": status}


def test_the_status_says_what_is_wrong() -> None:
    """The faults are the message, of the condition Initialized too, whose reason is InvalidSpec."""
    status = invalid_spec_status(job(), "spec.x no such field", NOW)
    assert status is not None
    assert status.message == "this operator cannot read the job: spec.x no such field"
    [condition] = status.conditions
    assert (condition.type, condition.status, condition.reason) == ("Initialized", "False", "InvalidSpec")
    assert (status.phase, status.observed_generation) == ("Pending", 3)


def test_the_rest_of_the_status_is_kept() -> None:
    """What an operator that could read the job wrote stays: budgets, attempts, and that it runs."""
    before = {"attempt": 2, "restarts": {"user": 1, "infrastructure": 1}, "conditions": [RUNNING]}
    status = invalid_spec_status(job(before), "why", NOW)
    assert status is not None
    assert (status.attempt, status.restarts and status.restarts.user, status.phase) == (2, 1, "Running")


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(job(managedBy="kueue.x-k8s.io/multikueue"), id="another controller's"),
        pytest.param(job(metadata={"deletionTimestamp": "2026-01-31T11:00:00Z"}), id="on its way out"),
        pytest.param(job({"attempt": "two"}), id="unreadable status"),
    ],
)
def test_what_is_not_ours_or_unreadable_is_left_alone(raw: dict[str, Any]) -> None:
    """Nothing is written over what is not ours, or cannot be read either."""
    assert invalid_spec_status(raw, "why", NOW) is None


def test_a_job_that_names_this_operator_is_ours() -> None:
    """A job that names this operator as its controller is ours."""
    assert invalid_spec_status(job(managedBy=CONTROLLER), "why", NOW) is not None
