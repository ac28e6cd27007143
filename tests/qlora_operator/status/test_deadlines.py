"""Deadlines of a job, of its ranks and of their progress."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_contract.units import rfc3339
from qlora_operator.status.actions import Decision

Status = Callable[..., dict[str, Any]]

UNSCHEDULABLE = "0/7 nodes are available: 7 Insufficient cpu"


@pytest.mark.parametrize(
    ("age", "attempt_job", "spec", "reason"),
    [
        pytest.param(59, {}, {"activeDeadlineSeconds": 60}, None, id="active for less"),
        pytest.param(60, {}, {"activeDeadlineSeconds": 60}, "DeadlineExceeded", id="active for as long"),
        pytest.param(
            60, None, {"activeDeadlineSeconds": 60}, "DeadlineExceeded", id="before the Job is there"
        ),
        pytest.param(
            60, {"complete": True}, {"activeDeadlineSeconds": 60}, "Succeeded", id="done just in time"
        ),
        pytest.param(59, {}, {"pendingDeadlineSeconds": 60}, None, id="pending for less"),
        pytest.param(
            60, {}, {"pendingDeadlineSeconds": 60}, "PendingDeadlineExceeded", id="pending for as long"
        ),
        pytest.param(
            60, {"ready": 1}, {"pendingDeadlineSeconds": 60}, "PendingDeadlineExceeded", id="one is up"
        ),
        pytest.param(
            99,
            {"suspended": True},
            {"pendingDeadlineSeconds": 60, "scheduling": {"queueName": "q"}},
            "PendingDeadlineExceeded",
            id="in the queue",
        ),
        pytest.param(99, {}, {"pendingDeadlineSeconds": 60, "suspend": True}, "Suspended", id="suspended"),
        pytest.param(99, {}, {"activeDeadlineSeconds": 60, "suspend": True}, "Suspended", id="held in time"),
    ],
)
def test_a_deadline_ends_attempt_and_job_while_pods_start(
    starting: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    now: datetime,
    age: float,
    attempt_job: dict[str, Any] | None,
    spec: dict[str, Any],
    reason: str | None,
) -> None:
    """A deadline that has passed ends attempt and job; suspended and finished jobs have none."""
    jobs = [] if attempt_job is None else [make_attempt_job(**{"parallelism": 2, **attempt_job})]
    status = starting(age, now) if attempt_job is not None else starting(age, now, attempts=[{"attempt": 0}])

    assert ask(status, jobs, [], spec=spec).status.attempts[0].reason == reason


def test_the_next_deadline_is_looked_at_in_time(
    starting: Status, ask: Callable[..., Decision], make_attempt_job: Any, now: datetime
) -> None:
    """The next deadline is the time at which the job is looked at again, if nothing is due before."""
    spec = {"activeDeadlineSeconds": 65, "pendingDeadlineSeconds": 63}

    decision = ask(starting(60, now), [make_attempt_job(parallelism=2)], [], spec=spec)

    assert decision.look_at == now + timedelta(seconds=3)


@pytest.mark.parametrize(
    ("limit", "attempts", "pods", "words"),
    [
        pytest.param(
            60, 1, [{"unschedulable": UNSCHEDULABLE}], UNSCHEDULABLE, id="what the scheduler says now"
        ),
        pytest.param(60, 2, [{}], "no pod was scheduled, earlier", id="what the last attempt gave up for"),
        pytest.param(60, 1, [{}], "what was said last", id="what was said last"),
    ],
)
def test_a_pending_deadline_says_what_the_job_waited_for(
    starting: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    now: datetime,
    limit: int,
    attempts: int,
    pods: list[dict[str, Any]],
    words: str,
) -> None:
    """The message says what the job had waited for: as it is now, or as it was when somebody last knew."""
    gave_up = {"attempt": 0, "start": rfc3339(now), "end": rfc3339(now), "reason": "SteppedDown"}
    history = [{**gave_up, "message": "no pod was scheduled, earlier"}] if attempts == 2 else []
    last = {"attempt": attempts - 1, "start": rfc3339(now)}
    status = starting(99, now, attempt=attempts - 1, attempts=[*history, last], message="what was said last")
    attempt_job = make_attempt_job(attempts - 1, parallelism=2)

    seen = [make_pod(n, attempts - 1, **fields) for n, fields in enumerate(pods)]
    decision = ask(status, [attempt_job], seen, spec={"pendingDeadlineSeconds": limit})

    assert decision.status.message.endswith(f"pendingDeadlineSeconds: {limit}: {_prefix(pods)}{words}")


def _prefix(pods: list[dict[str, Any]]) -> str:
    return "pod job-a0-0: " if pods[0] else ""


@pytest.mark.parametrize(
    ("step_age", "told_age", "seconds", "ends"),
    [
        pytest.param(1800, 1800, 1800, True, id="no step for as long"),
        pytest.param(1799, 1799, 1800, False, id="for less"),
        pytest.param(1800, 1800, 1801, False, id="a longer deadline"),
        pytest.param(9000, 9000, 1800, False, id="only an earlier attempt has told"),
        pytest.param(9000, 100, 1800, True, id="stands where an earlier attempt stood"),
        pytest.param(None, None, 1, False, id="never told"),
    ],
)
def test_an_attempt_that_makes_no_step_ends(
    running: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    now: datetime,
    step_age: float | None,
    told_age: float | None,
    seconds: int,
    ends: bool,
) -> None:
    """A attempt_job that has told of its progress and makes no step ends at the user's expense; one that never told
    does not."""
    status = running()  # for an hour
    if step_age is not None and told_age is not None:
        times = {"stepTime": step_age, "updatedTime": told_age}
        told = {key: rfc3339(now - timedelta(seconds=age)) for key, age in times.items()}
        status["progress"] = {"step": 3, "totalSteps": 10, **told}

    after = ask(
        status, [make_attempt_job(ready=2, parallelism=2)], [], spec={"progressDeadlineSeconds": seconds}
    ).status

    assert after.attempts[0].reason == ("ProgressDeadlineExceeded" if ends else None)
    assert after.restarts.user == int(ends)


@pytest.mark.parametrize(
    ("advance_age", "advances", "ends"),
    [
        pytest.param(1799, 7, None, id="evaluates"),
        pytest.param(
            1800, 7, "nothing advanced for progressDeadlineSeconds: 1800, since step 10", id="hangs"
        ),
        pytest.param(
            None,
            None,
            "no step was completed for progressDeadlineSeconds: 1800, since step 10",
            id="does not count",
        ),
    ],
)
def test_a_rank_that_advances_without_steps_goes_on(
    running: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    now: datetime,
    advance_age: float | None,
    advances: int | None,
    ends: str | None,
) -> None:
    """However long the last step is ago, as while a finished job is evaluated."""
    ages = {"stepTime": 9000.0, "updatedTime": 10.0, "advanceTime": advance_age}
    told = {name: rfc3339(now - timedelta(seconds=age)) for name, age in ages.items() if age is not None}
    status = {**running(), "progress": {"step": 10, "totalSteps": 10, "advances": advances, **told}}

    attempt = ask(status, [make_attempt_job(ready=2, parallelism=2)], []).status.attempts[0]

    assert (attempt.reason, attempt.message) == (("ProgressDeadlineExceeded", ends) if ends else (None, None))


@pytest.mark.parametrize(("attempt", "ends"), [(0, True), (7, False)])
def test_whose_progress_it_is_does_not_depend_on_clocks(
    running: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    now: datetime,
    attempt: int,
    ends: bool,
) -> None:
    """The time of a report is of rank 0's clock, and that of the attempt's start of the operator's."""
    hours = {0: now - timedelta(hours=9), 7: now + timedelta(hours=9)}
    told = {"stepTime": START, "updatedTime": rfc3339(hours[attempt]), "attempt": attempt}
    status = {**running(), "progress": {"step": 3, "totalSteps": 10, **told}}

    after = ask(status, [make_attempt_job(ready=2, parallelism=2)], [], spec={"progressDeadlineSeconds": 60})

    assert (after.status.attempts[0].reason == "ProgressDeadlineExceeded") == ends


