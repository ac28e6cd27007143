"""Decisions as a whole: whatever happens in whatever order, a job ends well or says why not."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_operator.api.names import Phase
from qlora_operator.api.times import stamp
from qlora_operator.status.draft import Decision, DeleteGang, DeleteJob, StartAttempt
from qlora_operator.status.observation import Gang

happenings = st.one_of(
    st.sampled_from(["reconcile", "control", "watch"]).map(lambda what: (what, 0)),
    st.just(("calm", 2)),
    st.tuples(st.just("time"), st.integers(1, 40)),
    st.tuples(st.just("die"), st.sampled_from(["save", "act"])),
    st.tuples(st.sampled_from(["run", "succeed", "terminate", "drain", "delete pod"]), st.integers(0, 1)),
    st.tuples(st.just("fail"), st.sampled_from([1, 31, 40, 50, 51, 137, 143])),
    st.tuples(st.just("suspend"), st.booleans()),
    st.tuples(st.just("queue"), st.booleans()),
    st.tuples(st.just("delete gang"), st.booleans()),
    st.tuples(st.just("nodes"), st.booleans()),
    st.tuples(st.just("pods"), st.integers(1, 3)),
)


def calm(cluster: Any, rounds: int) -> None:
    """For a moment all goes as it should."""
    for _ in range(rounds):
        cluster.control()
        for pod in cluster.living():
            cluster.runs(pod.uid)
        cluster.watch()
        cluster.reconcile()


def pass_time(cluster: Any, seconds: int) -> None:
    """Time passes."""
    cluster.now += timedelta(seconds=seconds)


def have_nodes(cluster: Any, there: bool) -> None:
    """The nodes' labels come, or go."""
    cluster.tiers = ("avx512",) if there else ()


def delete_gangs(cluster: Any, orphan: bool) -> None:
    """Somebody deletes the Jobs."""
    for uid in list(cluster.gangs):
        cluster.delete_gang(uid, orphan=orphan)


def resize(cluster: Any, pods: int) -> None:
    """The user changes the number of pods, as far as the API server lets them."""
    if cluster.job.spec.suspend:
        cluster.set_spec(topology=cluster.job.spec.topology.model_copy(update={"pods": pods}))


TO_CLUSTER: dict[str, Callable[[Any, Any], Any]] = {
    "reconcile": lambda cluster, _: cluster.reconcile(),
    "die": lambda cluster, line: cluster.reconcile(dies=line),
    "control": lambda cluster, _: cluster.control(),
    "watch": lambda cluster, _: cluster.watch(),
    "calm": calm,
    "time": pass_time,
    "nodes": have_nodes,
    "suspend": lambda cluster, hold: cluster.set_spec(suspend=hold),
    "queue": lambda cluster, hold: cluster.let_in(suspended=hold),
    "delete gang": delete_gangs,
    "pods": resize,
}
TO_POD: dict[str, Callable[[Any, Any, int], Any]] = {
    "run": lambda cluster, pod, _: cluster.runs(pod.uid),
    "succeed": lambda cluster, pod, _: cluster.ends(pod.uid, 0),
    "fail": lambda cluster, pod, code: cluster.ends(pod.uid, code),
    "drain": lambda cluster, pod, _: cluster.drained(pod.uid),
    "delete pod": lambda cluster, pod, _: cluster.delete_pod(pod.uid),
    "terminate": lambda cluster, pod, _: cluster.ends(pod.uid, 143) if pod.deleting_since else None,
}


def happen(cluster: Any, what: str, how: Any) -> None:
    """One thing happens, if it can; to a pod, if one lives."""
    living = cluster.living()
    if what in TO_CLUSTER:
        TO_CLUSTER[what](cluster, how)
    elif living:
        TO_POD[what](cluster, living[how % len(living)], how)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(happenings, max_size=60), st.booleans())
def test_whatever_happens_the_job_ends_well(
    cluster: Callable[..., Any], events: list[tuple[str, Any]], queued: bool
) -> None:
    """With restarts enough, a job to which anything happened in any order succeeds once all goes well, and at
    no moment has it two gangs, a number twice, a price twice, or a phase that its conditions do not have."""
    scheduling = {"queueName": "q"} if queued else {}
    played = cluster(scheduling=scheduling, backoffLimit=1000, infrastructureBackoffLimit=1000)

    for what, how in events:
        happen(played, what, how)
    played.settle()

    assert played.job.status.phase == Phase.SUCCEEDED
    assert played.living() == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(happenings, max_size=60), st.integers(0, 2), st.integers(0, 2))
def test_whatever_happens_the_job_ends(
    cluster: Callable[..., Any], events: list[tuple[str, Any]], user: int, infrastructure: int
) -> None:
    """With few restarts a job succeeds or fails, never with more restarts than it may have, and leaves nothing
    that lives."""
    played = cluster(backoffLimit=user, infrastructureBackoffLimit=infrastructure)

    for what, how in events:
        happen(played, what, how)
    played.settle()

    assert played.finished
    assert played.living() == []


