"""What becomes of the open attempt: how it goes, and all that ends it."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_contract.progress import ProgressReport
from qlora_operator.api.times import parse, stamp
from qlora_operator.status.decision import decide
from qlora_operator.status.draft import Decision, DeleteGang, DeletePod, RestoreNetwork, StartAttempt
from qlora_operator.status.observation import Feasible, Observation, Said, Warned

START = "2026-01-31T11:00:00Z"


def running(**attempt: Any) -> dict[str, Any]:
    """The status of a job whose attempt 0 runs."""
    since = {"message": "", "lastTransitionTime": START, "status": "True"}
    return {
        "attempt": 0,
        "attempts": [{"attempt": 0, "start": START, "jobUid": "gang-0", **attempt}],
        "placement": {"isa": "avx512", "worldSize": 2},
        "conditions": [
            {"type": "Initialized", "reason": "Started", **since},
            {"type": "Running", "reason": "Training", **since},
        ],
        "startTime": START,
    }


@pytest.fixture
def judge(make_job: Callable[..., Any], now: datetime) -> Callable[..., Decision]:
    """judge(status, gangs, pods, **observed) -> the decision."""

    def made(status: Any, gangs: list[Any], pods: list[Any] | None = None, **observed: Any) -> Decision:
        seen = Observation(
            gangs=tuple(gangs),
            pods=None if pods is None else tuple(pods),
            feasible=Feasible(("avx512",)),
            **observed,
        )
        return decide(make_job(status), seen, now)

    return made


@pytest.mark.parametrize(
    ("edit", "reason", "words"),
    [
        ({"parallelism": 0}, "JobChanged", "the parallelism of the Job job-a0 was set to 0"),
        ({"parallelism": 3}, "JobChanged", "the parallelism of the Job job-a0 was set to 3"),
        ({"suspended": True}, "JobChanged", "suspend the QLoRAJob instead"),
        ({"deleting": True}, "JobDeleted", "is being deleted by somebody else"),
        ({"uid": "another"}, "JobDeleted", "was deleted, or lost its labels"),
        ({"attempt": -1}, "JobDeleted", "was deleted, or lost its labels"),
        ({"ours": False}, "JobDeleted", "was deleted, or lost its labels"),
    ],
    ids=["fewer pods", "more pods", "suspended", "deleted", "replaced", "number lost", "owner lost"],
)
def test_edited(
    edit: dict[str, Any],
    reason: str,
    words: str,
    judge: Callable[..., Decision],
    make_gang: Any,
    make_pod: Any,
) -> None:
    """Somebody else's change ends the attempt, at the infrastructure's expense."""
    gang = make_gang(**{"ready": 2, "parallelism": 2, **edit})
    pods = [make_pod(index, phase="Running", node="n", owner_uid=gang.uid) for index in range(2)]
    status = judge(running(), [gang], pods).status
    assert status.attempts[0].reason == reason
    assert words in (status.attempts[0].message or "")
    assert status.restarts is not None
    assert (status.restarts.user, status.restarts.infrastructure) == (0, 1)


def test_unedited(judge: Callable[..., Decision], make_gang: Any) -> None:
    """A Job that is as it was made goes on."""
    decision = judge(running(), [make_gang(ready=2, parallelism=2)])
    assert decision.status.attempts[0].reason is None
    assert decision.actions == ()


def test_network_is_restored_alone(judge: Callable[..., Decision], make_gang: Any) -> None:
    """A missing Service is made again, and never the Job along with it: it may just have been deleted."""
    decision = judge(running(), [make_gang(ready=2, parallelism=2)], incomplete=True)
    assert decision.actions == (RestoreNetwork(),)


def test_no_job_beside_another(judge: Callable[..., Decision], make_gang: Any) -> None:
    """While another attempt's Job may make pods, this one's is not created; the other one goes."""
    status = {**running(jobUid=None), "attempt": 1}
    status["attempts"] = [{"attempt": 1, "start": START}]
    decision = judge(status, [make_gang(0)], [])
    assert decision.actions == (DeleteGang("job-a0", "gang-0"),)


@pytest.mark.parametrize("over", [{"failed": True}, {"complete": True}], ids=["failed", "complete"])
def test_job_beside_one_that_is_over(
    over: dict[str, bool], judge: Callable[..., Decision], make_gang: Any
) -> None:
    """A Job that will have no more pods is in nobody's way."""
    status = {**running(), "attempt": 1, "attempts": [{"attempt": 1, "start": START}]}
    actions = judge(status, [make_gang(0, **over)], []).actions
    assert any(isinstance(action, StartAttempt) and action.attempt == 1 for action in actions)


