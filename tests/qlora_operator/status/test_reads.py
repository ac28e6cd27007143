"""What is read to decide about a job: as little as the decision needs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_contract.units import rfc3339
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.status.decision import decide
from qlora_operator.status.observation import AttemptJob, Observation, Pod, Read, ReasonMessage
from qlora_operator.status.policies import MIN_STARTUP_GRACE

NOTHING: set[Read] = set()
JOBS, PODS, HEALTH, TIERS, WARNINGS, WORKLOAD = Read

Reads = Callable[..., set[Read]]


@pytest.fixture
def reads(now: datetime) -> Reads:
    """reads(job, jobs, pods, startup_grace=...) -> all that is read before the job is decided about."""

    def made(
        job: QLoRAJob,
        jobs: Sequence[AttemptJob] = (),
        pods: Sequence[Pod] = (),
        *,
        startup_grace: timedelta = MIN_STARTUP_GRACE,
    ) -> set[Read]:
        answers = {
            JOBS: {"jobs_listed": True},
            PODS: {"pods": tuple(pods)},
            HEALTH: {"lost_nodes": frozenset[str]()},
            TIERS: {"feasible_tiers": ("avx512", "avx2")},
            WARNINGS: {"warnings": ()},
            WORKLOAD: {"deactivated": ""},
        }
        seen = Observation(tuple(jobs), image="image", startup_grace=startup_grace)
        found: set[Read] = set()
        while asked := decide(job, seen, now).reads:
            assert not found & asked, "nothing is read twice"
            found |= asked
            for read in asked:
                seen = replace(seen, **answers[read])
        return found

    return made


def open_attempt(start: datetime, running: str = "False", **attempt: Any) -> dict[str, Any]:
    """The status of a job with an attempt that lasts."""
    condition = {
        "type": "Running",
        "status": running,
        "reason": "R",
        "message": "",
        "lastTransitionTime": rfc3339(start),
    }
    return {
        "attempt": 0,
        "attempts": [{"attempt": 0, "start": rfc3339(start), **attempt}],
        "conditions": [condition],
        "placement": {"isa": "avx512"},
        "provenance": {"image": "image", "modelRevision": "m", "datasetRevision": "d"},
    }


def finished(status: dict[str, Any]) -> dict[str, Any]:
    """The status of a job that is over."""
    condition = {
        "type": "Finished",
        "status": "True",
        "reason": "R",
        "message": "",
        "lastTransitionTime": "2026-01-31T12:00:00Z",
    }
    return {**status, "conditions": [condition]}


@pytest.mark.parametrize(
    ("suspend", "over", "wanted"),
    [
        pytest.param(False, False, {TIERS}, id="to start: where"),
        pytest.param(True, False, NOTHING, id="suspended from birth"),
        pytest.param(False, True, NOTHING, id="failed before its first attempt"),
    ],
)
def test_before_the_first_attempt_only_nodes_are_read(
    make_job: Callable[..., Any], reads: Reads, suspend: bool, over: bool, wanted: set[Read]
) -> None:
    """Only which nodes there are, and only if an attempt may start."""
    assert reads(make_job(finished({}) if over else {}, suspend=suspend)) == wanted


@pytest.mark.parametrize(
    ("job", "wanted"),
    [
        pytest.param({"failed": True}, {JOBS, PODS, TIERS}, id="a Job that is over"),
        pytest.param({}, {JOBS, PODS}, id="a Job that may create pods: no need to know where"),
    ],
)
def test_children_of_a_job_without_a_status_are_read(
    make_job: Callable[..., Any], make_attempt_job: Any, reads: Reads, job: Any, wanted: set[Read]
) -> None:
    """Where somebody emptied the status, the children tell whether an attempt may start."""
    assert reads(make_job({}), [make_attempt_job(**job)]) == wanted


@pytest.mark.parametrize(
    ("status", "suspend", "pods", "wanted"),
    [
        pytest.param({}, False, [], {JOBS, PODS, TIERS}, id="the next one starts"),
        pytest.param({}, False, [{"phase": "Running"}], {JOBS, PODS, HEALTH}, id="a pod is in its way"),
        pytest.param({}, True, [], NOTHING, id="suspended"),
        pytest.param({"reason": "Released"}, False, [], NOTHING, id="it waits a while"),
    ],
)
def test_between_attempts_all_that_decides_about_the_next_is_read(
    make_job: Callable[..., Any],
    make_pod: Any,
    reads: Reads,
    now: datetime,
    status: dict[str, Any],
    suspend: bool,
    pods: list[Any],
    wanted: set[Read],
) -> None:
    """Everything that decides whether the next attempt may start; nothing if none is to start now."""
    before = open_attempt(now, **{"reason": "Terminated", "end": rfc3339(now), **status})

    assert reads(make_job(before, suspend=suspend), [], [make_pod(**pod) for pod in pods]) == wanted
    assert reads(make_job(finished(before), suspend=suspend)) == NOTHING


@pytest.mark.parametrize(
    ("suspend", "over", "pods", "wanted"),
    [
        pytest.param(False, False, [], {JOBS, PODS, TIERS}, id="another follows"),
        pytest.param(False, False, [{"phase": "Running"}], {JOBS, PODS, HEALTH}, id="a pod still runs"),
        pytest.param(True, False, [], {JOBS, PODS}, id="suspended"),
        pytest.param(False, True, [], {JOBS, PODS}, id="finished"),
        pytest.param(False, True, [{"phase": "Running"}], {JOBS, PODS}, id="finished, and a pod still runs"),
    ],
)
def test_while_an_attempt_ends_its_pods_are_read(
    make_job: Callable[..., Any],
    make_pod: Any,
    reads: Reads,
    now: datetime,
    suspend: bool,
    over: bool,
    pods: list[Any],
    wanted: set[Read],
) -> None:
    """Whether its Job is gone indeed and its pods go, and what the next attempt needs, since it starts with the last of
    them."""
    status = open_attempt(now, reason="Terminated")
    job = make_job(finished(status) if over else status, suspend=suspend)

    assert reads(job, [], [make_pod(**pod) for pod in pods]) == wanted


FAILED = {"failed": True, "failing": ReasonMessage("BackoffLimitExceeded", "")}


@pytest.mark.parametrize(
    ("job", "running", "suspend", "wanted"),
    [
        pytest.param(None, "False", False, {JOBS, PODS, HEALTH}, id="the Job is not there"),
        pytest.param({"deleting": True}, "True", False, {JOBS, PODS, HEALTH}, id="the Job is being deleted"),
        pytest.param({"controlled": False}, "False", False, {JOBS, PODS, HEALTH}, id="somebody else's Job"),
        pytest.param({"attempt": 7}, "False", False, {JOBS, PODS, HEALTH}, id="another attempt's Job"),
        pytest.param({"complete": True}, "True", False, {PODS}, id="complete"),
        pytest.param(FAILED, "True", False, {PODS, HEALTH}, id="failed"),
        pytest.param({"ready": 2}, "True", True, {PODS, HEALTH}, id="to be suspended"),
        pytest.param({"suspended": True}, "False", False, NOTHING, id="in the queue"),
        pytest.param({"ready": 2}, "True", False, NOTHING, id="all run"),
        pytest.param({"ready": 1}, "True", False, {PODS}, id="one is not ready any more"),
        pytest.param({"ready": 0}, "True", False, {PODS, HEALTH}, id="none is, and perhaps no node"),
        pytest.param({"ready": 2}, "False", False, {PODS}, id="all are up just now"),
        pytest.param({"ready": 1}, "False", False, NOTHING, id="not all up, but soon"),
    ],
)
def test_an_attempt_that_does_well_costs_no_request(
    make_job: Callable[..., Any],
    make_attempt_job: Any,
    make_pod: Any,
    reads: Reads,
    now: datetime,
    job: dict[str, Any] | None,
    running: str,
    suspend: bool,
    wanted: set[Read],
) -> None:
    """What an attempt's Job tells by itself is enough while it goes well."""
    jobs = [] if job is None else [make_attempt_job(**job)]
    since = now if job == {"ready": 0} else None
    pods = [make_pod(index, phase="Running", node="n", unready_since=since) for index in range(2)]

    assert reads(make_job(open_attempt(now, running), suspend=suspend), jobs, pods) == wanted


