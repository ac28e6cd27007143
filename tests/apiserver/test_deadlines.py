"""The three deadlines, and the time to live of finished jobs."""

from collections.abc import Callable
from typing import Any

import pytest

from testcluster.client import ApiError
from testcluster.rank_zero import rank_zero
from testcluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_operator")]

MakeJob = Callable[..., Any]


def finish(job: Any) -> None:
    """Every rank ends well."""
    for pod in job.run():
        job.kubelet.succeeded(pod)


def is_gone(job: Any) -> bool:
    """Whether there is no such job any more."""
    try:
        job.get()
    except ApiError as error:
        return error.code == 404
    return False


def until_gone(job: Any) -> None:
    """Wait until neither the job nor a Job of it is there.

    Deleting takes the garbage collector, which looks for new kinds every 30 s.
    """
    wait_for(lambda: is_gone(job) and not job.gangs(), 60)


def until_failed(job: Any) -> dict[str, Any]:
    """The condition Failed of a job that has failed."""
    job.until_phase("Failed")
    return job.condition("Failed")


# --- ttlSecondsAfterFinished


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_job_whose_time_to_live_is_over_goes_with_its_children(make_job: MakeJob, seconds: int) -> None:
    """A job whose time to live is over goes, and its children with it."""
    job = make_job(ttlSecondsAfterFinished=seconds)
    finish(job)

    until_gone(job)


def test_a_failed_job_goes_after_its_time_to_live_too(make_job: MakeJob) -> None:
    """A job that failed goes after its time to live, too."""
    job = make_job(ttlSecondsAfterFinished=0)
    job.kubelet.failed(job.run()[0], 11)
    with job.kubelet.finish_terminations(job.namespace):
        until_gone(job)


@pytest.mark.parametrize("before", [None, 3600], ids=["unset", "long"])
def test_a_time_to_live_lowered_after_the_end_holds_at_once(make_job: MakeJob, before: int | None) -> None:
    """A time to live that is given, or lowered, after the job finished holds at once."""
    job = make_job(**({} if before is None else {"ttlSecondsAfterFinished": before}))
    finish(job)
    job.until_phase("Succeeded")

    job.patch({"ttlSecondsAfterFinished": 0, "suspend": True})

    until_gone(job)


def test_a_time_to_live_raised_in_time_saves_the_job(make_job: MakeJob) -> None:
    """A time to live that is raised in time saves the job."""
    job, witness = make_job(ttlSecondsAfterFinished=6), make_job("witness", ttlSecondsAfterFinished=6)
    witness.run()
    finish(job)
    job.until_phase("Succeeded")

    job.patch({"ttlSecondsAfterFinished": 3600})

    for pod in witness.pods(0):
        job.kubelet.succeeded(pod)
    until_gone(witness)
    assert job.status["phase"] == "Succeeded"


# --- activeDeadlineSeconds


def test_a_job_that_runs_for_too_long_fails(make_job: MakeJob) -> None:
    """A job that runs for too long fails, and its pods are ended."""
    job = make_job(activeDeadlineSeconds=3)
    job.run()
    with job.kubelet.finish_terminations(job.namespace):
        failed = until_failed(job)
        status = job.until(lambda status: status["attempts"][-1].get("end"))
    assert failed["reason"] == "DeadlineExceeded"
    assert "activeDeadlineSeconds: 3" in failed["message"]
    assert status["attempts"][-1]["reason"] == "DeadlineExceeded"
    assert job.gangs() == []


def test_the_active_deadline_counts_while_pods_start(make_job: MakeJob) -> None:
    """The clock runs while pods are being started."""
    job = make_job(activeDeadlineSeconds=1)

    assert until_failed(job)["reason"] == "DeadlineExceeded"


def test_the_active_deadline_counts_while_no_node_fits(make_job: MakeJob) -> None:
    """The clock runs while no node fits."""
    job = make_job(activeDeadlineSeconds=1, isa={"allowed": ["amx_bf16"]})

    assert until_failed(job)["reason"] == "DeadlineExceeded"
    assert job.gangs() == []


def test_the_active_deadline_counts_while_a_failed_attempt_ends(make_job: MakeJob) -> None:
    """The clock runs while a failed attempt's last pod does not go, and no attempt follows."""
    job = make_job(activeDeadlineSeconds=4)
    first, second = job.run()
    job.kubelet.failed(first, 1)
    job.until(lambda status: status.get("restarts", {}).get("user") == 1)

    assert until_failed(job)["reason"] == "DeadlineExceeded"
    job.kubelet.finish_termination(second)
    status = job.until(lambda status: status["attempts"][-1].get("end"))
    assert status["attempt"] == 0
    assert status["attempts"][-1]["reason"] == "UnexpectedError"


