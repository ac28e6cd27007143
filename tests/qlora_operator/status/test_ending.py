"""Why an attempt is over, or must be."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_operator.status.actions import Decision

Status = Callable[..., dict[str, Any]]

START = "2026-01-31T11:00:00Z"


@pytest.mark.parametrize(
    ("edit", "reason", "words"),
    [
        ({"parallelism": 0}, "JobChanged", "set the parallelism of the Job job-a0 to 0"),
        ({"parallelism": 3}, "JobChanged", "set the parallelism of the Job job-a0 to 3"),
        ({"suspended": True}, "JobChanged", "suspend the QLoRAJob instead"),
        ({"deleting": True}, "JobDeleted", "another client is deleting the Job job-a0"),
        (
            {"uid": "another"},
            "JobDeleted",
            "another client deleted the Job of attempt 0, or removed its labels",
        ),
        ({"attempt": -1}, "JobDeleted", "another client deleted the Job of attempt 0, or removed its labels"),
        (
            {"controlled": False},
            "JobDeleted",
            "another client deleted the Job of attempt 0, or removed its labels",
        ),
    ],
    ids=["fewer pods", "more pods", "suspended", "deleted", "replaced", "number lost", "owner lost"],
)
def test_another_clients_change_of_a_job_ends_its_attempt(
    running: Status,
    edit: dict[str, Any],
    reason: str,
    words: str,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
) -> None:
    """Another client's change ends the attempt, at the infrastructure's expense."""
    attempt_job = make_attempt_job(**{"ready": 2, "parallelism": 2, **edit})
    pods = [make_pod(index, phase="Running", node="n", owner_uid=attempt_job.uid) for index in range(2)]
    status = ask(running(), [attempt_job], pods).status
    assert status.attempts[0].reason == reason
    assert words in (status.attempts[0].message or "")
    assert status.restarts is not None
    assert (status.restarts.user, status.restarts.infrastructure) == (0, 1)


def test_an_attempt_whose_job_is_as_it_was_made_goes_on(
    running: Status, ask: Callable[..., Decision], make_attempt_job: Any
) -> None:
    """A Job that is as it was made goes on."""
    decision = ask(running(), [make_attempt_job(ready=2, parallelism=2)])
    assert decision.status.attempts[0].reason is None
    assert decision.actions == ()


UNSCHEDULABLE = "0/7 nodes are available: 7 Insufficient cpu"
UNBOUND = 'persistentvolumeclaim "team" not found'


@pytest.mark.parametrize(
    ("seconds", "placed", "tiers", "words", "reason"),
    [
        pytest.param(299, 0, ["avx512", "avx2"], UNSCHEDULABLE, None, id="not long enough"),
        pytest.param(300, 0, ["avx512", "avx2"], UNSCHEDULABLE, "SteppedDown", id="another tier"),
        pytest.param(999, 0, ["avx512"], UNSCHEDULABLE, None, id="no other tier, and nothing to let go"),
        pytest.param(999, 0, ["avx2"], UNSCHEDULABLE, "SteppedDown", id="its own tier is gone"),
        pytest.param(999, 0, [], UNSCHEDULABLE, None, id="no tier at all"),
        pytest.param(299, 1, ["avx512", "avx2"], UNSCHEDULABLE, None, id="half placed, not long enough"),
        pytest.param(450, 1, ["avx512"], UNSCHEDULABLE, "Released", id="half placed"),
        pytest.param(450, 1, ["avx512", "avx2"], UNSCHEDULABLE, "Released", id="half placed, another tier"),
        pytest.param(999, 2, ["avx512", "avx2"], None, None, id="placed, and slow to start"),
        pytest.param(999, 0, ["avx512", "avx2"], UNBOUND, None, id="no tier helps against a missing claim"),
    ],
)
def test_an_attempt_whose_pods_find_no_nodes_gives_way(
    starting: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    now: datetime,
    seconds: float,
    placed: int,
    tiers: list[Any],
    words: str | None,
    reason: str | None,
) -> None:
    """An attempt without room gives way to the next tier, and one that holds a part of what it needs lets go of
    it; neither costs anything."""
    pods = [make_pod(n, node="n" if n < placed else None) for n in range(placed)]
    pods += [make_pod(n, unschedulable=words) for n in range(placed, 2)]

    status = ask(starting(seconds, now), [make_attempt_job(parallelism=2)], pods, tiers=tiers).status

    assert status.attempts[0].reason == reason
    assert (status.restarts.user, status.restarts.infrastructure) == (0, 0)
    if reason is not None:
        assert UNSCHEDULABLE in status.attempts[0].message


def test_time_in_a_queue_is_no_time_without_nodes(
    starting: Status, ask: Callable[..., Decision], make_attempt_job: Any, make_pod: Any, now: datetime
) -> None:
    """Time in a queue does not count as time without room."""
    admitted = now - timedelta(seconds=299)
    attempt_job = make_attempt_job(parallelism=2, admitted_at=admitted)
    pods = [make_pod(n, unschedulable=UNSCHEDULABLE) for n in range(2)]
    queued = {"scheduling": {"queueName": "q"}}

    decision = ask(starting(86_400, now), [attempt_job], pods, tiers=["avx512", "avx2"], spec=queued)

    assert decision.status.attempts[0].reason is None
    assert decision.look_at == admitted + timedelta(seconds=300)


REMOTE = {
    "model": {"source": "hf://org/model"},
    "dataset": {"source": "s3://bucket/data.jsonl"},
    "output": {"destination": "s3://bucket/adapters"},
}
TRANSFERS = pytest.mark.parametrize("stage", ["fetch", "publish"])


@TRANSFERS
@pytest.mark.parametrize("parallelism", [0, 2], ids=["none", "as many as train"])
def test_a_transfer_has_one_pod(
    transferring: Status, ask: Callable[..., Decision], make_attempt_job: Any, stage: str, parallelism: int
) -> None:
    """A transfer's Job that somebody gave another number of pods ends, though the ranks have as many."""
    status = ask(
        transferring(stage), [make_attempt_job(ready=1, parallelism=parallelism)], [], spec=REMOTE
    ).status

    assert status.attempts[0].reason == "JobChanged"
