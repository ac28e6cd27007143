"""What checks may look at."""

import dataclasses
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from qlora_operator.status.observation import Observation, Read
from qlora_operator.status.view import JobView, ReadRequired

MakeView = Callable[..., JobView]


@pytest.mark.parametrize(
    ("attempts", "last", "is_open"),
    [
        pytest.param([], None, False, id="none"),
        pytest.param([{"attempt": 0}], 0, True, id="one that lasts"),
        pytest.param([{"attempt": 0, "reason": "Terminated"}], 0, True, id="one that is ending"),
        pytest.param([{"attempt": 0, "end": "t"}, {"attempt": 1, "end": "t"}], 1, False, id="all over"),
    ],
)
def test_the_last_attempt_is_open_until_all_of_it_is_gone(
    make_view: MakeView, attempts: list[Any], last: int | None, is_open: bool
) -> None:
    """A reason does not end an attempt; its last pod's end does."""
    view = make_view({"attempts": attempts})

    assert (view.last_attempt.attempt if view.last_attempt else None) == last
    assert (view.open_attempt is not None) == is_open


def test_job_and_pods_are_the_current_attempts(
    make_view: MakeView, make_attempt_job: Any, make_pod: Any
) -> None:
    """Of all that carries the job's uid, its own Job and pods of the current attempt; any pod may be active."""
    jobs = [
        make_attempt_job(0),
        make_attempt_job(1, controlled=False),
        make_attempt_job(1, uid="mine"),
    ]
    own = [make_pod(index, 1, owner_uid="mine") for index in (0, 1)]
    pods = [make_pod(0, 0), own[0], dataclasses.replace(own[1], phase="Failed")]
    view = make_view({"attempt": 1, "attempts": [{"attempt": 1}]}, jobs, pods)

    assert view.attempt_job is jobs[2]
    assert view.pods == pods[1:]
    assert view.active_pods == pods[:2]
    assert view.other_jobs == [jobs[0]]


@pytest.mark.parametrize(
    ("forged", "known"),
    [
        ({"name": "other"}, None),
        ({"uid": "forged"}, "job-uid-1"),
        ({"attempt": 0}, None),
    ],
    ids=["another name", "another uid than the one in the status", "another attempt"],
)
def test_a_forged_job_ends_no_attempt(
    make_view: MakeView, make_attempt_job: Any, forged: dict[str, Any], known: str | None
) -> None:
    """Whoever may create Jobs may give them labels and an owner; a complete one would be a trained adapter."""
    status = {"attempt": 1, "attempts": [{"attempt": 1, "jobUid": known}]}
    real, fake = make_attempt_job(1), make_attempt_job(**{"attempt": 1, "complete": True, **forged})

    assert make_view(status, [fake, real]).attempt_job is real
    assert make_view(status, [fake]).attempt_job is None


@pytest.mark.parametrize(("owner", "believed"), [("job-uid-0", True), ("other", False), (None, False)])
def test_a_pod_is_believed_if_the_attempts_job_has_made_it(
    make_view: MakeView, make_attempt_job: Any, make_pod: Any, owner: str | None, *, believed: bool
) -> None:
    """A pod that only carries the labels says nothing for the attempt; but it is one that may still run."""
    pod = make_pod(0, 0, owner_uid=owner)
    view = make_view({"attempt": 0, "attempts": [{"attempt": 0}]}, [make_attempt_job(0)], [pod])

    assert view.pods == ([pod] if believed else [])
    assert view.active_pods == [pod]


@pytest.mark.parametrize(
    ("look", "read"),
    [
        (lambda view: view.pods, Read.PODS),
        (lambda view: view.active_pods, Read.PODS),
        (lambda view: view.lost_nodes, Read.NODE_HEALTH),
        (lambda view: view.feasible_tiers, Read.FEASIBLE_TIERS),
        (lambda view: view.warnings, Read.WARNINGS),
        (lambda view: view.confirmed_job, Read.JOBS),
        (lambda view: view.deactivated, Read.WORKLOAD),
    ],
    ids=["pods", "active pods", "lost nodes", "tiers", "warnings", "a Job that is gone", "workload"],
)
def test_what_was_not_read_is_asked_for(
    make_job: Callable[..., Any], now: datetime, look: Callable[[JobView], Any], read: Read
) -> None:
    """Whoever looks at what was not read learns what to read, and what was read is not asked for again."""
    job = make_job({"attempt": 0, "attempts": [{"attempt": 0}]})
    assert job.status is not None
    view = JobView(job, Observation(), now, job.status)

    with pytest.raises(ReadRequired) as raised:
        look(view)
    assert raised.value.reads == {read}
    known = Observation(
        jobs_listed=True, pods=(), lost_nodes=frozenset(), feasible_tiers=(), warnings=(), deactivated=""
    )
    look(dataclasses.replace(view, seen=known))


@pytest.mark.parametrize(
    ("facts", "asks"), [({}, False), ({"deleting": True}, True)], ids=["it exists", "it is going"]
)
def test_a_job_that_exists_is_taken_from_the_watch(
    make_view: MakeView, make_attempt_job: Any, facts: dict[str, bool], asks: bool
) -> None:
    """Only that a Job is gone, or going, needs the API server's word."""
    view = make_view({"attempt": 0, "attempts": [{"attempt": 0}]}, [make_attempt_job(0, **facts)])

    if asks:
        with pytest.raises(ReadRequired):
            _ = view.confirmed_job
    else:
        assert view.confirmed_job is view.attempt_job


@pytest.mark.parametrize(
    ("attempts", "stage", "desired"),
    [
        ([], "train", 2),
        ([{"attempt": 0}], "train", 2),
        ([{"attempt": 0, "stage": "fetch"}], "fetch", 1),
        ([{"attempt": 0, "stage": "fetch", "end": "t"}, {"attempt": 1, "stage": "train"}], "train", 2),
        ([{"attempt": 1, "stage": "train", "end": "t"}, {"attempt": 2, "stage": "publish"}], "publish", 1),
    ],
    ids=["none yet", "of an operator that knew no stages", "fetch", "train", "publish"],
)
def test_the_stage_is_the_last_attempts(
    make_view: MakeView, attempts: list[Any], stage: str, desired: int
) -> None:
    """What the last attempt does decides how many pods it has."""
    view = make_view({"attempts": attempts})

    assert (view.stage, view.desired_pods) == (stage, desired)


def test_nobody_can_write_to_a_view(make_view: MakeView) -> None:
    """Checks return what they find; only the builder writes."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_view().status = None  # type: ignore[misc, assignment]
