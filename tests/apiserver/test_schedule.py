"""Jobs that run at times of the day: what closes and opens by itself, and what users and queues do meanwhile."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from testcluster.cluster import Cluster
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

MakeJob = Callable[..., Any]
NO_RESTARTS = {"user": 0, "infrastructure": 0}
NOTHING_LEFT = {"backoffLimit": 0, "infrastructureBackoffLimit": 0}
"""The first end of an attempt that costs anything fails the job."""


def window(start: datetime, end: datetime) -> dict[str, Any]:
    """From a minute until a second, today."""
    begin = start.replace(second=0, microsecond=0)
    return {
        "start": f"{begin.minute} {begin.hour} {begin.day} {begin.month} *",
        "durationSeconds": round((end - begin).total_seconds()),
    }


def in_hours(first: float, last: float) -> dict[str, Any]:
    """A schedule of one window, so many hours from now."""
    now = datetime.now(UTC)
    return {"windows": [window(now + timedelta(hours=first), now + timedelta(hours=last))]}


OPEN, CLOSED = (-1, 6), (6, 12)


def until_held(job: Any) -> dict[str, Any]:
    """The status, once the job is outside its windows and its last pod is gone."""
    return job.until(
        lambda status: (
            status.get("phase") == "Suspended" and all(each.get("end") for each in status.get("attempts", []))
        )
    )


@pytest.mark.usefixtures("shared_operator", "terminations")
def test_windows_close_and_open_by_themselves(make_job: MakeJob) -> None:
    """When a window closes the pods stop, after a checkpoint; when the next opens the job goes on. None of it costs a
    restart, and the time between counts towards no deadline."""
    now = datetime.now(UTC)
    closes = now + timedelta(seconds=15)
    opens = (closes + timedelta(seconds=65)).replace(second=0, microsecond=0)
    windows = [window(now - timedelta(minutes=2), closes), window(opens, opens + timedelta(hours=1))]
    job = make_job(schedule={"windows": windows}, activeDeadlineSeconds=60, **NOTHING_LEFT)
    job.run()
    assert job.status["window"]["open"] is True

    held = until_held(job)
    until = opens.strftime("%Y-%m-%dT%H:%M:00")
    assert job.gangs() == []
    assert held["attempts"][0]["reason"] == "OutsideWindows"
    assert held["window"] == {"open": False, "until": f"{until}Z"}
    assert held["message"] == f"outside the windows of spec.schedule until {until}+00:00"

    status = job.until(lambda status: status["attempt"] == 1, 90)
    assert datetime.now(UTC) >= opens
    assert job.condition("Suspended")["reason"] == "WindowOpen"
    assert (status["restarts"], len(job.run(1))) == (NO_RESTARTS, 2)
    job.succeed(job.pods(1))


def test_an_operator_that_starts_by_day_starts_nothing(
    new_operator: Callable[..., Any], namespace: str, make_job: MakeJob, api_cluster: Cluster
) -> None:
    """A job that is created outside its windows has no children, whoever restarts the operator; `kubectl get` says
    until when. With another schedule it starts at once."""
    job = make_job(schedule={"timeZone": "Asia/Kolkata", **in_hours(6, 12)})
    for _ in range(2):
        operator = new_operator("--namespace", namespace)
        operator.start()
        until_held(job)
        operator.kill()
    assert (job.gangs(), job.status.get("attempt")) == ([], None)
    told = api_cluster.kubectl("get", "qlj", job.name, "-n", namespace, "-o", "wide")
    assert "closed until" in told
    assert "+05:30" in told

    new_operator("--namespace", namespace).start()
    job.patch({"schedule": in_hours(*OPEN)})
    job.run()


@pytest.mark.usefixtures("shared_operator", "terminations")
def test_a_schedule_changes_while_the_job_runs(make_job: MakeJob) -> None:
    """A window that is taken away ends the attempt; the user's own suspension outlives the next one."""
    job = make_job(schedule=in_hours(*OPEN), **NOTHING_LEFT)
    job.run()

    job.patch({"schedule": in_hours(*CLOSED)})
    until_held(job)
    job.patch({"suspend": True})
    job.until(lambda status: status["message"] == "held by spec.suspend")
    job.patch({"schedule": None})
    job.until(lambda status: "window" not in status)
    assert (job.status["phase"], job.gangs()) == ("Suspended", [])

    job.patch({"suspend": False})
    job.run(1)
    assert job.status["restarts"] == NO_RESTARTS


@pytest.mark.usefixtures("shared_operator")
def test_a_queued_job_leaves_its_queue_outside_its_windows(make_job: MakeJob) -> None:
    """A Job that Kueue holds is taken out of the queue, and comes back in the next window."""
    job = make_job(schedule=in_hours(*OPEN), scheduling={"queueName": "q"}, **NOTHING_LEFT)
    job.until_phase("Queued")

    job.patch({"schedule": in_hours(*CLOSED)})
    until_held(job)
    wait_for(lambda: not job.gangs())
    job.patch({"schedule": in_hours(*OPEN)})

    job.until_phase("Queued")
    gang = job.until_gang(1, lambda gang: gang["spec"]["suspend"])
    assert gang["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"


@pytest.mark.usefixtures("shared_operator")
def test_a_time_zone_that_is_none_holds_the_job(make_job: MakeJob) -> None:
    """The API server takes any name; the job says what is wrong, and goes on once it is right."""
    job = make_job(schedule={"timeZone": "Europe/Berln", **in_hours(*OPEN)})
    status = until_held(job)
    assert "spec.schedule.timeZone is corrected: Europe/Berln is no time zone" in status["message"]

    job.patch({"schedule": {"timeZone": "UTC"}})

    job.run()