# --- the next attempt

IMAGE = "registry.example/trainer:1"
START, END = "2026-01-31T11:00:00Z", "2026-01-31T11:30:00Z"


def between(*reasons: str, isa: str = "avx512", **status: Any) -> dict[str, Any]:
    """The status of a job whose attempts have all ended, half an hour ago."""
    ended = [
        {"attempt": number, "start": START, "end": END, "reason": reason}
        for number, reason in enumerate(reasons)
    ]
    return {
        "attempt": len(ended) - 1,
        "attempts": ended,
        "placement": {"isa": isa},
        "startTime": START,
        **status,
    }


@pytest.mark.parametrize(
    ("status", "tiers", "tier"),
    [
        pytest.param(None, ["amx_bf16", "avx2"], "amx_bf16", id="the first attempt"),
        pytest.param(between("Terminated"), ["amx_bf16", "avx512"], "amx_bf16", id="a better one is back"),
        pytest.param(between("SteppedDown"), ["amx_bf16", "avx512", "avx2"], "avx2", id="the next below"),
        pytest.param(
            between("Released"), ["amx_bf16", "avx512", "avx2"], "avx2", id="the next, having let go"
        ),
        pytest.param(between("SteppedDown"), ["amx_bf16", "avx512"], "amx_bf16", id="around"),
        pytest.param(between("SteppedDown"), ["avx2"], "avx2", id="its tier is gone"),
        pytest.param(between("Released"), ["avx512"], "avx512", id="the only one"),
    ],
)
def test_tier(
    ask: Callable[..., Decision], status: dict[str, Any] | None, tiers: list[Any], tier: str
) -> None:
    """An attempt gets the first tier that has nodes; after one without room, the next."""
    decision = ask(status, [], None if status is None else [], tiers=tiers)

    number = 0 if status is None else 1
    assert decision.actions == (StartAttempt(number, tier, IMAGE),)
    assert (decision.status.attempt, decision.status.placement.isa) == (number, tier)


@pytest.mark.parametrize(
    ("status", "observed", "reason", "words"),
    [
        pytest.param(None, {"tiers": []}, "NoMatchingNodes", "0/7 nodes can", id="no nodes"),
        pytest.param(None, {"image_allowed": False}, "ImageNotAllowed", "is not allowed here", id="image"),
        pytest.param(
            between("Terminated", provenance={"image": "x", "runConfigVersion": 2}),
            {},
            "InvalidSpec",
            "version 2 of the RunConfig, and this operator writes version 1",
            id="another version",
        ),
    ],
)
def test_barred(
    ask: Callable[..., Decision], status: Any, observed: dict[str, Any], reason: str, words: str
) -> None:
    """What keeps the next attempt from starting is said once, and looked at again."""
    decision = ask(status, [], None if status is None else [], **observed)

    assert decision.actions == ()
    assert words in decision.status.message
    assert [c.reason for c in decision.status.conditions if c.type == "Initialized"] == [reason]
    assert [event.reason for event in decision.events] == [reason]
    assert decision.look_at is not None


def test_begun_job_keeps_its_image(ask: Callable[..., Decision]) -> None:
    """An image that is no longer allowed is still the one of a job that has begun with it."""
    status = between("Terminated", provenance={"image": "old", "runConfigVersion": 1})

    decision = ask(status, [], [], image_allowed=False)

    assert decision.actions == (StartAttempt(1, "avx512", "old"),)


@pytest.mark.parametrize(
    ("gang", "pod", "starts"),
    [
        pytest.param(None, None, True, id="nothing there"),
        pytest.param(None, {"phase": "Succeeded"}, True, id="a pod that is over"),
        pytest.param(None, {"phase": "Running", "node": "n"}, False, id="a pod that runs"),
        pytest.param(None, {"phase": "Pending"}, False, id="a pod that waits"),
        pytest.param(None, {"phase": "Running", "node": "n", "attempt": -1}, False, id="a pod of no attempt"),
        pytest.param({"failed": True}, {"phase": "Failed"}, True, id="the last Job, failed"),
        pytest.param({}, None, False, id="a Job that may make pods"),
    ],
)
def test_never_two_gangs(
    ask: Callable[..., Decision], make_gang: Any, make_pod: Any, gang: Any, pod: Any, starts: bool
) -> None:
    """No attempt starts while a pod of the job may run."""
    gangs = [] if gang is None else [make_gang(-1, **gang)]
    pods = [] if pod is None else [make_pod(**pod)]

    actions = ask(between("Terminated"), gangs, pods).actions

    assert any(isinstance(action, StartAttempt) for action in actions) == starts


