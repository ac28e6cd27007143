"""The end of an attempt's pods."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from qlora_operator.api.names import Reason
from qlora_operator.status.actions import Decision, DeleteNetwork, DeletePod, StartAttempt
from qlora_operator.status.observation import Pod, ReasonMessage
from qlora_operator.status.teardown import OVERDUE, blocking_pods, delete_leftover_jobs, delete_network
from qlora_operator.status.view import JobView

Status = Callable[..., dict[str, Any]]

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
MOMENT = timedelta(seconds=1)
GOES = Pod("p", "u", 0, 0, "Running", node="n", deleting_since=NOW - OVERDUE)
RUNS = replace(GOES, deleting_since=None)
OVERTIME = replace(GOES, name="late", deleting_since=NOW - OVERDUE - MOMENT)
LOST = replace(RUNS, name="q", node="lost")
REMOTE = {
    "model": {"source": "hf://org/model"},
    "dataset": {"source": "s3://bucket/data.jsonl"},
    "output": {"destination": "s3://bucket/adapters"},
}
TRANSFERS = pytest.mark.parametrize("stage", ["fetch", "publish"])
HINT = (
    "the job continues when the node is back, is deleted, or has the taint node.kubernetes.io/out-of-service"
)


@pytest.mark.parametrize(
    ("pods", "reason", "message"),
    [
        ([GOES], Reason.PODS_REMAIN, "waiting for 1 pod(s) of an earlier attempt to end: p"),
        ([RUNS] * 4, Reason.PODS_REMAIN, "waiting for 4 pod(s) of an earlier attempt to end: p, p, p, ..."),
        (
            [GOES, OVERTIME],
            Reason.NODE_LOST,
            f"pod late may still run on node n, which does not end it: {HINT}",
        ),
        (
            [OVERTIME, LOST],
            Reason.NODE_LOST,
            f"pod q may still run on node lost, which does not answer: {HINT}",
        ),
        (
            [replace(OVERTIME, node=None)],
            Reason.PODS_REMAIN,
            "waiting for 1 pod(s) of an earlier attempt to end: late",
        ),
    ],
    ids=["in-time", "many", "overdue", "lost", "nowhere"],
)
def test_a_pod_that_its_node_does_not_end_is_named(
    make_view: Callable[..., JobView], pods: list[Pod], reason: Reason, message: str
) -> None:
    """A pod that its node does not end, or whose node does not respond, holds the job under that node's name."""
    blocking = blocking_pods(make_view(at=NOW, lost_nodes=frozenset({"lost"})), pods)

    assert (blocking.reason, blocking.message) == (reason, message)


@pytest.mark.parametrize(
    ("attempt_job", "pods", "ended"),
    [
        pytest.param(None, [], True, id="all gone"),
        pytest.param(None, [{"phase": "Failed"}], True, id="over, and kept for its logs"),
        pytest.param(None, [{"phase": "Running"}], False, id="a pod without its Job"),
        pytest.param({"deleting": True}, [], False, id="the Job is not gone yet"),
        pytest.param({"failed": True}, [{"phase": "Failed"}], True, id="failed by itself"),
        pytest.param({"failed": True}, [{"phase": "Running"}], False, id="a pod outlives its failed Job"),
        pytest.param({"deleting": True}, None, False, id="nobody looked at the pods"),
    ],
)
def test_an_attempt_ends_with_its_last_pod(
    running: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    attempt_job: dict[str, Any] | None,
    pods: list[dict[str, Any]] | None,
    ended: bool,
) -> None:
    """An attempt that is to end has ended when its Job makes no more pods and none of them runs."""
    jobs = [] if attempt_job is None else [make_attempt_job(failing=ReasonMessage("", ""), **attempt_job)]
    seen = None if pods is None else [make_pod(n, node="n", **each) for n, each in enumerate(pods)]

    status = ask(running(reason="UnexpectedError"), jobs, seen, tiers=[]).status

    assert (status.attempts[0].end is not None) == ended


SHORT = {"type": "Initialized", "status": "False", "reason": "QuotaExceeded", "message": ""}


@pytest.mark.parametrize(
    ("attempt", "conditions", "gone"),
    [
        pytest.param({}, [], ["job-a0", "job-a1"], id="the newest failure's stays"),
        pytest.param(
            {"end": "2026-01-01T11:00:00Z"}, [], ["job-a0", "job-a1", "job-a2"], id="another has ended"
        ),
        pytest.param({}, [SHORT], ["job-a0", "job-a1", "job-a2"], id="a quota counts it"),
        pytest.param(
            {},
            [{**SHORT, "type": "Finished", "status": "True"}],
            ["job-a0", "job-a1", "job-a2"],
            id="the job is over",
        ),
    ],
)
def test_the_logs_of_the_newest_failure_stay_while_the_next_attempt_lasts(
    make_view: Callable[..., JobView],
    make_attempt_job: Any,
    attempt: dict[str, Any],
    conditions: list[dict[str, Any]],
    gone: list[str],
) -> None:
    """Whoever wants to know why it failed has that long to read them; what was done, or older, goes."""
    jobs = [
        make_attempt_job(0, failed=True),
        make_attempt_job(1, complete=True),
        make_attempt_job(2, failed=True),
        make_attempt_job(3),
    ]
    since = {"lastTransitionTime": "2026-01-01T11:00:00Z"}
    status = {
        "attempt": 3,
        "attempts": [{"attempt": 3, "start": "2026-01-01T11:00:00Z", **attempt}],
        "conditions": [{**each, **since} for each in conditions],
    }

    actions = delete_leftover_jobs(make_view(status, jobs, []))

    assert [action.name for action in actions if action.name != "job-a3"] == gone


