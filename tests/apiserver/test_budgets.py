"""The two budgets of restarts, and the time between attempts."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from qlora_contract.exit_codes import ExitCode

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_operator")]

MakeJob = Callable[..., Any]
UNEXPECTED, TERMINATED, INVALID_DATA = ExitCode.UNEXPECTED, ExitCode.TERMINATED, ExitCode.INVALID_DATA


def fail(job: Any, attempt: int, code: int) -> None:
    """The attempt runs, and rank 0 ends with the code."""
    job.kubelet.failed(job.run(attempt)[0], code)


@pytest.mark.parametrize(
    ("limits", "codes", "reason", "restarts"),
    [
        pytest.param((0, 20), [UNEXPECTED], "BackoffLimitExceeded", (0, 0), id="no restart is allowed"),
        pytest.param((1, 0), [UNEXPECTED] * 2, "BackoffLimitExceeded", (1, 0), id="one restart is used up"),
        pytest.param(
            (3, 0),
            [TERMINATED],
            "InfrastructureBackoffLimitExceeded",
            (0, 0),
            id="none for the cluster's doing",
        ),
        pytest.param(
            (0, 1),
            [TERMINATED] * 2,
            "InfrastructureBackoffLimitExceeded",
            (0, 1),
            id="one for the cluster's doing is used up",
        ),
        pytest.param(
            (0, 1),
            [TERMINATED, UNEXPECTED],
            "BackoffLimitExceeded",
            (0, 1),
            id="the cluster's, then the user's",
        ),
        pytest.param(
            (1, 0),
            [UNEXPECTED, TERMINATED],
            "InfrastructureBackoffLimitExceeded",
            (1, 0),
            id="the user's, then the cluster's",
        ),
        pytest.param((3, 20), [INVALID_DATA], "InvalidData", (0, 0), id="nothing to be gained by a restart"),
        pytest.param((1, 1), [UNEXPECTED, INVALID_DATA], "InvalidData", (1, 0), id="a restart, then no more"),
    ],
)
def test_each_failed_attempt_costs_one_restart_of_its_budget(
    make_job: MakeJob, limits: tuple[int, int], codes: list[int], reason: str, restarts: tuple[int, int]
) -> None:
    """Each failed attempt costs one restart of its budget, and the job fails when there is none left."""
    job = make_job(backoffLimit=limits[0], infrastructureBackoffLimit=limits[1])

    with job.kubelet.finish_terminations(job.namespace):
        for attempt, code in enumerate(codes):
            fail(job, attempt, code)
        status = job.until_phase("Failed")

    assert (status["restarts"]["user"], status["restarts"]["infrastructure"]) == restarts
    assert [attempt["exitCodes"][0] for attempt in status["attempts"]] == codes
    assert job.condition("Failed")["reason"] == reason
    assert job.condition("Finished")["status"] == "True"
    assert job.condition("Restarting").get("status", "False") == "False"


def test_a_limit_that_is_raised_before_the_failure_counts(make_job: MakeJob) -> None:
    """A limit that is raised before the failure counts."""
    job = make_job(backoffLimit=0)
    pods = job.run()
    job.patch({"backoffLimit": 1})

    with job.kubelet.finish_terminations(job.namespace):
        job.kubelet.failed(pods[0], UNEXPECTED)
        status = job.until(lambda status: status["attempt"] == 1)

    assert status["restarts"] == {"user": 1, "infrastructure": 0}


def test_a_lowered_limit_fails_the_job_with_its_next_failure(make_job: MakeJob) -> None:
    """A limit that is lowered below what was used fails the job with its next failure, not before."""
    job = make_job(backoffLimit=3)
    with job.kubelet.finish_terminations(job.namespace):
        fail(job, 0, UNEXPECTED)
        pods = job.run(1)
        generation = job.patch({"backoffLimit": 0})["metadata"]["generation"]
        job.until(lambda status: status["observedGeneration"] == generation)
        assert job.status["phase"] == "Running"
        job.kubelet.failed(pods[0], UNEXPECTED)

        status = job.until_phase("Failed")

    assert "all 0" not in status["message"]
    assert status["restarts"]["user"] == 1


def test_the_first_restart_is_prompt_and_the_next_waits(make_job: MakeJob) -> None:
    """After one failure the next attempt starts at once; after two in a row it waits, says until when, and
    starts by itself."""
    job = make_job()
    with job.kubelet.finish_terminations(job.namespace):
        fail(job, 0, UNEXPECTED)
        fail(job, 1, UNEXPECTED)
        status = job.until(lambda status: "the next attempt starts at" in (status.get("message") or ""))
        assert status["phase"] == "Restarting"
        assert job.condition("Initialized")["reason"] == "BackOff"
        assert "exited with code 1" in status["message"]

        attempts = job.until(lambda status: status["attempt"] == 2)["attempts"]
    waited = datetime.fromisoformat(attempts[2]["start"]) - datetime.fromisoformat(attempts[1]["end"])
    assert waited.total_seconds() >= 8


def test_the_next_attempt_waits_for_the_last_pod(make_job: MakeJob) -> None:
    """While a pod of the failed attempt still ends, no other gang is started."""
    job = make_job()
    failed, living = job.run()
    job.kubelet.failed(failed, UNEXPECTED)
    job.until_phase("Restarting")
    # A write to the job makes the operator look once more.
    generation = job.patch({"backoffLimit": 5})["metadata"]["generation"]
    job.until(lambda status: status["observedGeneration"] == generation)
    assert [gang["metadata"]["name"] for gang in job.gangs()] == ["job-a0"]

    job.kubelet.finish_termination(living)

    status = job.until(lambda status: status["attempt"] == 1)
    assert status["attempts"][0]["end"] <= status["attempts"][1]["start"]
    job.run(1)
