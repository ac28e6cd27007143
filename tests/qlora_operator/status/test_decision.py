"""Decisions as a whole: whatever happens in whatever order, a job ends well or says why not."""

import dataclasses
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_contract.cost import Price
from qlora_contract.units import rfc3339
from qlora_operator.api.names import ConditionType, Phase, Reason
from qlora_operator.api.v1alpha1 import Schedule
from qlora_operator.status import conditions
from qlora_operator.status.actions import (
    Decision,
    DeleteAttemptJob,
    DeleteJob,
    DropWorkload,
    KeepWorkload,
    StartAttempt,
)
from qlora_operator.status.observation import AttemptJob, ReasonMessage

REFUSED = ReasonMessage(Reason.SOURCE_NOT_ALLOWED, "spec.model.source hf://org/model is not allowed here")
TOO_LARGE = ReasonMessage(Reason.LIMIT_EXCEEDED, "spec.topology asks for 2 pods in all, and a job may have 1")

JOURNEYS = {
    "on claims": (),
    "a remote model": ("model",),
    "remote data": ("dataset",),
    "remote sources": ("model", "dataset"),
    "a destination": ("output",),
    "all of them": ("model", "dataset", "output"),
}
"""Journeys of the cluster's job -> what of it is remote."""
journeys = st.sampled_from(sorted(JOURNEYS))

happenings = st.one_of(
    st.sampled_from(["reconcile", "control", "watch"]).map(lambda what: (what, 0)),
    st.just(("calm", 2)),
    st.tuples(st.just("time"), st.integers(1, 40)),
    st.tuples(st.just("die"), st.sampled_from(["save", "act"])),
    st.tuples(st.sampled_from(["run", "succeed", "terminate", "drain", "delete pod"]), st.integers(0, 1)),
    st.tuples(st.just("fail"), st.sampled_from([1, 31, 32, 40, 50, 51, 137, 143])),
    st.tuples(st.just("end without words"), st.just(0)),
    st.tuples(st.just("suspend"), st.booleans()),
    st.tuples(st.just("queue"), st.booleans()),
    st.tuples(st.just("delete Job"), st.booleans()),
    st.tuples(st.just("nodes"), st.booleans()),
    st.tuples(st.just("pods"), st.integers(1, 3)),
    st.tuples(st.just("schedule"), st.sampled_from([None, "never", "now and then"])),
)

SCHEDULES = {
    None: None,
    # At noon on the last day of January it is closed until the next evening.
    "never": {"timeZone": "Europe/Berlin", "windows": [{"start": "0 20 1 2 *", "end": "0 6 * * *"}]},
    "nights": {"timeZone": "Europe/Berlin", "windows": [{"start": "0 20 * * *", "end": "0 6 * * *"}]},
    "now and then": {"windows": [{"start": "*/10 * * * *", "durationSeconds": 240}]},
}


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


def delete_jobs(cluster: Any, orphan: bool) -> None:
    """Somebody deletes the Jobs."""
    for uid in list(cluster.batch_jobs):
        cluster.delete_job(uid, orphan=orphan)


def resize(cluster: Any, pods: int) -> None:
    """The user changes the number of pods, as far as the API server lets them."""
    if cluster.job.spec.suspend:
        cluster.set_spec(topology=cluster.job.spec.topology.model_copy(update={"pods": pods}))


def schedule(cluster: Any, name: str | None) -> None:
    """The user changes when the job may run."""
    found = SCHEDULES[name]
    cluster.set_spec(schedule=None if found is None else Schedule.model_validate(found))


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
    "delete Job": delete_jobs,
    "pods": resize,
    "schedule": schedule,
}
TO_POD: dict[str, Callable[[Any, Any, int], Any]] = {
    "run": lambda cluster, pod, _: cluster.runs(pod.uid),
    "succeed": lambda cluster, pod, _: cluster.ends(pod.uid, 0),
    "fail": lambda cluster, pod, code: cluster.ends(pod.uid, code),
    "end without words": lambda cluster, pod, _: cluster.ends(pod.uid, 0, words=""),
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
@given(st.lists(happenings, max_size=60), st.booleans(), journeys)
def test_whatever_happens_the_job_ends_well(
    cluster: Callable[..., Any], events: list[tuple[str, Any]], queued: bool, journey: str
) -> None:
    """With restarts enough, a job to which anything happened in any order succeeds once all goes well, and at
    no moment has it two jobs, a number twice, a price twice, a phase that its conditions do not have, ranks
    without their sources, or a source whose revision changes."""
    scheduling = {"queueName": "q"} if queued else {}
    played = cluster(journey, scheduling=scheduling, backoffLimit=1000, infrastructureBackoffLimit=1000)

    for what, how in events:
        happen(played, what, how)
    played.settle()

    status = played.job.status
    assert status.phase == Phase.SUCCEEDED
    assert played.living() == []
    assert (status.adapter.published_uri is not None) == ("output" in JOURNEYS[journey])
    assert (status.provenance.model_revision is not None) == ("model" in JOURNEYS[journey])
    assert (status.provenance.dataset_revision is not None) == ("dataset" in JOURNEYS[journey])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(happenings, max_size=60), st.integers(0, 2), st.integers(0, 2), journeys)
def test_whatever_happens_the_job_ends(
    cluster: Callable[..., Any], events: list[tuple[str, Any]], user: int, infrastructure: int, journey: str
) -> None:
    """With few restarts a job succeeds or fails, never with more restarts than it may have, and leaves nothing
    that lives."""
    played = cluster(journey, backoffLimit=user, infrastructureBackoffLimit=infrastructure)

    for what, how in events:
        happen(played, what, how)
    played.settle()

    assert played.finished
    assert played.living() == []


# --- the next attempt

IMAGE = "registry.example/trainer:1"
START, END = "2026-01-31T11:00:00Z", "2026-01-31T11:30:00Z"


