"""Back-off, deadlines, and the time to live: exact numbers."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.units import rfc3339
from qlora_operator.api.names import Reason
from qlora_operator.api.status import Attempt, QLoRAJobStatus
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.status import policies

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
UID = "0f8fad5b-d9cb-469f-a165-70867728950e"
FAILED, TERMINATED = Reason.UNEXPECTED_ERROR, Reason.TERMINATED
SUSPENDED, STEPPED_DOWN, RELEASED = Reason.SUSPENDED, Reason.STEPPED_DOWN, Reason.RELEASED
FETCHED, TRAINED = Reason.FETCHED, Reason.TRAINED
REQUEUED, NOT_READY = Reason.REQUEUED, Reason.NOT_READY_IN_TIME


def attempts(*reasons: Reason) -> list[Attempt]:
    """One attempt for each reason, in order."""
    return [Attempt(attempt=number, reason=reason) for number, reason in enumerate(reasons)]


@pytest.mark.parametrize(
    ("starting", "seconds"),
    [
        pytest.param(0, 3, id="none"),
        pytest.param(30, 3, id="a few"),
        pytest.param(100, 10, id="ten looks a second"),
        pytest.param(10_000, 60, id="never longer than a minute"),
    ],
)
def test_the_startup_grace_grows_with_the_attempts_that_start(starting: int, seconds: int) -> None:
    """Under load, pods are given longer before the operator asks why they are not up."""
    assert policies.startup_grace(starting) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("reasons", "seconds"),
    [
        pytest.param([], 0, id="none before"),
        pytest.param([FAILED], 0, id="the first failure is singular"),
        pytest.param([FAILED, FAILED], 10, id="the second in a row"),
        pytest.param([FAILED, TERMINATED, FAILED], 20, id="whoever's doing it was"),
        pytest.param([FAILED] * 6, 160, id="doubled each time"),
        pytest.param([FAILED] * 7, 320, id="almost at most"),
        pytest.param([FAILED] * 8, 360, id="at most six minutes"),
        pytest.param([FAILED] * 20, 360, id="still six minutes"),
        pytest.param([FAILED, FAILED, SUSPENDED], 0, id="a suspension breaks the row"),
        pytest.param([FAILED, FAILED, SUSPENDED, FAILED], 0, id="one after a suspension"),
        pytest.param([STEPPED_DOWN] * 4, 0, id="stepping down is no failure"),
        pytest.param([FAILED, STEPPED_DOWN, FAILED, FAILED], 10, id="two after stepping down"),
        pytest.param([RELEASED], 10, id="who lets go waits at once"),
        pytest.param([RELEASED, RELEASED, RELEASED], 20, id="and longer each time"),
        pytest.param([STEPPED_DOWN, RELEASED], 10, id="let go after stepping down"),
        pytest.param([FETCHED], 0, id="a fetch is no failure"),
        pytest.param([FAILED, FAILED, FETCHED], 0, id="a fetch that was done at last"),
        pytest.param([FETCHED, TRAINED], 0, id="everything went well"),
        pytest.param([FAILED, FAILED, FETCHED, FAILED], 0, id="the ranks' first failure"),
        pytest.param([FETCHED, TRAINED, FAILED, FAILED], 10, id="the upload's second failure"),
        pytest.param([NOT_READY], 60, id="not ready in time for its queue"),
        pytest.param([NOT_READY] * 3, 240, id="longer each time"),
        pytest.param([NOT_READY] * 20, 3600, id="at most an hour"),
        pytest.param([NOT_READY, NOT_READY, REQUEUED], 0, id="one that was preempted begins anew"),
        pytest.param([NOT_READY, FAILED], 0, id="so does one that ran"),
    ],
)
def test_backoff_grows_with_failures_in_a_row(reasons: list[Reason], seconds: float) -> None:
    """Seconds before the next attempt, up to a fifth more or less."""
    waited = policies.backoff(UID, attempts(*reasons))

    assert 0.8 * seconds <= waited <= 1.2 * seconds


@pytest.mark.parametrize(
    ("steps", "seconds"),
    [
        pytest.param([None, None, None], 20, id="no checkpoint at all"),
        pytest.param([5, 5, 5], 20, id="the same all the time"),
        pytest.param([5, None, 5], 20, id="the same, once not told of"),
        pytest.param([5, 10, 15], 0, id="each got on"),
        pytest.param([None, None, 5], 0, id="the last one got on"),
        pytest.param([5, 10, 10], 10, id="the last one did not"),
    ],
)
def test_a_new_checkpoint_begins_another_row(steps: list[int | None], seconds: float) -> None:
    """Eight drains, one a day, are no row of failures."""
    row = [
        attempt.model_copy(update={"checkpoint_step": step})
        for attempt, step in zip(attempts(FAILED, TERMINATED, FAILED), steps, strict=True)
    ]

    assert 0.8 * seconds <= policies.backoff(UID, row) <= 1.2 * seconds


def test_backoff_spreads_jobs() -> None:
    """Jobs that failed together do not come back together, and each always after the same time."""
    failed = attempts(FAILED, FAILED)
    waits = {policies.backoff(f"uid-{number}", failed) for number in range(100)}

    assert len(waits) > 50
    assert policies.backoff(UID, failed) == policies.backoff(UID, failed)


@given(st.lists(st.sampled_from([FAILED, TERMINATED, SUSPENDED, STEPPED_DOWN, RELEASED]), max_size=20))
def test_backoff_is_bounded(reasons: list[Reason]) -> None:
    """Whatever went before, nobody waits for longer than seven minutes and a bit."""
    assert 0 <= policies.backoff(UID, attempts(*reasons)) <= 1.2 * policies.MAX_BACKOFF_SECONDS


def test_release_jitter_differs_between_jobs() -> None:
    """Two attempts that block each other let go at different times, and each differently the next time."""
    shares = {policies.release_jitter(uid, attempt) for uid in "abcdef" for attempt in range(10)}

    assert all(0 <= share <= 1 for share in shares)
    assert len(shares) > 30


def said(kind: str, status: str, minutes: float) -> dict[str, Any]:
    """A condition that changed so many minutes before noon."""
    since = rfc3339(NOON - timedelta(minutes=minutes))
    return {"type": kind, "status": status, "reason": "R", "message": "m", "lastTransitionTime": since}


@pytest.mark.parametrize(
    ("conditions", "minutes"),
    [
        pytest.param([], 0, id="nothing said yet"),
        pytest.param([said("Running", "False", 5)], 5, id="never run"),
        pytest.param([said("Running", "False", 5), said("Suspended", "False", 2)], 2, id="resumed"),
        pytest.param([said("Running", "False", 2), said("Suspended", "False", 5)], 2, id="failed after that"),
        pytest.param([said("Running", "False", 5), said("Suspended", "True", 2)], 5, id="suspended"),
    ],
)
def test_pending_counts_from_when_not_all_ranks_ran(conditions: list[dict[str, Any]], minutes: float) -> None:
    """A job waits since it last ran all its ranks, or was resumed; however many attempts there were."""
    status = QLoRAJobStatus.model_validate({"conditions": conditions})

    assert policies.pending_since(status, NOON) == NOON - timedelta(minutes=minutes)


@pytest.mark.parametrize(
    ("seconds", "conditions", "due"),
    [
        pytest.param(None, [said("Running", "False", 5)], None, id="no limit"),
        pytest.param(60, [said("Running", "True", 5)], None, id="all ranks run"),
        pytest.param(60, [said("Running", "False", 5)], NOON - timedelta(minutes=4), id="long over"),
        pytest.param(600, [said("Running", "False", 5)], NOON + timedelta(minutes=5), id="to come"),
    ],
)
def test_the_pending_deadline_is_that_of_jobs_that_wait(
    a_job: Callable[..., QLoRAJob], seconds: int | None, conditions: list[Any], due: datetime | None
) -> None:
    """pendingDeadlineSeconds after the job began to wait."""
    status = QLoRAJobStatus.model_validate({"conditions": conditions})
    limit = {} if seconds is None else {"pendingDeadlineSeconds": seconds}

    assert policies.pending_deadline(a_job(**limit).spec, status, NOON) == due


@pytest.mark.parametrize(
    ("seconds", "status", "due"),
    [
        pytest.param(None, {"startTime": rfc3339(NOON)}, None, id="no limit"),
        pytest.param(90, {}, None, id="not begun"),
        pytest.param(90, {"startTime": rfc3339(NOON)}, NOON + timedelta(seconds=90), id="begun"),
        pytest.param(
            90,
            {"startTime": rfc3339(NOON), "conditions": [said("QuotaReserved", "False", 5)]},
            None,
            id="in the queue again",
        ),
        pytest.param(
            90,
            {"startTime": rfc3339(NOON), "conditions": [said("QuotaReserved", "True", 5)]},
            NOON + timedelta(seconds=90),
            id="let in",
        ),
    ],
)
def test_the_active_deadline_stands_still_in_a_queue(
    a_job: Callable[..., QLoRAJob], seconds: int | None, status: dict[str, Any], due: datetime | None
) -> None:
    """activeDeadlineSeconds after startTime; the clock stands still in a queue."""
    limit = {} if seconds is None else {"activeDeadlineSeconds": seconds}

    assert policies.active_deadline(a_job(**limit).spec, QLoRAJobStatus.model_validate(status)) == due


@pytest.mark.parametrize(
    ("seconds", "finished", "due"),
    [
        pytest.param(None, True, None, id="no limit"),
        pytest.param(60, False, None, id="not finished"),
        pytest.param(60, True, NOON + timedelta(seconds=60), id="a minute"),
        pytest.param(0, True, NOON, id="at once"),
    ],
)
def test_a_finished_job_expires_after_its_time_to_live(
    a_job: Callable[..., QLoRAJob], seconds: int | None, finished: bool, due: datetime | None
) -> None:
    """ttlSecondsAfterFinished after completionTime."""
    status = QLoRAJobStatus(completion_time=rfc3339(NOON) if finished else None)
    limit = {} if seconds is None else {"ttlSecondsAfterFinished": seconds}

    assert policies.expiry(a_job(**limit).spec, status) == due


@pytest.mark.parametrize(
    ("ends", "nodes"),
    [
        pytest.param([], (), id="none"),
        pytest.param([("AdmissionRejected", "a", 10)], ("a",), id="a kubelet refused a pod"),
        pytest.param([("Killed", "a", 10)], (), id="once by itself"),
        pytest.param([("Killed", "a", 10), ("UnexpectedError", "a", 20)], ("a",), id="twice by itself"),
        pytest.param([("Killed", "a", 10), ("Killed", "b", 20)], (), id="on two nodes"),
        pytest.param([("AdmissionRejected", "a", 3601)], (), id="more than an hour ago"),
        pytest.param([("Drained", None, 10), ("Drained", None, 20)], (), id="by nobody's fault"),
    ],
)
def test_nodes_where_attempts_ended_are_left_to_others_for_an_hour(
    ends: list[tuple[str, str | None, int]], nodes: tuple[str, ...]
) -> None:
    """Labels say that a node fits, and its kubelet, or its memory, that it does not."""
    attempts = [
        Attempt(attempt=number, reason=reason, node=node, end=rfc3339(NOON - timedelta(seconds=ago)))
        for number, (reason, node, ago) in enumerate(ends)
    ]

    assert policies.shunned(attempts, NOON) == nodes