def test_nobody_looked_at_the_pods(ask: Callable[..., Decision]) -> None:
    """Without a look at the pods no attempt but the first starts."""
    assert ask(between("Terminated"), [], None).actions == ()


# --- suspension, the end, and what is nobody's business


RESUMED = "2026-01-31T12:00:00Z"


@pytest.mark.parametrize(
    ("suspend", "before", "after", "start", "attempt"),
    [
        pytest.param(False, None, None, START, 1, id="never suspended"),
        pytest.param(True, None, ("True", "Suspended"), START, 0, id="suspended"),
        pytest.param(True, ("True", "Suspended"), ("True", "Suspended"), START, 0, id="suspended still"),
        pytest.param(False, ("True", "Suspended"), ("False", "Resumed"), RESUMED, 1, id="resumed"),
        pytest.param(False, ("False", "Resumed"), ("False", "Resumed"), START, 1, id="resumed long ago"),
        pytest.param(True, ("False", "Resumed"), ("True", "Suspended"), START, 0, id="suspended again"),
    ],
)
def test_suspension(
    ask: Callable[..., Decision],
    suspend: bool,
    before: tuple[str, str] | None,
    after: tuple[str, str] | None,
    start: str,
    attempt: int,
) -> None:
    """The condition Suspended follows spec.suspend; startTime is set anew when the job is resumed, and only then."""
    known = {"type": "Suspended", "message": "", "lastTransitionTime": END}
    said = [] if before is None else [{**known, "status": before[0], "reason": before[1]}]

    found = ask(between("Suspended", conditions=said), [], [], spec={"suspend": suspend}).status

    assert [(c.status, c.reason) for c in found.conditions if c.type == "Suspended"] == [after][: bool(after)]
    assert found.start_time == start
    assert found.attempt == attempt


FINISHED = [
    {"type": kind, "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": END}
    for kind in ("Complete", "Finished")
]


@pytest.mark.parametrize(
    ("ttl", "actions", "look_in"),
    [
        pytest.param(None, (), None, id="kept for ever"),
        pytest.param(1799, (DeleteJob(),), None, id="over"),
        pytest.param(1800, (DeleteJob(),), None, id="over right now"),
        pytest.param(1801, (), 1, id="a second left"),
        pytest.param(0, (DeleteJob(),), None, id="none"),
    ],
)
def test_time_to_live(
    ask: Callable[..., Decision], now: datetime, ttl: int | None, actions: Any, look_in: float | None
) -> None:
    """A finished job is deleted after its time to live, whatever else its spec says by then."""
    status = between("Succeeded", conditions=FINISHED, completionTime=END)
    spec = {"suspend": True} if ttl is None else {"suspend": True, "ttlSecondsAfterFinished": ttl}

    decision = ask(status, [], None, spec=spec)

    assert decision.actions == actions
    assert decision.look_at == (None if look_in is None else now + timedelta(seconds=look_in))
    assert decision.status.phase == Phase.SUCCEEDED


@pytest.mark.parametrize(
    ("fields", "goes"),
    [
        pytest.param({"attempt": 0, "failed": True}, False, id="its last Job, kept for the logs"),
        pytest.param({"attempt": 0}, True, id="its last Job, still at work"),
        pytest.param({"attempt": 3, "failed": True}, True, id="a Job of another attempt"),
        pytest.param({"attempt": 3, "ours": False}, False, id="somebody else's Job"),
        pytest.param({"attempt": 3, "deleting": True}, False, id="a Job that goes already"),
    ],
)
def test_what_is_left_of_a_finished_job(
    ask: Callable[..., Decision], make_gang: Callable[..., Gang], fields: dict[str, Any], goes: bool
) -> None:
    """No Job outlives the job's end but the last, once it is over by itself."""
    gang = make_gang(**fields)
    status = between("Succeeded", conditions=FINISHED, completionTime=END)

    actions = ask(status, [gang], []).actions

    assert actions == ((DeleteGang(gang.name, gang.uid),) if goes else ())


def test_another_managers_job(ask: Callable[..., Decision]) -> None:
    """Of another manager's job nothing is said, and nothing is done about it."""
    decision = ask(None, [], [], spec={"managedBy": "kueue.x-k8s.io/multikueue", "suspend": True})

    assert decision == Decision(decision.status)
    assert decision.status.model_dump(exclude_none=True, exclude_defaults=True) == {}


def test_attempts_are_capped(ask: Callable[..., Decision], now: datetime) -> None:
    """The newest 20 attempts are kept; the number goes on."""
    reasons = ["Suspended"] * 20

    status = ask(between(*reasons), [], []).status

    assert [attempt.attempt for attempt in status.attempts] == list(range(1, 21))
    assert status.attempts[-1].start == stamp(now)
