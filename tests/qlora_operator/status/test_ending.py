"""Why an attempt is over, or must be."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_contract.run_config import ISA_TIERS
from qlora_contract.units import rfc3339
from qlora_operator.api.status import Restarts
from qlora_operator.status import ending, policies
from qlora_operator.status.actions import Decision
from qlora_operator.status.checks import AttemptEnd, EndCheck, NotYet
from qlora_operator.status.observation import ReasonMessage

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


@pytest.mark.parametrize(
    ("seconds", "least", "placed", "stage", "reason"),
    [
        pytest.param(299, 2, 3, "train", None, id="not long enough"),
        pytest.param(450, 2, 3, "train", "Shrunk", id="more than the least"),
        pytest.param(450, 2, 2, "train", "Shrunk", id="the least"),
        pytest.param(450, 2, 1, "train", "Released", id="too few"),
        pytest.param(450, 2, 0, "train", None, id="none"),
        pytest.param(450, None, 3, "train", "Released", id="all or none"),
        pytest.param(450, 2, 4, "train", None, id="all"),
    ],
)
def test_an_attempt_gives_way_to_one_with_the_pods_that_have_nodes(
    starting: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    now: datetime,
    seconds: float,
    least: int | None,
    placed: int,
    stage: str,
    reason: str | None,
) -> None:
    """Once isa.stepDownSeconds have passed, at no cost, and at once."""
    pods = [
        make_pod(n, node="n") if n < placed else make_pod(n, unschedulable=UNSCHEDULABLE) for n in range(4)
    ]
    spec = {"topology": {"pods": 4, "minPods": least}}
    decision = ask(starting(seconds, now), [make_attempt_job(parallelism=4)], pods, spec=spec)
    ended = decision.status.attempts[0]

    assert (ended.reason, ended.placed) == (reason, placed if reason == "Shrunk" else None)
    assert decision.status.restarts == Restarts()
    assert policies.backoff("uid", [ended]) == 0 or reason != "Shrunk"


def test_an_attempt_with_fewer_pods_is_up_with_them(
    starting: Status, ask: Callable[..., Decision], make_attempt_job: Any, now: datetime
) -> None:
    """Nobody waits for the pods that it makes do without, and its Job has the number that it should have."""
    status = starting(60, now, placement={"isa": "avx512", "worldSize": 3})
    status["attempts"][0]["pods"] = 3
    spec = {"topology": {"pods": 4, "minPods": 2}}
    decision = ask(status, [make_attempt_job(parallelism=3, ready=3)], [], spec=spec)

    assert decision.status.phase == "Running"
    assert decision.status.columns.ranks == "3/3"


EQUAL = {tier: frozenset("ab") for tier in ISA_TIERS}
MIXED = {tier: frozenset("ab" if tier.endswith("bf16") else "abc") for tier in ISA_TIERS}


@pytest.mark.parametrize(
    ("isa", "nodes", "reason"),
    [
        pytest.param("amx_bf16", EQUAL, None, id="every tier is the same nodes"),
        pytest.param("amx_bf16", MIXED, "SteppedDown", id="a lesser tier has more"),
        pytest.param("avx2", MIXED, None, id="the better ones have fewer"),
        pytest.param("amx_bf16", {}, "SteppedDown", id="nodes may not be listed"),
    ],
)
def test_an_attempt_waits_in_place_where_no_tier_has_other_nodes(
    starting: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    now: datetime,
    isa: str,
    nodes: dict[Any, Any],
    reason: str | None,
) -> None:
    """To make its pods anew would gain it no room, and lose its place in the scheduler's and the queue's order."""
    status = starting(86_400, now, placement={"isa": isa, "worldSize": 2})
    pods = [make_pod(n, unschedulable=UNSCHEDULABLE) for n in range(2)]

    found = ask(status, [make_attempt_job(parallelism=2)], pods, tiers=ISA_TIERS, tier_nodes=nodes)

    assert found.status.attempts[0].reason == reason
    assert (found.actions == ()) == (reason is None)


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


# --- each check on its own

OTHER_TOPOLOGY = {"topology_hash": "another"}
FAILING = {"failing": ReasonMessage("BackoffLimitExceeded", "Job has reached the specified backoff limit")}
DRAINED = {"phase": "Running", "node": "n", "disruption": ReasonMessage("EvictionByEvictionAPI", "")}
QUEUED = {"scheduling": {"queueName": "q"}}
WAITS = {"unschedulable": UNSCHEDULABLE}
ADMITTED = {"type": "QuotaReserved", "status": "True", "reason": "Admitted", "message": ""}


@pytest.mark.parametrize(
    ("check", "age", "job", "pods", "spec", "reason", "budget"),
    [
        (ending.job_lost, 9, None, [], {}, "JobDeleted", "infrastructure"),
        (ending.job_lost, 9, {"uid": "another"}, [], {}, "JobDeleted", "infrastructure"),
        (ending.job_failing, 9, FAILING, [], {}, "PeerLost", "infrastructure"),
        (ending.job_being_deleted, 9, {"deleting": True}, [], {}, "JobDeleted", "infrastructure"),
        (ending.job_suspended_again, 9, {"suspended": True}, [], {}, "Requeued", "none"),
        (ending.job_suspended_again, 9, {"suspended": True}, [], QUEUED, "Requeued", "none"),
        (ending.parallelism_changed, 9, {"parallelism": 3}, [], {}, "JobChanged", "infrastructure"),
        (ending.pod_disrupted, 9, {}, [DRAINED], {}, "Drained", "infrastructure"),
        (ending.held, 9, {}, [], {"suspend": True}, "Suspended", "none"),
        (ending.spec_changed, 9, OTHER_TOPOLOGY, [], {}, "Suspended", "none"),
        (ending.half_placed, 999, {}, [{"node": "n"}, WAITS], {}, "Released", "none"),
        (ending.unschedulable_tier, 999, {}, [WAITS, WAITS], {}, "SteppedDown", "none"),
    ],
)
def test_each_check_finds_its_end_alone(
    starting: Status,
    make_view: Callable[..., Any],
    make_attempt_job: Any,
    make_pod: Any,
    now: datetime,
    check: EndCheck,
    age: float,
    job: dict[str, Any] | None,
    pods: list[dict[str, Any]],
    spec: dict[str, Any],
    reason: str,
    budget: str,
) -> None:
    """Whatever the other checks would find."""
    status = starting(age, now)
    status["conditions"].append({**ADMITTED, "lastTransitionTime": rfc3339(now)})
    jobs = [] if job is None else [make_attempt_job(**{"parallelism": 2, **job})]
    seen = [make_pod(index, **pod) for index, pod in enumerate(pods)]

    end = check(make_view(status, jobs, seen, tiers=["avx512", "avx2"], spec=spec))

    assert isinstance(end, AttemptEnd)
    assert (end.reason, end.budget) == (reason, budget)


@pytest.mark.parametrize(
    ("age", "pod", "lost", "reason"),
    [
        pytest.param(399, {}, {"n"}, None, id="not long enough"),
        pytest.param(400, {}, {"n"}, "NodeLost", id="for too long"),
        pytest.param(9000, {}, set(), None, id="its node is there"),
        pytest.param(9000, {"phase": "Failed"}, {"n"}, None, id="its pod is over"),
        pytest.param(None, {}, {"n"}, None, id="its pod is ready"),
    ],
)
def test_a_node_that_stays_silent_ends_the_attempt(
    running: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    now: datetime,
    age: float | None,
    pod: dict[str, Any],
    lost: set[str],
    reason: str | None,
) -> None:
    """Where nobody takes its pods away, since they tolerate it; until then the job says at once what is wrong."""
    since = None if age is None else now - timedelta(seconds=age)
    pods = [
        make_pod(0, **{"phase": "Running", "node": "n", "unready_since": since, **pod}),
        make_pod(1, phase="Running", node="m"),
    ]

    found = ask(
        running(), [make_attempt_job(ready=1, parallelism=2)], pods, lost_nodes=frozenset(lost)
    ).status

    assert found.attempts[0].reason == reason
    if reason is None and lost and since and pod == {}:
        said = {condition.type: condition for condition in found.conditions}["Running"]
        assert (said.status, said.reason) == ("True", "NodeLost")
        assert found.message.startswith("node n of pod job-a0-0 does not answer")


HELD = {**ADMITTED, "status": "False", "reason": "Deactivated"}
WAITING = {**ADMITTED, "status": "False", "reason": "Queued"}


@pytest.mark.parametrize(
    ("reserved", "job", "deactivated", "runs", "reason"),
    [
        pytest.param(ADMITTED, {"suspended": True}, "", True, "Requeued", id="evicted"),
        pytest.param(ADMITTED, {"suspended": True}, "stopped", True, None, id="stopped: it stays as it is"),
        pytest.param(HELD, {"suspended": True}, "stopped", False, None, id="still stopped"),
        pytest.param(HELD, {"suspended": True}, "", False, "Requeued", id="activated again"),
        pytest.param(HELD, {}, "", False, "Requeued", id="activated and admitted before anybody looked"),
        pytest.param(WAITING, {"suspended": True}, "", False, None, id="not admitted yet"),
        pytest.param(None, {"suspended": True}, "", False, None, id="created so by a webhook"),
        pytest.param(None, {"suspended": True, "queue": "q"}, "", False, None, id="and labelled by it"),
        pytest.param(
            None, {"suspended": True, "queue": "q"}, "", True, "Requeued", id="labelled while it ran"
        ),
        pytest.param(None, {"suspended": True}, "", True, "JobChanged", id="by hand, while it ran"),
        pytest.param(None, {}, "", True, None, id="it runs"),
    ],
)
def test_who_suspends_a_job_decides_what_becomes_of_it(
    starting: Status,
    running: Status,
    make_view: Callable[..., Any],
    make_attempt_job: Any,
    now: datetime,
    reserved: dict[str, Any] | None,
    job: dict[str, Any],
    deactivated: str,
    runs: bool,
    reason: str | None,
) -> None:
    """A queue that withdraws its quota costs nothing, and one that has not granted any is waited for, whoever named it;
    its administrator's stop holds; anybody else's hand costs a restart."""
    status = running() if runs else starting(9, now)
    if not runs:
        del status["attempts"][0]["jobUid"]
    if reserved is not None:
        status["conditions"].append({**reserved, "lastTransitionTime": rfc3339(now)})

    end = ending.job_suspended_again(
        make_view(status, [make_attempt_job(parallelism=2, **job)], [], deactivated=deactivated)
    )

    assert (end.reason if isinstance(end, AttemptEnd) else None) == reason
    if isinstance(end, AttemptEnd):
        assert end.budget == ("infrastructure" if reason == "JobChanged" else "none")


@pytest.mark.parametrize(
    ("eviction", "reason", "message"),
    [
        (None, "Requeued", "the queue withdrew the quota that it had granted"),
        (
            ReasonMessage("Preempted", "Preempted to accommodate another"),
            "Requeued",
            "the queue withdrew the quota that it had granted: Preempted to accommodate another",
        ),
        (
            ReasonMessage("PodsReadyTimeout", "Exceeded the PodsReady timeout"),
            "NotReadyInTime",
            "the queue withdrew the quota that it had granted: Exceeded the PodsReady timeout",
        ),
    ],
    ids=["nothing said", "preempted", "not ready in time"],
)
def test_an_eviction_is_told_in_the_queues_words(
    starting: Status,
    make_view: Callable[..., Any],
    make_attempt_job: Any,
    now: datetime,
    eviction: ReasonMessage | None,
    reason: str,
    message: str,
) -> None:
    """What it does next depends on why: pods that were not ready in time may not be so next time either."""
    status = starting(9, now)
    status["conditions"].append({**ADMITTED, "lastTransitionTime": rfc3339(now)})

    end = ending.job_suspended_again(
        make_view(status, [make_attempt_job(suspended=True)], [], spec=QUEUED, eviction=eviction, **WORKLOAD)
    )

    assert isinstance(end, AttemptEnd)
    assert (end.reason, end.message, end.budget) == (reason, message, "none")
    assert end.workload == ("job-job-a0-abcde" if reason == "Requeued" else None)


WORKLOAD = {"workload": "job-job-a0-abcde"}


@pytest.mark.parametrize(
    ("age", "job", "seen", "reason"),
    [
        pytest.param(59, WORKLOAD, None, None, id="Kueue may yet look"),
        pytest.param(60, WORKLOAD, None, "Requeued", id="Kueue does not let it"),
        pytest.param(9000, WORKLOAD, WORKLOAD["workload"], None, id="it waits in the queue"),
        pytest.param(9000, {}, None, None, id="a new Workload is Kueue's to make"),
        pytest.param(9000, {**WORKLOAD, "suspended": False}, None, None, id="it was let in"),
    ],
)
def test_a_workload_that_cannot_be_taken_over_costs_the_place_alone(
    starting: Status,
    make_view: Callable[..., Any],
    make_attempt_job: Any,
    now: datetime,
    age: float,
    job: dict[str, Any],
    seen: str | None,
    reason: str | None,
) -> None:
    """The next attempt's Job is a new Workload; this one would wait for ever."""
    found = make_attempt_job(**{"suspended": True, **job})

    end = ending.workload_lost(make_view(starting(age, now), [found], [], spec=QUEUED, workload=seen))

    assert (end.reason if isinstance(end, AttemptEnd) else None) == reason
    if isinstance(end, AttemptEnd):
        assert (end.budget, end.workload) == ("none", None)