def test_the_active_deadline_stands_still_while_suspended(make_job: MakeJob) -> None:
    """A suspended job has all of activeDeadlineSeconds again when it is resumed."""
    job = make_job(activeDeadlineSeconds=2, suspend=True)
    job.until_phase("Suspended")
    witness = make_job("witness", activeDeadlineSeconds=2)
    until_failed(witness)
    assert job.status["phase"] == "Suspended"

    job.patch({"suspend": False})

    job.pods(0)
    failed = until_failed(job)
    assert failed["lastTransitionTime"] > witness.condition("Failed")["lastTransitionTime"]


def test_the_active_deadline_starts_anew_when_resumed(make_job: MakeJob) -> None:
    """The time before a job was suspended does not count after it was resumed."""
    job = make_job(activeDeadlineSeconds=600)
    first = job.until(lambda status: status.get("startTime"))["startTime"]
    job.patch({"suspend": True})
    job.until(lambda status: status["attempts"][-1].get("end"))
    # A witness of time passing: a second, at least.
    until_failed(make_job("witness", activeDeadlineSeconds=1))

    job.patch({"suspend": False})

    assert job.until(lambda status: status.get("attempt") == 1)["startTime"] > first


def test_an_active_deadline_changed_while_running_holds(make_job: MakeJob) -> None:
    """A deadline that is set while the job runs holds, and one that is raised in time does not end it."""
    lowered, raised = make_job("lowered"), make_job("raised", activeDeadlineSeconds=8)
    lowered.run()
    raised.run()

    raised.patch({"activeDeadlineSeconds": 3600})
    lowered.patch({"activeDeadlineSeconds": 9})

    assert until_failed(lowered)["reason"] == "DeadlineExceeded"
    assert raised.status["phase"] == "Running"


# --- pendingDeadlineSeconds


def test_the_pending_deadline_says_what_a_job_had_waited_for(make_job: MakeJob) -> None:
    """A job that no node fits fails in time, and says what it had waited for."""
    job = make_job(pendingDeadlineSeconds=2, isa={"allowed": ["amx_bf16"]})

    failed = until_failed(job)

    assert failed["reason"] == "PendingDeadlineExceeded"
    assert "pendingDeadlineSeconds: 2" in failed["message"]
    assert "lack AMXBF16" in failed["message"]


def test_the_pending_deadline_fails_a_job_whose_ranks_do_not_come_up(make_job: MakeJob) -> None:
    """A job of which one rank does not come up fails in time, with the reason that the node gives."""
    job = make_job(pendingDeadlineSeconds=5)
    first, second = job.pods(0)
    job.kubelet.running(first)
    job.kubelet.unpullable(second)
    with job.kubelet.finish_terminations(job.namespace):
        failed = until_failed(job)

    assert failed["reason"] == "PendingDeadlineExceeded"
    assert "not found" in failed["message"]


def test_the_pending_deadline_is_over_once_all_ranks_run(make_job: MakeJob) -> None:
    """A job that runs has met the deadline; suspended, it has none."""
    running, suspended = (
        make_job("running", pendingDeadlineSeconds=6),
        make_job("held", pendingDeadlineSeconds=6),
    )
    running.run()
    suspended.patch({"suspend": True})
    suspended.until_phase("Suspended")
    witness = make_job("witness", pendingDeadlineSeconds=6)
    with witness.kubelet.finish_terminations(witness.namespace):
        until_failed(witness)

    assert running.status["phase"] == "Running"
    assert suspended.status["phase"] == "Suspended"
    # The time before does not count.
    suspended.patch({"suspend": False})
    suspended.pods(1)
    assert suspended.status["phase"] == "Starting"


# --- progressDeadlineSeconds


def test_a_gang_that_completes_no_step_for_too_long_is_started_anew(make_job: MakeJob) -> None:
    """A gang that completes no step for too long is started anew, at the cost of one of backoffLimit."""
    job = make_job(progressDeadlineSeconds=1, backoffLimit=1)
    with rank_zero() as rank, job.kubelet.finish_terminations(job.namespace):
        rank.tell(job.get()["metadata"]["uid"], step=3)
        first, second = job.pods(0)
        job.kubelet.running(first, ip=rank.address)
        job.kubelet.running(second)

        status = job.until(lambda status: status["attempts"][0].get("end") and status["attempt"] == 1)

    assert status["attempts"][0]["reason"] == "ProgressDeadlineExceeded"
    assert "since step 3" in status["attempts"][0]["message"]
    assert status["restarts"] == {"user": 1, "infrastructure": 0}


def test_a_silent_rank_is_not_taken_for_one_that_makes_no_steps(make_job: MakeJob) -> None:
    """A rank 0 that has never answered is not taken for one that makes no steps."""
    job = make_job(progressDeadlineSeconds=1)
    job.run()
    witness = make_job("witness", activeDeadlineSeconds=3)
    until_failed(witness)

    assert job.status["phase"] == "Running"