@pytest.mark.parametrize(("age", "seconds"), [(0, 0.5), (1, 1), (4, 4), (60, 10)])
def test_children_that_cannot_be_created_are_tried_again(
    ask: Callable[..., Decision], now: datetime, age: float, seconds: float
) -> None:
    """Soon at first, since a job of the same name may be on its way out, then every ten seconds."""
    decision = ask(
        starting(age, now, attempts=[began(age, now)]), [], [], obstacle=Said("NameConflict", "no")
    )

    assert decision.look_at == now + timedelta(seconds=seconds)
    assert [type(action) for action in decision.actions] == [StartAttempt]
    assert decision.status.message == "no"


def test_emptied_status(judge: Callable[..., Decision], make_gang: Any) -> None:
    """A job whose status somebody emptied starts nothing beside the Job that is there; that one goes."""
    decision = judge(None, [make_gang(3)], [])
    assert decision.actions == (DeleteGang("job-a3", "gang-3"),)


def test_orphans(judge: Callable[..., Decision], make_pod: Any) -> None:
    """Pods that were left without their Job are deleted before anything is created."""
    pods = [make_pod(index, phase="Running", node="n") for index in range(2)]
    actions = judge(running(), [], pods).actions
    assert actions == tuple(DeletePod(pod.name, pod.uid) for pod in pods)


# --- room, tiers, and gangs in each other's way

UNSCHEDULABLE = "0/7 nodes are available: 7 Insufficient cpu"
UNBOUND = 'persistentvolumeclaim "team" not found'


def began(seconds: float, now: datetime) -> dict[str, Any]:
    """An attempt whose Job nobody has seen, so many seconds old."""
    return {"attempt": 0, "start": stamp(now - timedelta(seconds=seconds))}