@pytest.mark.parametrize(
    ("attempt", "suspended", "reason"),
    [(None, False, None), (0, False, None), (3, True, None), (3, False, "Requeued")],
)
def test_pods_of_another_attempt_are_not_taken_for_ones_of_this(
    starting: Status,
    make_view: Callable[..., Any],
    make_attempt_job: Any,
    now: datetime,
    attempt: int | None,
    suspended: bool,
    reason: str | None,
) -> None:
    """Kueue gives a Job that it stops the pod template of its Workload, which may be that of an earlier attempt. Once
    it lets the Job in, the next attempt takes over the Workload with its quota."""
    job = make_attempt_job(template_attempt=attempt, suspended=suspended)

    end = ending.pods_of_an_earlier_attempt(make_view(starting(9, now), [job], [], spec=QUEUED, **WORKLOAD))

    assert (end.reason if end else None) == reason
    assert end is None or (end.budget, end.workload) == ("none", WORKLOAD["workload"])


@pytest.mark.parametrize(
    ("job", "spec", "reason"),
    [
        pytest.param({"parallelism": 2}, QUEUED, "Shrunk", id="enough"),
        pytest.param({"parallelism": 1}, QUEUED, "JobChanged", id="too few"),
        pytest.param({"parallelism": 2}, {}, "JobChanged", id="no queue has done it"),
        pytest.param({"parallelism": 5}, QUEUED, "JobChanged", id="too many"),
        pytest.param({"parallelism": 4}, QUEUED, None, id="all"),
        pytest.param({"parallelism": 3, "suspended": True, **WORKLOAD}, QUEUED, None, id="not yet let in"),
    ],
)
def test_a_queue_may_let_a_part_of_the_pods_in(
    starting: Status,
    make_view: Callable[..., Any],
    make_attempt_job: Any,
    now: datetime,
    job: dict[str, Any],
    spec: dict[str, Any],
    reason: str | None,
) -> None:
    """As topology.minPods allows: the next attempt has as many ranks, and the same Workload."""
    spec = {"topology": {"pods": 4, "minPods": 2}, **spec}

    end = ending.parallelism_changed(
        make_view(starting(9, now), [make_attempt_job(**job)], [], spec=spec, **WORKLOAD)
    )

    assert (end.reason if end else None) == reason
    if reason == "Shrunk":
        assert end is not None
        assert (end.placed, end.workload, end.budget) == (2, WORKLOAD["workload"], "none")


