"""Suspending and resuming a job, at every moment of its life."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_operator")]

MakeJob = Callable[..., Any]
NO_RESTARTS = {"user": 0, "infrastructure": 0}


def until_suspended(job: Any, attempt: int | None = 0) -> dict[str, Any]:
    """The status, once the job is suspended and all of its last attempt is gone."""

    def check(status: dict[str, Any]) -> bool:
        attempts = status.get("attempts", [])
        ended = attempts[-1:] and attempts[-1].get("end")
        return status.get("phase") == "Suspended" and bool(ended or attempt is None)

    return job.until(check)


def until_attempt(job: Any, number: int) -> dict[str, Any]:
    """The status, once this attempt's Job is there."""
    status = job.until(lambda status: status.get("attempt") == number)
    job.pods(number, job.get()["spec"]["topology"]["pods"])
    return status


def test_a_job_that_is_created_suspended_has_no_children(make_job: MakeJob) -> None:
    """A job that is created suspended gets no attempt until it is resumed, and then its first."""
    job = make_job(suspend=True)
    status = job.until_phase("Suspended")
    assert "attempt" not in status
    assert "startTime" not in status
    assert job.gangs() == []

    job.patch({"suspend": False})

    status = until_attempt(job, 0)
    assert status["startTime"]
    assert [c["reason"] for c in status["conditions"] if c["type"] == "Suspended"] == ["Resumed"]
    job.run()


def test_a_job_suspended_while_it_starts_gives_up_the_attempt(make_job: MakeJob) -> None:
    """A job that is suspended before its ranks are up gives up the attempt, and resumes with another."""
    job = make_job()
    job.pods(0)

    job.patch({"suspend": True})

    status = until_suspended(job)
    assert status["attempts"][0]["reason"] == "Suspended"
    assert status["restarts"] == NO_RESTARTS
    assert job.gangs() == []
    job.patch({"suspend": False})
    until_attempt(job, 1)


def test_a_job_that_no_node_fits_can_be_suspended(make_job: MakeJob) -> None:
    """A job that no node fits can be suspended, and says so."""
    job = make_job(isa={"allowed": ["amx_bf16"]})
    job.until(lambda status: "AMXBF16" in status.get("message", ""))

    job.patch({"suspend": True})

    status = until_suspended(job, None)
    assert status["message"] == "held by spec.suspend"
    assert "attempt" not in status


def test_a_job_suspended_while_it_runs_goes_on_at_no_cost(make_job: MakeJob) -> None:
    """A running job's pods stop after a checkpoint; resumed, it goes on at no cost to any budget."""
    job = make_job(backoffLimit=0, infrastructureBackoffLimit=0)
    pods = job.run()

    job.patch({"suspend": True})
    status = job.until_phase("Suspended")
    assert "end" not in status["attempts"][0], "its pods are still being ended"
    assert job.condition("Running")["reason"] == "Suspended"
    for pod in pods:
        job.kubelet.finish_termination(pod, exit_code=50)
    status = until_suspended(job)
    first_start = status["startTime"]
    assert job.gangs() == []

    job.patch({"suspend": False})
    until_attempt(job, 1)
    job.run(1)
    status = job.status
    assert status["restarts"] == NO_RESTARTS
    assert status["startTime"] >= first_start
    assert status["attempts"][0]["reason"] == "Suspended"


def test_the_next_attempt_waits_for_the_last_suspended_pod(make_job: MakeJob) -> None:
    """A job that is resumed while pods of the suspended attempt still end starts no gang beside them."""
    job = make_job()
    first, second = job.run()
    job.patch({"suspend": True})
    job.until_phase("Suspended")
    job.patch({"suspend": False})
    job.until(lambda status: status["phase"] != "Suspended")
    job.kubelet.finish_termination(first, exit_code=50)
    job.until(lambda status: status["observedGeneration"] == 3)
    assert job.status["attempt"] == 0

    job.kubelet.finish_termination(second, exit_code=50)

    status = until_attempt(job, 1)
    assert status["attempts"][0]["end"] <= status["attempts"][1]["start"]
    assert status["restarts"] == NO_RESTARTS


def test_a_job_suspended_between_two_attempts_starts_none(make_job: MakeJob) -> None:
    """A job that is suspended between two attempts starts none, and keeps what it was charged."""
    job = make_job()
    job.kubelet.failed(job.run()[0], 1)
    with job.kubelet.finish_terminations(job.namespace):
        job.kubelet.failed(job.run(1)[0], 1)
        job.until(lambda status: "the next attempt starts at" in (status.get("message") or ""))

        job.patch({"suspend": True})
        status = until_suspended(job)
        assert status["restarts"] == {"user": 2, "infrastructure": 0}
        assert status["attempt"] == 1


def test_a_finished_job_stays_finished_when_it_is_suspended(make_job: MakeJob) -> None:
    """A finished job stays finished, whatever spec.suspend says."""
    job = make_job()
    for pod in job.run():
        job.kubelet.succeeded(pod)
    job.until_phase("Succeeded")

    for suspend in (True, False):
        generation = job.patch({"suspend": suspend})["metadata"]["generation"]
        status = job.until(lambda status, seen=generation: status["observedGeneration"] == seen)
        assert status["phase"] == "Succeeded"
        assert job.condition("Suspended") == {}


def test_a_job_suspended_twice_within_a_second_ends_up_running(make_job: MakeJob) -> None:
    """Suspended, resumed, suspended and resumed without a pause, a job ends up running, one gang at a time."""
    job = make_job(backoffLimit=0, infrastructureBackoffLimit=0)
    job.run()
    with job.kubelet.finish_terminations(job.namespace, exit_code=50):
        for suspend in (True, False, True, False):
            job.patch({"suspend": suspend})
        status = job.until(
            lambda status: status["observedGeneration"] == 5 and "reason" not in status["attempts"][-1]
        )
        if status["attempt"] > 0:
            job.run(status["attempt"])
    status = job.status
    assert status["restarts"] == NO_RESTARTS
    assert {attempt.get("reason") for attempt in status["attempts"]} <= {"Suspended", None}
    assert len(job.gangs()) == 1


def test_topology_and_scheduling_change_while_suspended(make_job: MakeJob) -> None:
    """What is edited while the job is suspended holds from the next attempt on."""
    job = make_job()
    job.pods(0)
    job.patch({"suspend": True})
    until_suspended(job)
    toleration = {"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}

    job.patch(
        {
            "topology": {"pods": 3, "ranksPerPod": 2, "memoryPerRank": "2Gi"},
            "scheduling": {"tolerations": [toleration]},
        }
    )
    job.patch({"suspend": False})

    pods = job.pods(1, 3)
    assert toleration in pods[0]["spec"]["tolerations"]
    assert pods[0]["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "2"
    status = job.status
    assert status["placement"]["worldSize"] == 6
    assert status["columns"]["ranks"] == "0/6"


def test_a_topology_changed_in_the_blink_of_an_eye_is_taken(make_job: MakeJob) -> None:
    """A job that is suspended, changed and resumed before the operator looks gets a gang of the new form."""
    job = make_job(suspend=True, infrastructureBackoffLimit=0)
    job.until_phase("Suspended")
    job.patch({"suspend": False})
    job.pods(0)

    job.patch({"topology": {"pods": 1}, "suspend": True})
    job.patch({"suspend": False})

    status = job.until(lambda status: status["attempt"] == 1 and "reason" not in status["attempts"][-1])
    assert len(job.pods(1, 1)) == 1
    assert status["restarts"] == NO_RESTARTS
    job.run(1, count=1)