GRACE = MIN_STARTUP_GRACE
SECOND = timedelta(seconds=1)
UNSCHEDULABLE = {"unschedulable": "0/7 nodes are available"}


@pytest.mark.parametrize(
    ("age", "pod", "spec", "wanted"),
    [
        pytest.param(GRACE - SECOND, {}, {}, NOTHING, id="has just begun"),
        pytest.param(GRACE, {}, {}, {PODS, WARNINGS}, id="takes its time"),
        pytest.param(GRACE, UNSCHEDULABLE, {}, {PODS}, id="the scheduler says why"),
        pytest.param(timedelta(seconds=300), UNSCHEDULABLE, {}, {PODS, TIERS}, id="another tier may do"),
        pytest.param(
            SECOND, {}, {"pendingDeadlineSeconds": 1}, {PODS, WARNINGS}, id="the deadline's message asks"
        ),
        pytest.param(SECOND, {}, {"pendingDeadlineSeconds": 2}, NOTHING, id="before the deadline"),
    ],
)
def test_why_pods_do_not_start_is_asked_late(
    make_job: Callable[..., Any],
    make_attempt_job: Any,
    make_pod: Any,
    reads: Reads,
    now: datetime,
    age: timedelta,
    pod: dict[str, Any],
    spec: Any,
    wanted: set[Read],
) -> None:
    """Nobody asks why pods are not up before they had a chance, or a deadline is due."""
    pods = [make_pod(index, **pod) for index in range(2)]
    jobs = [make_attempt_job(ready=0, parallelism=2)]

    found = reads(make_job(open_attempt(now - age), **spec), jobs, pods)

    assert found - {HEALTH} == wanted


def test_under_load_pods_get_longer(
    make_job: Callable[..., Any], make_attempt_job: Any, reads: Reads, now: datetime
) -> None:
    """Nobody asks why pods are not up before the time that they may take has passed."""
    long = timedelta(seconds=30)

    found = [
        reads(make_job(open_attempt(now - age)), [make_attempt_job(ready=1)], startup_grace=long)
        for age in (long - SECOND, long)
    ]
    assert found == [NOTHING, {PODS, WARNINGS}]


@pytest.mark.parametrize("stage", ["fetch", "publish"])
@pytest.mark.parametrize(
    ("job", "running", "wanted"),
    [
        pytest.param({"ready": 1}, "True", NOTHING, id="it runs"),
        pytest.param({"ready": 0}, "True", {PODS}, id="it is not ready any more"),
        pytest.param({"ready": 1}, "False", {PODS}, id="it is up just now"),
        pytest.param({"complete": True}, "True", {PODS}, id="it is done: its report is read"),
    ],
)
def test_a_transfer_needs_one_pod(
    make_job: Callable[..., Any],
    make_attempt_job: Any,
    reads: Reads,
    now: datetime,
    stage: str,
    job: Any,
    running: str,
    wanted: set[Read],
) -> None:
    """A transfer does well with one pod, however many ranks the job has."""
    status = open_attempt(now, running, stage=stage)

    assert reads(make_job(status), [make_attempt_job(**job)]) == wanted