FAILED_BY = "Container trainer for pod team/job-a0-0 failed with exit code {} matching FailJob rule"


@pytest.mark.parametrize(
    ("code", "reason", "budget"),
    [
        (50, "Requeued", "none"),
        (143, "Requeued", "none"),
        (137, "Requeued", "none"),
        (40, "Requeued", "none"),
        (10, "InvalidConfiguration", "permanent"),
        (31, "Stalled", "user"),
        (139, "Killed", "user"),
    ],
)
def test_ranks_that_a_queue_stops_fail_its_job_at_no_cost(
    running: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    now: datetime,
    code: int,
    reason: str,
    budget: str,
) -> None:
    """The Job is suspended, and its stopped pods fail it before the operator looks; a failure of their own counts."""
    status = running()
    status["conditions"].append({**ADMITTED, "lastTransitionTime": rfc3339(now)})
    failing = ReasonMessage("PodFailurePolicy", FAILED_BY.format(code))
    job = make_attempt_job(suspended=True, failing=failing, failed=True, parallelism=2)
    pods = [make_pod(index, phase="Failed", node="n", exit_code=code) for index in range(2)]

    found = ask(status, [job], pods, spec={**QUEUED, "infrastructureBackoffLimit": 0}).status

    assert found.attempts[0].reason == reason
    assert (found.restarts.user, found.restarts.infrastructure) == ((1, 0) if budget == "user" else (0, 0))
    assert (found.phase == "Failed") == (budget == "permanent")


