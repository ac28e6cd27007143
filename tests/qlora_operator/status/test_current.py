"""What becomes of the open attempt: how it goes, and all that ends it."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_contract.progress import ProgressReport
from qlora_operator.api.times import parse, stamp
from qlora_operator.status.decision import decide
from qlora_operator.status.draft import Decision, DeleteGang, DeletePod, RestoreNetwork, StartAttempt
from qlora_operator.status.observation import Feasible, Observation, Said

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