def starting(seconds: float, now: datetime, **status: Any) -> dict[str, Any]:
    """The status of a job whose attempt 0 began so many seconds ago and waits for its ranks."""
    since = stamp(now - timedelta(seconds=seconds))
    said = {"message": "", "lastTransitionTime": since}
    return {
        "attempt": 0,
        "attempts": [{"attempt": 0, "start": since, "jobUid": "gang-0"}],
        "placement": {"isa": "avx512", "worldSize": 2},
        "conditions": [
            {"type": "Initialized", "reason": "Started", "status": "True", **said},
            {"type": "Running", "reason": "Starting", "status": "False", **said},
        ],
        "startTime": since,
        **status,
    }


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
def test_room(
    ask: Callable[..., Decision],
    make_gang: Any,
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

    status = ask(starting(seconds, now), [make_gang(parallelism=2)], pods, tiers=tiers).status

    assert status.attempts[0].reason == reason
    assert (status.restarts.user, status.restarts.infrastructure) == (0, 0)
    if reason is not None:
        assert UNSCHEDULABLE in status.attempts[0].message


def test_room_counts_from_the_admission(
    ask: Callable[..., Decision], make_gang: Any, make_pod: Any, now: datetime
) -> None:
    """Time in a queue does not count as time without room."""
    admitted = now - timedelta(seconds=299)
    gang = make_gang(parallelism=2, admitted_at=admitted)
    pods = [make_pod(n, unschedulable=UNSCHEDULABLE) for n in range(2)]
    queued = {"scheduling": {"queueName": "q"}}

    decision = ask(starting(86_400, now), [gang], pods, tiers=["avx512", "avx2"], spec=queued)

    assert decision.status.attempts[0].reason is None
    assert decision.look_at == admitted + timedelta(seconds=300)


# --- deadlines


@pytest.mark.parametrize(
    ("age", "gang", "spec", "reason"),
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
def test_deadlines_while_starting(
    ask: Callable[..., Decision],
    make_gang: Any,
    now: datetime,
    age: float,
    gang: dict[str, Any] | None,
    spec: dict[str, Any],
    reason: str | None,
) -> None:
    """A deadline that has passed ends attempt and job; suspended and finished jobs have none."""
    gangs = [] if gang is None else [make_gang(**{"parallelism": 2, **gang})]
    status = starting(age, now) if gang is not None else starting(age, now, attempts=[{"attempt": 0}])

    assert ask(status, gangs, [], spec=spec).status.attempts[0].reason == reason


def test_deadline_is_looked_at_in_time(ask: Callable[..., Decision], make_gang: Any, now: datetime) -> None:
    """The next deadline is the time at which the job is looked at again, if nothing is due before."""
    spec = {"activeDeadlineSeconds": 65, "pendingDeadlineSeconds": 63}

    decision = ask(starting(60, now), [make_gang(parallelism=2)], [], spec=spec)

    assert decision.look_at == now + timedelta(seconds=3)


@pytest.mark.parametrize(
    ("age", "patience", "due", "said"),
    [
        pytest.param(1, 3, 2, False, id="has just begun"),
        pytest.param(10, 3, 10, False, id="looked at before"),
        pytest.param(21, 3, 10, True, id="takes long"),
        pytest.param(21, 30, 9, False, id="in a rush"),
        pytest.param(45, 30, 30, False, id="in a rush, looked at before"),
        pytest.param(61, 30, 30, True, id="takes long even for a rush"),
    ],
)
def test_pods_that_merely_start(
    ask: Callable[..., Decision],
    make_gang: Any,
    now: datetime,
    age: float,
    patience: float,
    due: float,
    said: bool,
) -> None:
    """Nothing is said of them for a while, nor are they looked at often: in a rush for longer, and less often."""
    pods = None if age < patience else []
    status = starting(age, now)
    gang = make_gang(parallelism=2)

    decision = ask(status, [gang], pods, patience=timedelta(seconds=patience))

    assert decision.look_at == now + timedelta(seconds=due)
    assert ("0/2 pods" in str(decision.status.message)) == said


@pytest.mark.parametrize(
    ("limit", "attempts", "pods", "words"),
    [
        pytest.param(
            60, 1, [{"unschedulable": UNSCHEDULABLE}], UNSCHEDULABLE, id="what the scheduler says now"
        ),
        pytest.param(60, 2, [{}], "no pod found room, earlier", id="what the last attempt gave up for"),
        pytest.param(60, 1, [{}], "what was said last", id="what was said last"),
    ],
)
def test_pending_deadline_quotes(
    ask: Callable[..., Decision],
    make_gang: Any,
    make_pod: Any,
    now: datetime,
    limit: int,
    attempts: int,
    pods: list[dict[str, Any]],
    words: str,
) -> None:
    """The message says what the job had waited for: as it is now, or as it was when somebody last knew."""
    gave_up = {"attempt": 0, "start": stamp(now), "end": stamp(now), "reason": "SteppedDown"}
    history = [{**gave_up, "message": "no pod found room, earlier"}] if attempts == 2 else []
    last = {"attempt": attempts - 1, "start": stamp(now)}
    status = starting(99, now, attempt=attempts - 1, attempts=[*history, last], message="what was said last")
    gang = make_gang(attempts - 1, parallelism=2)

    seen = [make_pod(n, attempts - 1, **fields) for n, fields in enumerate(pods)]
    decision = ask(status, [gang], seen, spec={"pendingDeadlineSeconds": limit})

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
def test_progress_deadline(
    ask: Callable[..., Decision],
    make_gang: Any,
    now: datetime,
    step_age: float | None,
    told_age: float | None,
    seconds: int,
    ends: bool,
) -> None:
    """A gang that has told of its progress and makes no step ends at the user's expense; one that never told
    does not."""
    status = running()  # for an hour
    if step_age is not None and told_age is not None:
        times = {"stepTime": step_age, "updatedTime": told_age}
        told = {key: stamp(now - timedelta(seconds=age)) for key, age in times.items()}
        status["progress"] = {"step": 3, "totalSteps": 10, **told}

    after = ask(status, [make_gang(ready=2, parallelism=2)], spec={"progressDeadlineSeconds": seconds}).status

    assert after.attempts[0].reason == ("ProgressDeadlineExceeded" if ends else None)
    assert after.restarts.user == int(ends)


# --- the price of an end


@pytest.mark.parametrize(
    ("limits", "used", "code", "phase", "after"),
    [
        pytest.param((3, 20), (0, 0), 1, "Restarting", (1, 0), id="the user's first"),
        pytest.param((3, 20), (2, 20), 1, "Restarting", (3, 20), id="the user's last"),
        pytest.param((3, 20), (3, 0), 1, "Failed", (3, 0), id="one too many of the user's"),
        pytest.param((3, 20), (3, 0), 50, "Restarting", (3, 1), id="the infrastructure's own budget"),
        pytest.param((3, 20), (0, 20), 50, "Failed", (0, 20), id="one too many of the infrastructure's"),
        pytest.param((0, 0), (0, 0), 50, "Failed", (0, 0), id="no restarts at all"),
        pytest.param((1, 20), (3, 0), 1, "Failed", (3, 0), id="the limit was lowered"),
        pytest.param((3, 20), (0, 0), 10, "Failed", (0, 0), id="no use trying again"),
    ],
)
def test_price(
    ask: Callable[..., Decision],
    make_gang: Any,
    make_pod: Any,
    limits: tuple[int, int],
    used: tuple[int, int],
    code: int,
    phase: str,
    after: tuple[int, int],
) -> None:
    """An end costs one restart of its budget while there is one, and else the job."""
    said = f"Container trainer for pod team/job-a0-0 failed with exit code {code} matching FailJob rule"
    gang = make_gang(parallelism=2, failing=Said("PodFailurePolicy", said), failed=True)
    pods = [make_pod(0, phase="Failed", node="n", exit_code=code)]
    status = running() | {"restarts": {"user": used[0], "infrastructure": used[1]}}
    spec = {"backoffLimit": limits[0], "infrastructureBackoffLimit": limits[1]}

    # Without nodes no attempt follows in the same breath.
    found = ask(status, [gang], pods, spec=spec, tiers=[]).status

    assert (found.restarts.user, found.restarts.infrastructure) == after
    assert found.phase == phase
    assert found.attempts[0].exit_codes == [code]


# --- the end of an end


@pytest.mark.parametrize(
    ("gang", "pods", "ended"),
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
    ask: Callable[..., Decision],
    make_gang: Any,
    make_pod: Any,
    gang: dict[str, Any] | None,
    pods: list[dict[str, Any]] | None,
    ended: bool,
) -> None:
    """An attempt that is to end has ended when its Job makes no more pods and none of them runs."""
    gangs = [] if gang is None else [make_gang(failing=Said("", ""), **gang)]
    seen = None if pods is None else [make_pod(n, node="n", **each) for n, each in enumerate(pods)]

    status = ask(running(reason="UnexpectedError"), gangs, seen, tiers=[]).status

    assert (status.attempts[0].end is not None) == ended


# --- the queue's clock


@pytest.mark.parametrize(
    ("begun", "waited", "admitted", "start"),
    [
        pytest.param(None, 100, 40, -40, id="first let in"),
        pytest.param(-500, 100, 40, -440, id="let in again after a minute"),
        pytest.param(-500, 100, None, -400, id="let in just now"),
        pytest.param(-500, 100, 140, -500, id="let in before it was noticed to wait"),
    ],
)
def test_active_clock_stands_still_in_the_queue(
    ask: Callable[..., Decision],
    make_gang: Any,
    now: datetime,
    begun: float | None,
    waited: float,
    admitted: float | None,
    start: float,
) -> None:
    """startTime is the first admission, moved by the time spent in the queue since."""

    def at(seconds: float) -> datetime:
        return now + timedelta(seconds=seconds)

    status = starting(waited, now, startTime=None if begun is None else stamp(at(begun)))
    out = {"type": "QuotaReserved", "status": "False", "reason": "Queued", "message": ""}
    status["conditions"].append({**out, "lastTransitionTime": stamp(at(-waited))})
    gang = make_gang(parallelism=2, admitted_at=None if admitted is None else at(-admitted))

    after = ask(status, [gang], [], spec={"scheduling": {"queueName": "q"}}).status

    assert parse(after.start_time) == at(start)


# --- what running pods and ranks tell


def test_facts_survive_a_look_at_the_pods(
    ask: Callable[..., Decision], make_gang: Any, make_pod: Any
) -> None:
    """What the ranks told stays when a pod is looked at because it is not ready for a moment."""
    known = {"index": 0, "pod": "job-a0-0", "node": "n", "isa": "avx512", "cpus": "0-3"}
    pods = [make_pod(n, phase="Running", node="n") for n in range(2)]

    status = ask(running() | {"ranks": [known]}, [make_gang(ready=1, parallelism=2)], pods).status

    assert [(rank.index, rank.isa, rank.cpus) for rank in status.ranks] == [
        (0, "avx512", "0-3"),
        (1, None, None),
    ]


def test_ranks_that_launchers_settle_are_counted_once_rank_0_tells(
    ask: Callable[..., Decision], make_gang: Any, make_pod: Any
) -> None:
    """With ranksPerPod auto the column says so first, and then how many there are."""
    status = running()
    status["placement"] |= {"worldSize": None}
    topology = {"pods": 2, "ranksPerPod": "auto", "memoryPerRank": "1Gi"}
    pods = [make_pod(n, phase="Running", node="n") for n in range(2)]
    facts = [
        {"rank": n, "host": "h", "isa": "avx512", "cpus": str(n), "threads": 1, "pod": n // 2}
        for n in range(3)
    ]
    told = ProgressReport.model_validate(
        {"job_uid": "u", "attempt": 0, "stage": "Training", "step": 1, "total_steps": 9, "epoch": 0}
        | {"updated_time": START, "ranks": facts}
    )
    gang = make_gang(ready=2, parallelism=2)

    before = ask(status, [gang], pods, spec={"topology": topology}).status
    after = ask(status, [gang], pods, spec={"topology": topology}, progress=told).status

    assert (before.columns.ranks, before.placement.world_size, before.ranks) == ("0/auto", None, [])
    assert (after.columns.ranks, after.placement.world_size) == ("3/3", 3)
    assert [(rank.index, rank.pod) for rank in after.ranks] == [
        (0, "job-a0-0"),
        (1, "job-a0-0"),
        (2, "job-a0-1"),
    ]


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [(None, 0, None), (None, 1, "bf16"), ("fp32", 1, "fp32")],
    ids=["no step yet", "the first step", "fixed before"],
)
def test_dtype_is_fixed_by_the_first_step(
    ask: Callable[..., Decision], make_gang: Any, before: str | None, step: int, after: str | None
) -> None:
    """The data type is that of the first completed step, for good."""
    status = running()
    status["placement"] |= {"dtype": before}
    told = ProgressReport(
        job_uid="u",
        attempt=0,
        stage="Training",
        step=step,
        total_steps=9,
        epoch=0,
        compute_dtype="bf16",
        updated_time=START,
    )

    found = ask(status, [make_gang(ready=2, parallelism=2)], progress=told).status

    assert found.placement.dtype == after


# --- transfers

REMOTE = {
    "model": {"source": "hf://org/model"},
    "dataset": {"source": "s3://bucket/data.jsonl"},
    "output": {"destination": "s3://bucket/adapters"},
}
REVISIONS = {"modelRevision": "c0ffee", "datasetRevision": "d0d0"}
TRAINED = {
    "progress": {
        "step": 10,
        "totalSteps": 10,
        "percent": 100,
        "loss": 1.5,
        "etaSeconds": 0,
        "stepTime": START,
    },
    "ranks": [{"index": 0, "pod": "job-a1-0", "node": "n"}],
    "checkpoint": {"step": 10},
    "adapter": {"uri": "pvc://team/work/jobs/job/adapter", "evalLoss": 1.5, "baseEvalLoss": 2.5},
    "provenance": REVISIONS,
}


def transferring(stage: str, **status: Any) -> dict[str, Any]:
    """The status of a job whose attempt 0 fetches, or sends, and is up."""
    reason = {"fetch": "Fetching", "publish": "Uploading"}[stage]
    known = running(stage=stage) | (TRAINED if stage == "publish" else {}) | status
    said = {"type": "Running", "reason": reason, "status": "True", "message": "", "lastTransitionTime": START}
    known["conditions"] = [known["conditions"][0], said]
    return known


TRANSFERS = pytest.mark.parametrize("stage", ["fetch", "publish"])


def rule(code: int) -> Said:
    """What the Job controller says of a pod that a rule matched."""
    said = f"Container trainer for pod team/job-a0-0 failed with exit code {code} matching FailJob rule at index 1"
    return Said("PodFailurePolicy", said)


@TRANSFERS
@pytest.mark.parametrize(
    ("code", "pod", "spec", "phase", "reason", "price", "words"),
    [
        pytest.param(17, {}, {}, "Failed", "TransferRefused", (0, 0), "exited with code 17", id="refused"),
        pytest.param(
            32, {}, {}, "Restarting", "TransferFailed", (1, 0), "exited with code 32", id="broke off"
        ),
        pytest.param(
            32,
            {},
            {"backoffLimit": 0},
            "Failed",
            "TransferFailed",
            (0, 0),
            "exited with code 32; backoffLimit is 0",
            id="broke off, and may not be tried again",
        ),
        pytest.param(14, {}, {}, "Failed", "StorageFull", (0, 0), "exited with code 14", id="no space"),
        pytest.param(1, {}, {}, "Restarting", "UnexpectedError", (1, 0), "exited with code 1", id="a bug"),
        pytest.param(50, {}, {}, "Restarting", "Terminated", (0, 1), "exited with code 50", id="stopped"),
        pytest.param(
            137,
            {"ended_by": "OOMKilled"},
            {},
            "Failed",
            "OutOfMemory",
            (0, 0),
            "the administrator sets how much a transfer has, as transfer.memory",
            id="out of memory",
        ),
        pytest.param(
            143,
            {"disruption": Said("EvictionByEvictionAPI", "")},
            {},
            "Restarting",
            "Drained",
            (0, 1),
            "was evicted, as a drain does",
            id="drained",
        ),
    ],
)
def test_a_transfer_fails(
    ask: Callable[..., Decision],
    make_gang: Any,
    make_pod: Any,
    stage: str,
    code: int,
    pod: dict[str, Any],
    spec: dict[str, Any],
    phase: str,
    reason: str,
    price: tuple[int, int],
    words: str,
) -> None:
    """A transfer's end has the price of its cause, and the cause in words that help."""
    gang = make_gang(parallelism=1, failing=rule(code), failed=True)
    pods = [make_pod(0, phase="Failed", node="n", exit_code=code, **pod)]

    status = ask(transferring(stage), [gang], pods, spec={**REMOTE, **spec}, tiers=[]).status

    assert (status.phase, status.attempts[0].reason) == (phase, reason)
    assert (status.restarts.user, status.restarts.infrastructure) == price
    told = f"{status.attempts[0].message}\n{status.message}"
    assert words in told
    assert "memoryPerRank" not in told


@TRANSFERS
def test_a_transfers_own_words_are_told(
    ask: Callable[..., Decision], make_gang: Any, make_pod: Any, stage: str
) -> None:
    """The cause that the transfer gives is what the user reads."""
    cause = "hf://org/model: no such repository, or it is private and credentialsSecret is not set"
    words = json.dumps({"version": 1, "exitCode": 17, "reason": "TRANSFER_REFUSED", "cause": cause})
    pods = [make_pod(0, phase="Failed", node="n", exit_code=17, last_words=words)]

    decision = ask(
        transferring(stage), [make_gang(failing=rule(17), failed=True)], pods, spec=REMOTE, tiers=[]
    )

    assert decision.status.message == f"pod job-a0-0 on node n exited with code 17: {cause}"
    assert [(event.type, event.reason) for event in decision.events] == [("Warning", "TransferRefused")]


@TRANSFERS
def test_a_transfers_node_is_lost(
    ask: Callable[..., Decision], make_gang: Any, make_pod: Any, now: datetime, stage: str
) -> None:
    """A pod on a node that does not answer holds the job: it may still write into the workspace."""
    taken = {"disruption": Said("DeletionByTaintManager", ""), "deleting_since": now - timedelta(seconds=400)}
    pods = [make_pod(0, phase="Running", node="n", **taken)]
    gang = make_gang(
        parallelism=1, failing=Said("PodFailurePolicy", "Pod team/job-a0-0 has condition DisruptionTarget")
    )

    decision = ask(transferring(stage), [gang], pods, spec=REMOTE, lost_nodes=frozenset({"n"}))

    assert decision.status.attempts[0].reason == "NodeLost"
    assert decision.status.attempts[0].end is None
    assert not any(isinstance(action, StartAttempt) for action in decision.actions)
    assert decision.status.restarts.infrastructure == 1


@pytest.mark.parametrize(
    ("stage", "words", "reason"),
    [
        ("fetch", "", "TransferFailed"),
        ("fetch", "Traceback: what a library wrote", "TransferFailed"),
        ("fetch", '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": ""}', "TransferFailed"),
        (
            "fetch",
            '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": "", "fetched": {}}',
            "TransferFailed",
        ),
        (
            "fetch",
            '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": "", "fetched": {"model": "..", "dataset": "d"}}',
            "TransferFailed",
        ),
        (
            "fetch",
            '{"version": 1, "exitCode": 17, "reason": "X", "cause": "", "fetched": {"model": "m", "dataset": "d"}}',
            "TransferFailed",
        ),
        (
            "fetch",
            '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": "", "fetched": {"model": "m", "dataset": "d"}}',
            "Fetched",
        ),
        ("publish", "", "TransferFailed"),
        ("publish", '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": ""}', "TransferFailed"),
        (
            "publish",
            '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": "", "publishedUri": "s3://bucket/adapters"}',
            "Succeeded",
        ),
    ],
    ids=[
        "no words",
        "other words",
        "nothing of a fetch",
        "no revision",
        "a revision that is a path",
        "a report of a failure",
        "a report",
        "no words of an upload",
        "nothing of an upload",
        "a report of an upload",
    ],
)
def test_a_transfer_is_done_when_it_says_what_it_did(
    ask: Callable[..., Decision], make_gang: Any, make_pod: Any, stage: str, words: str, reason: str
) -> None:
    """Ended well is not enough: without its report nobody knows what the sources stand for, or where the copy is."""
    pods = [make_pod(0, phase="Succeeded", node="n", exit_code=0, last_words=words)]

    status = ask(transferring(stage), [make_gang(complete=True)], pods, spec=REMOTE, tiers=[]).status

    assert status.attempts[0].reason == reason
    assert status.restarts.user == (1 if reason == "TransferFailed" else 0)
    assert (status.phase == "Succeeded") == (reason == "Succeeded")


@TRANSFERS
def test_nobody_has_looked_at_a_transfers_pod(
    ask: Callable[..., Decision], make_gang: Any, stage: str
) -> None:
    """A transfer that is done is not judged before its report was looked for."""
    status = ask(transferring(stage), [make_gang(complete=True)], None, spec=REMOTE).status

    assert (status.attempts[0].reason, status.restarts.user) == (None, 0)


def told_of(stage: str, **fields: Any) -> ProgressReport:
    """A transfer's report."""
    known = {"job_uid": "u", "attempt": 0, "stage": stage, "step": 0, "total_steps": 0, "epoch": 0.0}
    return ProgressReport.model_validate({**known, "updated_time": "2026-01-31T12:00:00Z", **fields})


@pytest.mark.parametrize(
    ("stage", "report", "reason", "message", "phase"),
    [
        (
            "fetch",
            told_of("Fetching", bytes_done=2**29, bytes_total=2**31),
            "Fetching",
            "the remote sources are being fetched: 0.5 of 2 GiB",
            "Fetching",
        ),
        ("fetch", told_of("Done"), "Fetching", "the remote sources are being fetched", "Fetching"),
        (
            "publish",
            told_of("Uploading", bytes_done=0, bytes_total=2**20),
            "Uploading",
            "the adapter is being sent to output.destination: 0 of 1 MiB",
            "Publishing",
        ),
        (
            "publish",
            told_of("Done"),
            "Uploading",
            "the adapter is being sent to output.destination",
            "Publishing",
        ),
    ],
    ids=["fetching", "fetched", "sending", "sent"],
)
def test_a_transfer_tells_how_far_it_is(
    ask: Callable[..., Decision],
    make_gang: Any,
    stage: str,
    report: ProgressReport,
    reason: str,
    message: str,
    phase: str,
) -> None:
    """Bytes stand in the message; what the ranks told, and where they ran, stays as it is."""
    before = transferring(stage)
    status = ask(before, [make_gang(ready=1, parallelism=1)], spec=REMOTE, progress=report).status

    (condition,) = [each for each in status.conditions if each.type == "Running"]
    assert (condition.reason, condition.message, status.message, status.phase) == (
        reason,
        message,
        message,
        phase,
    )
    kept = status.model_dump(by_alias=True, exclude_none=True, include={"progress", "ranks", "checkpoint"})
    assert kept == {
        "ranks": [],
        **{key: before[key] for key in ("progress", "ranks", "checkpoint") if key in before},
    }
    assert status.columns.ranks == "0/2"
    assert status.columns.step == ("10/10" if stage == "publish" else None)


@TRANSFERS
def test_a_transfer_may_take_longer_than_a_step(
    ask: Callable[..., Decision], make_gang: Any, now: datetime, stage: str
) -> None:
    """progressDeadlineSeconds is about steps: a transfer makes none, however late the ranks' last report came."""
    late = {**TRAINED["progress"], "updatedTime": stamp(now)}
    before = transferring(stage, progress=late)

    status = ask(
        before, [make_gang(ready=1, parallelism=1)], spec={**REMOTE, "progressDeadlineSeconds": 1}
    ).status

    assert status.attempts[0].reason is None
    assert status.restarts.user == 0


@TRANSFERS
@pytest.mark.parametrize("parallelism", [0, 2], ids=["none", "as many as train"])
def test_one_pod_transfers(
    ask: Callable[..., Decision], make_gang: Any, stage: str, parallelism: int
) -> None:
    """A transfer's Job that somebody gave another number of pods ends, though the ranks have as many."""
    status = ask(transferring(stage), [make_gang(ready=1, parallelism=parallelism)], spec=REMOTE).status

    assert status.attempts[0].reason == "JobChanged"


@TRANSFERS
def test_a_secret_that_is_missing_is_waited_for(
    ask: Callable[..., Decision], make_gang: Any, make_pod: Any, now: datetime, stage: str
) -> None:
    """The kubelet's words about a volume are the job's, with no end to the attempt: it may yet be created."""
    status = starting(30, now, attempts=[{"attempt": 0, "stage": stage, "start": START, "jobUid": "gang-0"}])
    known = {"provenance": REVISIONS, "adapter": {"uri": "u"}} if stage == "publish" else {}
    words = 'MountVolume.SetUp failed for volume "credentials-model" : secret "hub" not found'
    pod = make_pod(0, node="n")

    decision = ask(
        status | known,
        [make_gang(parallelism=1)],
        [pod],
        spec=REMOTE,
        warnings=(Warned("FailedMount", words, pod.uid),),
    )

    assert decision.status.attempts[0].reason is None
    assert words in decision.status.message
    assert [event.reason for event in decision.events] == ["VolumeNotReady"]


def test_a_source_keeps_the_revision_that_was_found_first(
    ask: Callable[..., Decision], make_gang: Any, make_pod: Any
) -> None:
    """A second fetch, for the other source, does not move the first one, whatever it says."""
    found = {"model": "newer", "dataset": "d0d0"}
    words = json.dumps({"version": 1, "exitCode": 0, "reason": "DONE", "cause": "", "fetched": found})
    pods = [make_pod(0, phase="Succeeded", node="n", exit_code=0, last_words=words)]
    before = transferring("fetch", provenance={"modelRevision": "c0ffee", "seed": 7})

    status = ask(before, [make_gang(complete=True)], pods, spec=REMOTE, tiers=[]).status

    assert status.attempts[0].reason == "Fetched"
    known = status.provenance.model_dump(by_alias=True, exclude_none=True)
    assert known == {"modelRevision": "c0ffee", "datasetRevision": "d0d0", "seed": 7}