@pytest.mark.parametrize(
    ("check", "age", "job", "pods"),
    [
        (
            ending.job_failing,
            9,
            {**FAILING, "failing_since": True},
            [{"exit_code": 40, "phase": "Failed"}, {}],
        ),
        (ending.half_placed, 9, {}, [{"node": "n"}, WAITS]),
        (ending.unschedulable_tier, 9, {}, [WAITS, WAITS]),
    ],
    ids=["its pods may yet tell", "half placed, not long enough", "no room, not long enough"],
)
def test_a_check_says_when_to_look_again(
    starting: Status,
    make_view: Callable[..., Any],
    make_attempt_job: Any,
    make_pod: Any,
    now: datetime,
    check: EndCheck,
    age: float,
    job: dict[str, Any],
    pods: list[dict[str, Any]],
) -> None:
    """What is no end yet may be one later."""
    job = {**job, "failing_since": now} if "failing_since" in job else job
    seen = [make_pod(index, **pod) for index, pod in enumerate(pods)]

    found = check(make_view(starting(age, now), [make_attempt_job(parallelism=2, **job)], seen))

    assert isinstance(found, NotYet)
    assert found.at > now


@pytest.mark.parametrize("check", [ending.half_placed, ending.unschedulable_tier])
def test_gated_pods_are_not_taken_for_ones_without_room(
    starting: Status,
    make_view: Callable[..., Any],
    make_attempt_job: Any,
    make_pod: Any,
    now: datetime,
    check: EndCheck,
) -> None:
    """A queue that places pods lets the scheduler see them when it is their turn, one after the other."""
    pods = [make_pod(0, node="n"), make_pod(1, gated=True)]

    assert check(make_view(starting(999, now), [make_attempt_job(parallelism=2)], pods)) is None


CHANGED_WHILE_FAILING = [
    ending.job_being_deleted,
    ending.job_suspended_again,
    ending.parallelism_changed,
    ending.pod_disrupted,
]


@pytest.mark.parametrize("check", CHANGED_WHILE_FAILING, ids=lambda check: check.__name__)
def test_what_becomes_of_a_failing_job_does_not_hide_its_failure(
    running: Status, make_view: Callable[..., Any], make_attempt_job: Any, make_pod: Any, check: EndCheck
) -> None:
    """While the pods of a failing Job have yet to tell why, nothing else about it counts."""
    job = make_attempt_job(suspended=True, deleting=True, parallelism=3, **FAILING)

    assert check(make_view(running(), [job], [make_pod(**DRAINED)])) is None