def between(*reasons: str, isa: str = "avx512", placed: int | None = None, **status: Any) -> dict[str, Any]:
    """The status of a job whose attempts have all ended, half an hour ago."""
    ended = [
        {"attempt": number, "start": START, "end": END, "reason": reason, "placed": placed}
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
def test_an_attempt_gets_the_first_tier_that_has_nodes(
    ask: Callable[..., Decision], status: dict[str, Any] | None, tiers: list[Any], tier: str, now: datetime
) -> None:
    """An attempt gets the first tier that has nodes; after one without room, the next."""
    decision = ask(status, [], None if status is None else [], tiers=tiers)

    number = 0 if status is None else 1
    assert decision.actions == (StartAttempt(number, tier, IMAGE, requested=rfc3339(now)),)
    assert (decision.status.attempt, decision.status.placement.isa) == (number, tier)


ROOM = {"tiers": [], "tier_pods": {"amx_bf16": 1, "avx512": 3, "avx2": 3}}


@pytest.mark.parametrize(
    ("status", "observed", "tier", "pods"),
    [
        pytest.param(
            between("Shrunk", placed=3), {"tiers": ["amx_bf16"]}, "avx512", 3, id="those that had nodes"
        ),
        pytest.param(between("Shrunk", placed=3), ROOM, "avx512", 3, id="and no others have"),
        pytest.param(between("Killed", placed=3), {"tiers": ["avx512"]}, "avx512", None, id="all again"),
        pytest.param(between("Killed"), ROOM, "avx512", 3, id="as many as there is room for"),
        pytest.param(
            between("Killed"), {**ROOM, "tier_pods": {"avx512": 9}}, "avx512", 4, id="never more than all"
        ),
    ],
)
def test_an_attempt_makes_do_with_fewer_pods_where_that_is_all_there_is(
    ask: Callable[..., Decision],
    now: datetime,
    status: dict[str, Any],
    observed: dict[str, Any],
    tier: str,
    pods: int | None,
) -> None:
    """After the time-out; the one after it asks for all again. Its ranks are counted as they are."""
    waits = {
        "type": "Running",
        "status": "False",
        "reason": "Starting",
        "message": "",
        "lastTransitionTime": START,
    }
    spec = {"topology": {"pods": 4, "minPods": 2}}
    decision = ask({**status, "conditions": [waits]}, [], [], spec=spec, **observed)

    (start,) = decision.actions
    assert isinstance(start, StartAttempt)
    assert (start.isa, start.pods) == (tier, pods)
    assert decision.status.attempts[-1].pods == pods
    assert decision.status.placement is not None
    assert decision.status.placement.world_size == (pods or 4)
    assert decision.status.columns is not None
    assert decision.status.columns.ranks == f"0/{pods or 4}"
    assert ("of 4 pods" in (decision.status.message or "")) == (pods is not None)


@pytest.mark.parametrize(
    ("status", "observed", "reason", "words"),
    [
        pytest.param(None, {"tiers": []}, "NoMatchingNodes", "0/7 nodes can", id="no nodes"),
        pytest.param(
            None,
            {
                "policy_violation": ReasonMessage(
                    Reason.IMAGE_NOT_ALLOWED, "spec.image evil is not allowed here"
                )
            },
            "ImageNotAllowed",
            "spec.image evil is not allowed here",
            id="image",
        ),
        pytest.param(
            None, {"policy_violation": REFUSED}, "SourceNotAllowed", "hf://org/model is not", id="source"
        ),
        pytest.param(None, {"policy_violation": TOO_LARGE}, "LimitExceeded", "a job may have 1", id="size"),
        pytest.param(
            between("Suspended", provenance={"image": "x", "runConfigVersion": 1}),
            {"policy_violation": TOO_LARGE},
            "LimitExceeded",
            "a job may have 1",
            id="size, of a job that has begun",
        ),
        pytest.param(
            between("Terminated", provenance={"image": "x", "runConfigVersion": 3}),
            {},
            "InvalidSpec",
            "version 3 of the RunConfig, and this operator writes versions 1 and 2",
            id="another version",
        ),
    ],
)
def test_what_blocks_the_next_attempt_is_said_once(
    ask: Callable[..., Decision], status: Any, observed: dict[str, Any], reason: str, words: str
) -> None:
    """What keeps the next attempt from starting is said once, and looked at again."""
    decision = ask(status, [], None if status is None else [], **observed)

    assert decision.actions == ()
    assert words in decision.status.message
    assert [c.reason for c in decision.status.conditions if c.type == "Initialized"] == [reason]
    assert [event.reason for event in decision.events] == [reason]
    assert decision.look_at is not None


def test_an_attempt_s_cost_is_added_with_its_end(
    ask: Callable[..., Decision], running: Callable[..., dict[str, Any]], now: datetime
) -> None:
    """Once its last pod is gone, with the end that is told: two pods of one CPU for an hour."""
    hour_ago = rfc3339(now - timedelta(hours=1))
    status = running(reason="Killed", running=hour_ago, checkpointStep=5)
    status |= {"progress": {"step": 8, "attempt": 0}, "cost": {"coreHours": 1.5, "lostSteps": 1}}
    decision = ask(status, [], [], price=Price(amount=2.0, currency="EUR"))
    cost = decision.status.cost

    assert decision.status.attempts[0].end == rfc3339(now)
    assert cost is not None, "what is lost is known when the next one goes on"
    assert (cost.core_hours, cost.lost_steps, cost.money, cost.currency) == (3.5, 1, 7.0, "EUR")


@pytest.mark.parametrize("reason", [Reason.IMAGE_NOT_ALLOWED, Reason.SOURCE_NOT_ALLOWED])
def test_a_begun_job_keeps_what_it_began_with(
    ask: Callable[..., Decision], reason: Reason, now: datetime
) -> None:
    """An image or source that is no longer allowed is still the one of a job that has begun with it."""
    status = between("Terminated", provenance={"image": "old", "runConfigVersion": 1})

    decision = ask(status, [], [], policy_violation=ReasonMessage(reason, "is not allowed here any more"))

    assert decision.actions == (StartAttempt(1, "avx512", "old", requested=rfc3339(now)),)


@pytest.mark.parametrize(
    ("attempt_job", "pod", "starts"),
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
def test_no_attempt_starts_while_a_pod_may_run(
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    attempt_job: Any,
    pod: Any,
    starts: bool,
) -> None:
    """No attempt starts while a pod of the job may run."""
    jobs = [] if attempt_job is None else [make_attempt_job(-1, **attempt_job)]
    pods = [] if pod is None else [make_pod(**pod)]

    actions = ask(between("Terminated"), jobs, pods).actions

    assert any(isinstance(action, StartAttempt) for action in actions) == starts


def test_no_attempt_but_the_first_starts_without_a_look_at_the_pods(ask: Callable[..., Decision]) -> None:
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
def test_the_condition_suspended_follows_the_spec(
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


# --- windows


NIGHTS = {"timeZone": "Europe/Berlin", "windows": [{"start": "0 20 * * *", "end": "0 6 * * *"}]}
"""Closed at the tests' noon, which is one in the afternoon there."""
EVENING = "2026-01-31T20:00:00+01:00"
DAYS = {"windows": [{"start": "0 6 * * *", "end": "0 20 * * *"}]}
OUTSIDE = ("True", "OutsideWindows", f"outside the windows of spec.schedule until {EVENING}")
HELD = ("True", "Suspended", "spec.suspend is true")


@pytest.mark.parametrize(
    ("spec", "before", "after", "start", "events"),
    [
        pytest.param({"schedule": NIGHTS}, None, OUTSIDE, START, ["OutsideWindows"], id="its window closes"),
        pytest.param({"schedule": NIGHTS}, OUTSIDE, OUTSIDE, START, [], id="it is closed"),
        pytest.param(
            {"schedule": NIGHTS},
            ("True", "OutsideWindows", "outside until yesterday"),
            OUTSIDE,
            START,
            [],
            id="another schedule keeps it closed",
        ),
        pytest.param({"schedule": NIGHTS, "suspend": True}, OUTSIDE, HELD, START, ["Suspended"], id="the user, too"),
        pytest.param({"schedule": NIGHTS}, HELD, OUTSIDE, None, ["OutsideWindows"], id="the user no longer"),
        pytest.param(
            {"schedule": DAYS},
            OUTSIDE,
            ("False", "WindowOpen", "a window of spec.schedule is open"),
            "2026-01-31T11:30:00Z",
            ["WindowOpen"],
            id="its window opens",
        ),
        pytest.param(
            {"schedule": DAYS}, HELD, ("False", "Resumed", "spec.suspend is false again"), RESUMED, ["Resumed"],
            id="resumed in its window",
        ),
        pytest.param(
            {}, OUTSIDE, ("False", "Resumed", "spec.schedule was removed"), "2026-01-31T11:30:00Z", ["Resumed"],
            id="no schedule any more",
        ),
        pytest.param({"schedule": DAYS}, None, None, START, [], id="its window was open all along"),
    ],
)  # fmt: skip
def test_the_condition_suspended_follows_the_windows(
    ask: Callable[..., Decision],
    spec: dict[str, Any],
    before: tuple[str, str, str] | None,
    after: tuple[str, str, str] | None,
    start: str | None,
    events: list[str],
) -> None:
    """The user's word goes before the time of day. Outside its windows, half an hour here, the clock of
    activeDeadlineSeconds only stands still."""
    names = ("status", "reason", "message")
    said = [] if before is None else [
        {"type": "Suspended", "lastTransitionTime": END, **dict(zip(names, before, strict=True))}
    ]  # fmt: skip

    decision = ask(between("Suspended", conditions=said), [], [], spec=spec)

    status = decision.status
    found = [(c.status, c.reason, c.message) for c in status.conditions if c.type == "Suspended"]
    assert found == [after][: after is not None]
    assert status.start_time == start
    assert [event.reason for event in decision.events if event.reason != "Started"] == events
    assert (status.phase == Phase.SUSPENDED) == (after is not None and after[0] == "True")
    assert status.attempt == (0 if status.phase == Phase.SUSPENDED else 1)


def test_the_clock_does_not_stand_still_twice(ask: Callable[..., Decision]) -> None:
    """A job that waited in its queue when its window closed: the queue sets the clock when it admits the next
    attempt, by all the time since the job came into the queue."""
    waits = {
        "type": "QuotaReserved",
        "status": "False",
        "reason": "Queued",
        "message": "",
        "lastTransitionTime": END,
    }
    closed = {**waits, "type": "Suspended", "status": "True", "reason": "OutsideWindows"}
    spec = {"schedule": DAYS, "scheduling": {"queueName": "q"}}

    assert (
        ask(between("OutsideWindows", conditions=[closed, waits]), [], [], spec=spec).status.start_time
        == START
    )


@pytest.mark.parametrize(
    ("schedule", "window", "column", "look_at"),
    [
        (NIGHTS, (False, "2026-01-31T19:00:00Z"), f"closed until {EVENING}", "2026-01-31T19:00:00Z"),
        (
            DAYS,
            (True, "2026-01-31T20:00:00Z"),
            "open until 2026-01-31T20:00:00+00:00",
            "2026-01-31T20:00:00Z",
        ),
        (
            {"windows": [{"start": "* * * * *", "durationSeconds": 60}]},
            (True, None),
            "open",
            "2026-01-31T13:00:00Z",
        ),
        ({**NIGHTS, "timeZone": "Atlantis"}, None, None, None),
        ({"windows": [{"start": "0 0 30 2 *", "durationSeconds": 60}]}, None, None, None),
        (None, None, None, None),
    ],
)
def test_a_job_says_until_when_its_window_is_open_or_closed(
    ask: Callable[..., Decision], running: Any, make_attempt_job: Any, make_pod: Any,
    schedule: Any, window: tuple[bool, str | None] | None, column: str | None, look_at: str | None,
) -> None:  # fmt: skip
    """In the status for programs, in a column for people; and it is decided again then."""
    attempt_job, pods = make_attempt_job(ready=2, parallelism=2), [make_pod(0), make_pod(1)]

    decision = ask(running(), [attempt_job], pods, spec={} if schedule is None else {"schedule": schedule})

    status = decision.status
    assert (None if status.window is None else (status.window.open, status.window.until)) == window
    assert status.columns is not None
    assert status.columns.window == column
    if status.phase == Phase.RUNNING:
        assert (decision.look_at and rfc3339(decision.look_at)) == look_at


def test_a_schedule_that_cannot_be_followed_holds_the_job(ask: Callable[..., Decision]) -> None:
    """A job whose nodes belong to others by day does not run by day because of a typo: it says what is wrong."""
    decision = ask(None, [], [], spec={"schedule": {**NIGHTS, "timeZone": "Atlantis"}})

    assert decision.actions == ()
    assert decision.status.phase == Phase.SUSPENDED
    assert decision.status.message == (
        "suspended until spec.schedule.timeZone is corrected: Atlantis is no time zone that is known here; it must be "
        "one of the IANA database, such as Europe/Berlin"
    )


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
def test_a_finished_job_is_deleted_after_its_time_to_live(
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
        pytest.param({"attempt": 3, "controlled": False}, False, id="somebody else's Job"),
        pytest.param({"attempt": 3, "deleting": True}, False, id="a Job that goes already"),
    ],
)
def test_a_finished_job_keeps_only_its_last_job(
    ask: Callable[..., Decision],
    make_attempt_job: Callable[..., AttemptJob],
    fields: dict[str, Any],
    goes: bool,
) -> None:
    """No Job outlives the job's end but the last, once it is over by itself."""
    attempt_job = make_attempt_job(**fields)
    status = between("Succeeded", conditions=FINISHED, completionTime=END)

    actions = ask(status, [attempt_job], []).actions

    assert actions == ((DeleteAttemptJob(attempt_job.name, attempt_job.uid),) if goes else ())


def test_another_managers_job_is_left_alone(ask: Callable[..., Decision]) -> None:
    """Of another manager's job nothing is said, and nothing is done about it."""
    decision = ask(None, [], [], spec={"managedBy": "kueue.x-k8s.io/multikueue", "suspend": True})

    assert decision == Decision(decision.status)
    assert decision.status.model_dump(exclude_none=True, exclude_defaults=True) == {}


def test_the_newest_attempts_are_kept(ask: Callable[..., Decision], now: datetime) -> None:
    """The newest 20 attempts are kept; the number goes on."""
    reasons = ["Suspended"] * 20

    status = ask(between(*reasons), [], []).status

    assert [attempt.attempt for attempt in status.attempts] == list(range(1, 21))
    assert status.attempts[-1].start == rfc3339(now)


# --- stages


def look(cluster: Any, seconds: float = 2) -> None:
    """A moment later everybody catches up."""
    cluster.now += timedelta(seconds=seconds)
    cluster.control()
    cluster.watch()
    cluster.reconcile()


def stage_of(cluster: Any) -> tuple[str, int]:
    """What the last attempt does, and its number."""
    last = cluster.job.status.attempts[-1]
    return last.stage, last.attempt


def until_pods(cluster: Any) -> list[Any]:
    """The pods of the attempt that starts now."""
    for _ in range(5):
        look(cluster)
        if cluster.living():
            return list(cluster.living())
    raise AssertionError(f"no attempt starts: {cluster.job.status}")


def run_pods(cluster: Any) -> None:
    """The pods that are there are up."""
    for pod in cluster.living():
        cluster.runs(pod.uid)
    look(cluster)


def end_pods(cluster: Any, code: int = 0, words: str | None = None) -> None:
    """The pods that are there end."""
    for pod in cluster.living():
        cluster.ends(pod.uid, code, words)
    look(cluster)


def reach(cluster: Any, stage: str, *, running: bool = True) -> None:
    """All goes well until this stage."""
    while True:
        until_pods(cluster)
        if stage_of(cluster)[0] == stage and not running:
            return
        run_pods(cluster)
        if stage_of(cluster)[0] == stage:
            return
        end_pods(cluster)


PHASES = {"fetch": Phase.FETCHING, "train": Phase.RUNNING, "publish": Phase.PUBLISHING}
REASONS = {"fetch": "Fetched", "train": "Trained", "publish": "Succeeded"}
ROUTES = {
    "on claims": ["train"],
    "a remote model": ["fetch", "train"],
    "remote sources": ["fetch", "train"],
    "a destination": ["train", "publish"],
    "all of them": ["fetch", "train", "publish"],
}


@pytest.mark.parametrize(("journey", "route"), ROUTES.items(), ids=ROUTES)
def test_stages_follow_each_other(cluster: Callable[..., Any], journey: str, route: list[str]) -> None:
    """Each stage is an attempt of its own with its own pods, starts when the one before is done, and costs nothing."""
    played = cluster(journey)

    for number, stage in enumerate(route):
        pods = until_pods(played)
        status = played.job.status
        assert (stage_of(played), len(pods)) == ((stage, number), 2 if stage == "train" else 1)
        assert (status.phase, status.columns.ranks) == (Phase.STARTING, "0/2")
        run_pods(played)
        status = played.job.status
        assert (status.phase, status.columns.ranks) == (PHASES[stage], "2/2" if stage == "train" else "0/2")
        end_pods(played)

    status = played.job.status
    wanted = [phase for stage in route for phase in (Phase.STARTING, PHASES[stage])]
    assert played.phases == [*wanted, Phase.SUCCEEDED]
    reasons = [REASONS[stage] for stage in route[:-1]] + ["Succeeded"]
    assert [attempt.reason for attempt in status.attempts] == reasons
    assert [attempt.exit_codes for attempt in status.attempts] == [[0]] * len(route)
    assert (status.restarts.user, status.restarts.infrastructure) == (0, 0)


def test_what_a_stage_leaves_to_the_next(cluster: Callable[..., Any]) -> None:
    """The ranks are told the revisions that the fetch found, and the message tells all places of the adapter."""
    played = cluster("all of them")

    reach(played, "train", running=False)
    found = played.job.status.provenance
    assert (found.model_revision, found.dataset_revision) == ("m1", "d1")
    assert (found.image, found.seed) == (IMAGE, 0)
    reach(played, "publish")
    status = played.job.status
    assert status.provenance == found
    assert status.adapter.uri == "pvc://team/work/jobs/job/adapter"
    assert status.adapter.published_uri is None
    end_pods(played)

    status = played.job.status
    assert status.phase == Phase.SUCCEEDED
    assert status.adapter.published_uri == "s3://bucket/adapters/2"
    assert status.message == "the adapter is in pvc://team/work/jobs/job/adapter and s3://bucket/adapters/2"


EACH_STAGE = pytest.mark.parametrize("stage", ["fetch", "train", "publish"])
RUNNING = pytest.mark.parametrize("running", [False, True], ids=["starting", "running"])


@EACH_STAGE
def test_a_stage_that_fails_is_tried_again(cluster: Callable[..., Any], stage: str) -> None:
    """A restart repeats its stage alone: what was fetched or trained before stays."""
    played = cluster("all of them")
    reach(played, stage)
    before = played.job.status.attempt
    end_pods(played, 1)

    reach(played, stage)

    assert played.job.status.attempt == before + 1
    assert (played.job.status.restarts.user, played.job.status.phase) == (1, PHASES[stage])
    played.settle()
    stages_gone_through = [attempt.stage for attempt in played.job.status.attempts]
    assert stages_gone_through == sorted([*ROUTES["all of them"], stage], key=ROUTES["all of them"].index)


def test_back_off_counts_failures_of_a_stage(cluster: Callable[..., Any]) -> None:
    """A fetch that fails again and again waits longer each time; its failures do not slow what comes after."""
    played = cluster("all of them", backoffLimit=4)
    waits = []
    for _ in range(3):
        reach(played, "fetch")
        ended = played.now
        end_pods(played, 32)
        while not played.living():
            look(played)
        waits.append((played.now - ended).total_seconds())
    reach(played, "train")
    end_pods(played, 1)

    assert waits[0] < 8 < waits[1] < waits[2]
    assert until_pods(played) != []


QUEUED = {"scheduling": {"queueName": "q"}, "infrastructureBackoffLimit": 1}


def admitted(played: Any) -> None:
    """The queue lets the job in, and its ranks run."""
    played.let_in(suspended=False)
    calm(played, 2)
    assert played.job.status.phase == Phase.RUNNING


def test_evictions_by_the_queue_cost_nothing(cluster: Callable[..., Any]) -> None:
    """However many: the next attempt waits in the queue at once."""
    played = cluster(**QUEUED)
    calm(played, 1)
    for number in range(3):
        admitted(played)
        evict(played)
        status = played.job.status
        assert [attempt.reason for attempt in status.attempts] == ["Requeued"] * (number + 1) + [None]
        assert (status.phase, status.restarts.infrastructure) == (Phase.QUEUED, 0)
    played.settle()
    assert played.job.status.phase == Phase.SUCCEEDED


def is_evicted_again(played: Any) -> None:
    """Let in and taken out once more."""
    admitted(played)
    evict(played)


def loses_its_job(played: Any) -> None:
    """Somebody deletes its Job."""
    (uid,) = played.batch_jobs
    played.delete_job(uid)


def is_suspended(played: Any) -> None:
    """The user suspends the job."""
    played.set_spec(suspend=True)


@pytest.mark.parametrize("line", ["", "save", "act"])
@pytest.mark.parametrize(
    ("happens", "stays"),
    [(look, True), (is_evicted_again, True), (loses_its_job, True), (is_suspended, False)],
)
def test_an_evicted_job_keeps_its_place(
    cluster: Callable[..., Any], happens: Callable[[Any], None], stays: bool, line: str
) -> None:
    """Whatever becomes of it next, and wherever the operator dies: its Workload is taken over, or goes."""
    played = mortal(cluster(scheduling={"queueName": "q"}, infrastructureBackoffLimit=9), line)
    calm(played, 1)
    admitted(played)
    (first,) = played.workloads
    evict(played)
    assert [job.workload for job in played.batch_jobs.values()] == [first]

    happens(played)
    for _ in range(5):
        look(played, 30)

    assert list(played.workloads) == ([first] if stays else [])
    assert played.unclaimed() == []
    played.settle()
    assert played.job.status.phase == Phase.SUCCEEDED
    assert played.unclaimed() == []


@pytest.mark.parametrize("line", ["", "save", "act"])
def test_an_evicted_job_without_nodes_leaves_the_queue(cluster: Callable[..., Any], line: str) -> None:
    """Its Workload could be let in, and its quota lie idle; once there are nodes the job queues anew."""
    played = mortal(cluster(scheduling={"queueName": "q"}), line)
    calm(played, 1)
    admitted(played)
    played.tiers = ()

    evict(played)
    for _ in range(5):
        look(played, 30)

    assert (played.workloads, played.job.status.phase) == ({}, Phase.PENDING)
    assert played.job.status.attempts[-1].workload is None
    played.settle()
    assert played.job.status.phase == Phase.SUCCEEDED


def mortal(played: Any, line: str) -> Any:
    """Its operator dies there in each decision, if anywhere, and makes the decision again."""
    live = played.reconcile

    def dies_and_lives() -> None:
        if line:
            live(dies=line)
        live()

    played.reconcile = dies_and_lives
    return played


def evict(played: Any) -> None:
    """The queue takes the job out, and its ranks stop."""
    played.let_in(suspended=True)
    for _ in range(6):
        played.control()
        for pod in played.living():
            if pod.deleting_since is not None:
                played.ends(pod.uid, 143)
        played.watch()
        played.reconcile()


WORKLOAD = "job-job-a0-abcde"


def evicted(reason: str = "Requeued", **fields: Any) -> dict[str, Any]:
    """The status of a job whose attempt 0 was taken out of its queue, and has ended or is about to."""
    attempt = {"attempt": 0, "start": START, "jobUid": "job-uid-0", "reason": reason, "message": "m"}
    fields = {"end": START, "workload": WORKLOAD, **fields}
    placed = {"isa": "avx512", "worldSize": 2}
    return {"attempt": 0, "attempts": [{**attempt, **fields}], "startTime": START, "placement": placed}


def test_a_job_that_is_evicted_keeps_its_workload(
    ask: Callable[..., Decision], make_attempt_job: Any, make_pod: Any
) -> None:
    """It becomes the job's own before its Job goes, and the next attempt's Job names it."""
    job = make_attempt_job(suspended=True)

    goes = ask(evicted(end=None), [job], [make_pod(phase="Running", node="n")], spec=QUEUED)
    follows = ask(evicted(), [], [], spec=QUEUED)

    assert goes.actions == (KeepWorkload(WORKLOAD, job.name, job.uid), DeleteAttemptJob(job.name, job.uid))
    (start,) = follows.actions
    assert isinstance(start, StartAttempt)
    assert (start.attempt, start.workload) == (1, WORKLOAD)


@pytest.mark.parametrize(
    ("status", "jobs", "seen", "dropped"),
    [
        pytest.param(evicted(), [], {"spec": {"suspend": True}}, WORKLOAD, id="the user suspends the job"),
        pytest.param(evicted(), [], {"tiers": []}, WORKLOAD, id="there are no nodes"),
        pytest.param(
            evicted(end=None, workload=None, reason="Stalled"),
            [{"workload": WORKLOAD, "suspended": True}],
            {},
            WORKLOAD,
            id="its Job ends otherwise",
        ),
        pytest.param(
            evicted(end=None),
            [{"workload": WORKLOAD, "suspended": True}],
            {},
            None,
            id="it is evicted again",
        ),
    ],
)
def test_a_workload_that_is_not_taken_over_leaves_the_queue(
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    status: dict[str, Any],
    jobs: list[dict[str, Any]],
    seen: dict[str, Any],
    dropped: str | None,
) -> None:
    """It would hold quota for nobody, and its owner is the job, which lives on."""
    spec = {**QUEUED, **seen.get("spec", {})}
    known = {key: value for key, value in seen.items() if key != "spec"}
    batch_jobs = [make_attempt_job(**job) for job in jobs]

    decision = ask(status, batch_jobs, [], spec=spec, workload=WORKLOAD, **known)
    again = ask(decision.status.model_dump(by_alias=True), batch_jobs, [], spec=spec, workload=None, **known)

    assert [each.name for each in decision.actions if isinstance(each, DropWorkload)] == [dropped] * bool(
        dropped
    )
    if not jobs:
        assert again.actions == ()
        assert again.status.attempts[-1].workload is None


@pytest.mark.parametrize("code", [50, 143])
def test_an_eviction_that_the_operator_sleeps_through_costs_nothing(
    cluster: Callable[..., Any], code: int
) -> None:
    """Its ranks stop, after which the Job fails by its own rules before anybody has seen it suspended."""
    played = cluster(scheduling={"queueName": "q"}, infrastructureBackoffLimit=0)
    calm(played, 1)
    admitted(played)
    played.let_in(suspended=True)
    stop_ranks(played, code)
    for _ in range(3):
        look(played)

    status = played.job.status
    assert [attempt.reason for attempt in status.attempts] == ["Requeued", None]
    assert (status.phase, status.restarts.infrastructure) == (Phase.QUEUED, 0)


def stop_ranks(played: Any, code: int) -> None:
    """The Job controller deletes the pods of a suspended Job, which end with this code."""
    played.control()
    for pod in played.living():
        assert pod.deleting_since is not None
        played.ends(pod.uid, code)
    played.control()


@pytest.mark.parametrize("code", [50, 143])
def test_a_job_that_the_queues_administrator_stops_is_held(cluster: Callable[..., Any], code: int) -> None:
    """Its Job stays, with its Workload, until that is activated, although its ranks stop; then another attempt waits in
    the queue."""
    played = cluster(**QUEUED)
    calm(played, 1)
    admitted(played)
    played.deactivated = "stopped by somebody"
    played.let_in(suspended=True)
    stop_ranks(played, code)
    for _ in range(5):
        pass_time(played, 60)
        played.control()
        played.watch()
        played.reconcile()
    status = played.job.status
    assert (status.phase, len(played.batch_jobs)) == (Phase.QUEUED, 1)
    assert str(status.message).endswith("activated again: stopped by somebody")
    assert [attempt.reason for attempt in status.attempts] == [None]

    played.deactivated = ""
    played.settle()

    status = played.job.status
    assert [attempt.reason for attempt in status.attempts] == ["Requeued", "Succeeded"]
    assert (status.phase, status.restarts.infrastructure) == (Phase.SUCCEEDED, 0)


@pytest.mark.parametrize("queue", ["default", None])
def test_a_job_that_is_created_suspended_is_queued(cluster: Callable[..., Any], queue: str | None) -> None:
    """A webhook has put it into a queue, which the user did not ask for: nothing is wrong with that."""
    played = cluster(infrastructureBackoffLimit=0)
    played.reconcile()
    (uid,) = played.batch_jobs
    played.batch_jobs[uid] = dataclasses.replace(played.batch_jobs[uid], suspended=True, queue=queue)
    for _ in range(3):
        pass_time(played, 60)
        played.control()
        played.watch()
        played.reconcile()
    assert played.job.status.phase == Phase.QUEUED
    assert ("queue default" in str(played.job.status.message)) == (queue is not None)

    played.batch_jobs[uid] = dataclasses.replace(played.batch_jobs[uid], suspended=False)
    calm(played, 2)

    status = played.job.status
    assert (status.phase, status.restarts.infrastructure) == (Phase.RUNNING, 0)
    assert len(status.attempts) == 1


def test_a_queued_jobs_job_goes_with_it_although_the_watch_is_behind(cluster: Callable[..., Any]) -> None:
    """Suspended while it waits in its queue, and the operator dies before it deletes the Job, which has no pods to tell
    of it: the next operator, whose watch has not shown the Job, closes the attempt on the API server's word only."""
    played = cluster(scheduling={"queueName": "q"})
    played.reconcile()
    played.watch()
    played.set_spec(suspend=True)
    played.reconcile(dies="act")
    played.watched = {}
    played.reconcile()
    played.control()
    assert played.batch_jobs == {}

    played.watch()
    played.reconcile()
    status = played.job.status
    assert (status.phase, status.attempts[0].end is not None) == (Phase.SUSPENDED, True)


@pytest.mark.parametrize("suspend", [True, False])
def test_a_job_that_outlives_its_attempt_is_deleted_before_another_is_made(
    ask: Callable[..., Decision], make_attempt_job: Any, suspend: bool
) -> None:
    """Whoever closed the attempt did not know of it: a queue may yet admit it."""
    decision = ask(between("Suspended"), [make_attempt_job(suspended=True)], [], spec={"suspend": suspend})

    assert decision.actions == (DeleteAttemptJob("job-a0", "job-uid-0"),)


def at_work(played: Any) -> list[AttemptJob]:
    """Jobs that are not done: that of the ranks stays once the adapter is there."""
    return [job for job in played.batch_jobs.values() if not job.complete]


@RUNNING
@EACH_STAGE
def test_a_suspended_job_continues_with_its_stage(
    cluster: Callable[..., Any], stage: str, running: bool
) -> None:
    """A suspended job goes on with the stage that it was in, at no cost, and knows what it knew."""
    played = cluster("all of them", backoffLimit=0, infrastructureBackoffLimit=0)
    reach(played, stage, running=running)
    known = played.job.status.provenance
    before = played.job.status.attempt

    played.set_spec(suspend=True)
    look(played)
    assert played.job.status.phase == Phase.SUSPENDED
    for pod in played.living():
        played.ends(pod.uid, 143)
    for _ in range(5):
        look(played)
    assert (played.living(), at_work(played)) == ([], [])
    played.set_spec(suspend=False)
    until_pods(played)

    status = played.job.status
    assert [attempt.reason for attempt in status.attempts[before:]] == ["Suspended", None]
    assert stage_of(played) == (stage, before + 1)
    assert status.provenance == known
    played.settle()
    assert played.job.status.phase == Phase.SUCCEEDED


@RUNNING
@EACH_STAGE
def test_a_job_goes_on_in_its_next_window(cluster: Callable[..., Any], stage: str, running: bool) -> None:
    """A window that closes ends the attempt after a checkpoint, at no cost to any budget, and nothing starts by day,
    whoever restarts the operator; the next window goes on with the same stage."""
    played = cluster(
        "all of them", backoffLimit=0, infrastructureBackoffLimit=0, activeDeadlineSeconds=36_000
    )
    reach(played, stage, running=running)
    before = played.job.status.attempt
    schedule(played, "nights")

    look(played)
    assert (played.job.status.phase, played.job.status.attempts[-1].reason) == (
        Phase.SUSPENDED,
        "OutsideWindows",
    )
    for pod in played.living():
        played.ends(pod.uid, 50)
    for _ in range(3):
        look(played)
    for _ in range(5):
        played.watched = {}
        look(played, 3600)
        assert (played.living(), at_work(played), played.job.status.attempt) == ([], [], before)
    pass_time(played, 2 * 3600)
    until_pods(played)

    status = played.job.status
    assert [attempt.reason for attempt in status.attempts[before:]] == ["OutsideWindows", None]
    assert stage_of(played) == (stage, before + 1)
    assert (status.restarts.user, status.restarts.infrastructure) == (0, 0)
    played.settle()
    assert played.job.status.phase == Phase.SUCCEEDED


def test_a_job_leaves_its_queue_outside_its_windows(cluster: Callable[..., Any]) -> None:
    """Its Job would take quota by day that it may not use; in the next window it queues again."""
    played = cluster(scheduling={"queueName": "q"})
    look(played)
    schedule(played, "nights")
    for _ in range(4):
        look(played)
    assert (played.batch_jobs, played.job.status.phase) == ({}, Phase.SUSPENDED)

    look(played, 8 * 3600)
    look(played)

    assert played.job.status.phase == Phase.QUEUED
    assert played.job.status.attempts[0].reason == "OutsideWindows"


@pytest.mark.parametrize("stage", ["fetch", "train"])
@pytest.mark.parametrize(
    ("field", "running", "reason"),
    [
        ("activeDeadlineSeconds", True, "DeadlineExceeded"),
        ("activeDeadlineSeconds", False, "DeadlineExceeded"),
        ("pendingDeadlineSeconds", False, "PendingDeadlineExceeded"),
    ],
    ids=["active, running", "active, starting", "pending"],
)
def test_a_deadline_fails_the_job_until_it_is_trained(
    cluster: Callable[..., Any], stage: str, field: str, running: bool, reason: str
) -> None:
    """A deadline that passes in any stage before the last fails the job, and leaves nothing that lives."""
    played = cluster("all of them", **{field: 600})
    reach(played, stage, running=running)

    look(played, 600)

    status = played.job.status
    assert (status.phase, status.attempts[-1].reason) == (Phase.FAILED, reason)
    before = status.attempt
    for pod in played.living():
        played.ends(pod.uid, 143)
    for _ in range(5):
        look(played, 60)
    assert played.living() == []
    assert played.job.status.attempt == before


def test_a_deadline_counts_all_stages(cluster: Callable[..., Any]) -> None:
    """activeDeadlineSeconds counts from the job's start, not from a stage's."""
    played = cluster("all of them", activeDeadlineSeconds=600)
    reach(played, "fetch")
    look(played, 400)
    reach_next = [end_pods, until_pods, run_pods]
    for step in reach_next:
        step(played)
    assert stage_of(played) == ("train", 1)

    look(played, 200)

    assert played.job.status.attempts[-1].reason == "DeadlineExceeded"


@pytest.mark.parametrize("line", ["save", "act"])
@pytest.mark.parametrize("journey", ROUTES)
def test_the_operator_dies_all_the_time(cluster: Callable[..., Any], journey: str, line: str) -> None:
    """Killed before it saves, or before it acts, at every single decision, it still does each stage once."""
    played = cluster(journey, backoffLimit=0, infrastructureBackoffLimit=0)
    live = played.reconcile

    def mortal() -> None:
        live(dies=line)
        live()

    played.reconcile = mortal
    for stage in ROUTES[journey]:
        reach(played, stage)
    end_pods(played)

    status = played.job.status
    assert status.phase == Phase.SUCCEEDED
    assert [attempt.stage for attempt in status.attempts] == ROUTES[journey]
    assert len({job.attempt for job in played.batch_jobs.values()}) == len(played.batch_jobs)


@pytest.mark.parametrize("journey", ROUTES)
def test_a_finished_job_gets_no_attempts(cluster: Callable[..., Any], journey: str) -> None:
    """Over is over, whatever there would be to fetch or to send."""
    played = cluster(journey)
    played.settle()
    over = played.job.status

    for _ in range(5):
        look(played, 3600)
        assert (played.job.status.attempt, played.job.status.attempts) == (over.attempt, over.attempts)
        assert played.living() == []


@pytest.mark.parametrize("code", [17, 14], ids=["refused", "no space"])
@pytest.mark.parametrize("stage", ["fetch", "publish"])
def test_a_transfer_that_cannot_work_fails_the_job(
    cluster: Callable[..., Any], stage: str, code: int
) -> None:
    """What the other side refuses for good is not tried again, however many restarts there are."""
    played = cluster("all of them", backoffLimit=1000)
    reach(played, stage)

    end_pods(played, code)
    before = played.job.status.attempt
    for _ in range(5):
        look(played, 600)

    status = played.job.status
    assert (status.phase, status.attempt, status.restarts.user) == (Phase.FAILED, before, 0)
    assert (status.adapter is not None) == (stage == "publish"), "what was trained is not lost"
    assert stage in [attempt.stage for attempt in status.attempts]


def test_data_that_cannot_be_trained_on_are_a_condition(cluster: Callable[..., Any]) -> None:
    """In the words of the rank that read them."""
    played = cluster("all of them")
    reach(played, "train")
    end_pods(played, 11, "train.jsonl: line 3: is not JSON")
    for _ in range(3):
        look(played, 60)

    checked = conditions.find(played.job.status.conditions, ConditionType.DATA_CHECKED)

    assert played.finished
    assert checked is not None
    assert (checked.status, checked.reason) == ("False", "InvalidData")
    assert "train.jsonl: line 3: is not JSON" in checked.message


@pytest.mark.parametrize("stage", ["fetch", "publish"])
def test_reports_that_get_lost_are_paid_for(cluster: Callable[..., Any], stage: str) -> None:
    """A transfer that never tells what it did is done again, but not for ever."""
    played = cluster("all of them", backoffLimit=2)
    for _ in range(3):
        reach(played, stage)
        end_pods(played, 0, words="")
        for _ in range(10):
            look(played, 60)
            if played.living() or played.finished:
                break

    status = played.job.status
    assert (status.phase, status.restarts.user) == (Phase.FAILED, 2)
    assert status.attempts[-1].reason == "TransferFailed"
    assert "left no report" in status.message


def test_a_fetch_that_tells_only_half_is_done_again_for_the_other(cluster: Callable[..., Any]) -> None:
    """What is known stays as it is: a branch may have moved since."""
    played = cluster("all of them")
    reach(played, "fetch")
    half = '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": "", "fetched": {"model": "half"}}'

    end_pods(played, 0, words=half)
    reach(played, "train")

    found = played.job.status.provenance
    assert [attempt.reason for attempt in played.job.status.attempts] == ["TransferFailed", "Fetched", None]
    assert found.model_revision == "half"
    assert found.dataset_revision is not None
    assert played.job.status.restarts.user == 1


@pytest.mark.parametrize(
    ("adapter", "stage", "kept"),
    [(None, "train", False), ({"uri": "pvc://team/work/jobs/job/adapter"}, "publish", True)],
    ids=["train", "publish"],
)
def test_where_the_ranks_ran_is_told_until_they_run_elsewhere(
    ask: Callable[..., Decision], adapter: Any, stage: str, kept: bool
) -> None:
    """Ranks and nodes are those of the last training: an upload leaves them, new ranks do not."""
    ranks = [{"index": 0, "pod": "job-a0-0", "node": "n"}]
    status = between("Trained", ranks=ranks, adapter=adapter)
    status["placement"] |= {"nodes": ["n"], "dtype": "bf16"}

    found = ask(status, [], [], spec={"output": {"destination": "s3://bucket/adapters"}}).status

    assert found.attempts[-1].stage == stage
    assert (found.placement.nodes, len(found.ranks)) == ((["n"], 1) if kept else ([], 0))
    assert (found.placement.dtype, found.placement.world_size) == ("bf16", 2)