START = "2026-01-31T11:00:00Z"
REMOTE = {
    "model": {"source": "hf://org/model"},
    "dataset": {"source": "s3://bucket/data.jsonl"},
    "output": {"destination": "s3://bucket/adapters"},
}
TRANSFERS = pytest.mark.parametrize("stage", ["fetch", "publish"])


@pytest.mark.parametrize("stage", [None, "publish"])
@pytest.mark.parametrize("deadline", ["pendingDeadlineSeconds", "activeDeadlineSeconds"])
def test_a_trained_job_has_met_its_deadlines(
    starting: Status, ask: Callable[..., Decision], now: datetime, stage: str | None, deadline: str
) -> None:
    """An adapter that is verified and stored is not given up because there is no room to send it, or none yet."""
    trained = {"attempt": 0, "start": START, "end": rfc3339(now), "reason": "Trained"}
    attempts = [trained, {"attempt": 1, "start": START, "stage": stage}] if stage else [trained]
    adapter = {"adapter": {"uri": "pvc://team/work/jobs/job/adapter"}}
    status = starting(3000, now, attempt=len(attempts) - 1, attempts=attempts, **adapter)
    spec = {"output": REMOTE["output"], deadline: 1}

    decision = ask(status, [], [], tiers=[], spec=spec)

    assert decision.status.phase != "Failed"
    assert decision.status.completion_time is None


@TRANSFERS
def test_a_transfer_may_take_longer_than_a_step(
    transferring: Status, ask: Callable[..., Decision], make_attempt_job: Any, now: datetime, stage: str
) -> None:
    """progressDeadlineSeconds is about steps: a transfer makes none, however late the ranks' last report came."""
    late = {"step": 10, "totalSteps": 10, "stepTime": START, "updatedTime": rfc3339(now)}
    before = transferring(stage, progress=late)

    status = ask(
        before, [make_attempt_job(ready=1, parallelism=1)], spec={**REMOTE, "progressDeadlineSeconds": 1}
    ).status

    assert status.attempts[0].reason is None
    assert status.restarts.user == 0
