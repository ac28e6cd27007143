"""Decisions as a whole: whatever happens in whatever order, a job ends well or says why not."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_operator.api.names import Phase

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