def test_orphans_are_deleted_before_anything_is_created(
    running: Status, ask: Callable[..., Decision], make_pod: Any
) -> None:
    """Pods that were left without their Job are deleted before anything is created."""
    pods = [make_pod(index, phase="Running", node="n") for index in range(2)]
    actions = ask(running(), [], pods).actions
    assert actions == tuple(DeletePod(pod.name, pod.uid) for pod in pods)


@TRANSFERS
def test_a_transfers_node_is_lost(
    transferring: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    now: datetime,
    stage: str,
) -> None:
    """A pod on a node that does not answer holds the job: it may still write into the workspace."""
    taken = {
        "disruption": ReasonMessage("DeletionByTaintManager", ""),
        "deleting_since": now - timedelta(seconds=400),
    }
    pods = [make_pod(0, phase="Running", node="n", **taken)]
    attempt_job = make_attempt_job(
        parallelism=1,
        failing=ReasonMessage("PodFailurePolicy", "Pod team/job-a0-0 has condition DisruptionTarget"),
    )

    decision = ask(transferring(stage), [attempt_job], pods, spec=REMOTE, lost_nodes=frozenset({"n"}))

    assert decision.status.attempts[0].reason == "NodeLost"
    assert decision.status.attempts[0].end is None
    assert not any(isinstance(action, StartAttempt) for action in decision.actions)
    assert decision.status.restarts.infrastructure == 1


@pytest.mark.parametrize(
    ("finished", "end", "exists", "goes"),
    [
        (True, "2026-01-31T11:30:00Z", True, True),
        (True, "2026-01-31T11:30:00Z", False, False),
        (True, None, True, False),
        (False, "2026-01-31T11:30:00Z", True, False),
    ],
    ids=["over", "gone already", "its pods may still run", "another attempt follows"],
)
def test_what_ranks_needed_goes_with_the_last_of_them(
    make_view: Callable[..., JobView], *, finished: bool, end: str | None, exists: bool, goes: bool
) -> None:
    """Finished jobs may stay for months, and each would keep a Service and a NetworkPolicy."""
    said = {"reason": "Succeeded", "message": "", "lastTransitionTime": "2026-01-31T11:30:00Z"}
    conditions = [{"type": kind, "status": str(finished), **said} for kind in ("Complete", "Finished")]
    status = {"attempt": 0, "attempts": [{"attempt": 0, "end": end}], "conditions": conditions}

    found = delete_network(make_view(status, [], [], network_exists=exists))

    assert found == ([DeleteNetwork()] if goes else [])


ADAPTER = {"uri": "pvc://team/work/jobs/job/adapter"}
FINISHED = [{**SHORT, "type": "Finished", "status": "True", "lastTransitionTime": "2026-01-01T11:30:00Z"}]
FULL = [{**SHORT, "lastTransitionTime": "2026-01-01T11:30:00Z"}]


@pytest.mark.parametrize(
    ("adapter", "conditions", "kept"),
    [
        pytest.param(ADAPTER, FINISHED, [1, 2], id="the one that trained and the last"),
        pytest.param(ADAPTER, [], [1, 2], id="while the last is at work"),
        pytest.param(None, [], [2], id="no adapter"),
        pytest.param(ADAPTER, FULL, [2], id="a quota that is full"),
    ],
)
def test_the_job_that_trained_stays_with_its_model(
    make_view: Callable[..., JobView],
    make_attempt_job: Any,
    adapter: dict[str, Any] | None,
    conditions: list[dict[str, Any]],
    kept: list[int],
) -> None:
    """`kubectl qlora chat` and `export` make their pods like its pods, also after the adapter was sent away."""
    stages = ["fetch", "train", "publish"]
    attempts = [
        {
            "attempt": number,
            "stage": stage,
            "start": "2026-01-01T11:00:00Z",
            "end": "2026-01-01T11:10:00Z",
            "reason": "X",
        }
        for number, stage in enumerate(stages)
    ]
    jobs = [make_attempt_job(number, complete=True) for number in range(3)]
    status = {"attempt": 2, "attempts": attempts, "adapter": adapter, "conditions": conditions}

    deleted = {action.name for action in delete_leftover_jobs(make_view(status, jobs, []))}

    assert [job.attempt for job in jobs if job.name not in deleted] == kept
