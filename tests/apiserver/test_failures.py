"""Every way in which an attempt can end early: its reason, its sentence, its price, and what follows."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from testcluster import pod_status
from testcluster.client import STRATEGIC_PATCH, ApiError
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

Object = dict[str, Any]

LINE = "part-3.jsonl line 7 has no messages"
WAITS = {"Running", "Unschedulable", "VolumeNotReady"}
"""Reasons of Events that tell of pods which start, or of the scheduler of a cluster without volumes."""

USER, INFRASTRUCTURE, PERMANENT = "user", "infrastructure", "permanent"

CODES = {
    1: ("UnexpectedError", USER),
    10: ("InvalidConfiguration", PERMANENT),
    11: ("InvalidData", PERMANENT),
    12: ("ModelUnusable", PERMANENT),
    13: ("Diverged", PERMANENT),
    14: ("StorageFull", PERMANENT),
    15: ("OutOfMemory", PERMANENT),
    16: ("NoImprovement", PERMANENT),
    30: ("RendezvousFailed", USER),
    31: ("Stalled", USER),
    50: ("Terminated", INFRASTRUCTURE),
    51: ("IsaBelowTier", INFRASTRUCTURE),
    77: ("UnexpectedError", USER),
    137: ("Killed", USER),
    139: ("Killed", USER),
}
"""What each exit code of one rank means: those of the contract, one that nobody knows, and two signals."""
COLLATERAL = {40: "PeerLost", 41: "PeerLost", 143: "Terminated"}


@pytest.fixture
def jobs(shared_operator: Any, make_job: Callable[..., Any]) -> Callable[..., Any]:
    """jobs(**{name: pods}) -> by name a job whose ranks all run, and its pods.

    Together, since the Job controller takes its time, a second, for each step of each.
    """

    def make(**pods: int) -> dict[str, tuple[Any, list[Object]]]:
        made = {name: make_job(name, topology={"pods": count}) for name, count in pods.items()}
        pods_of = {
            name: each.kubelet.play(each.namespace, selector(each, 0), pods[name], each.kubelet.running)
            for name, each in made.items()
        }
        for each in made.values():
            each.until_phase("Running")
        return {name: (each, pods_of[name]) for name, each in made.items()}

    return make


@pytest.fixture
def job(shared_operator: Any, make_job: Callable[..., Any]) -> Callable[..., Any]:
    """job(pods=2, **spec) -> a job whose ranks all run, and its pods."""

    def make(pods: int = 2, **spec: Any) -> tuple[Any, list[Object]]:
        made = make_job(topology={"pods": pods}, **spec)
        return made, made.run(count=pods)

    return make


def words(code: int, cause: str = LINE) -> str:
    """A termination message of the trainer's launcher."""
    return json.dumps({"version": 1, "exitCode": code, "reason": "X", "cause": cause, "rank": 1, "host": "h"})


def fails(job: Any, pod: Object, code: int, **how: Any) -> None:
    """A pod ends with a code; a deleted one also goes."""
    ended = job.kubelet.failed(pod, code, **{"message": words(code), **how})
    if "deletionTimestamp" in ended["metadata"]:
        job.kubelet.finish_termination(ended)


def until_failing(job: Any, attempt: int = 0) -> None:
    """The Job controller has given up the attempt's Job."""
    job.until_gang(attempt, lambda gang: {"FailureTarget", "Failed"} & true_conditions(gang))


def true_conditions(raw: Object) -> set[str]:
    """The conditions that hold."""
    return {each["type"] for each in raw["status"].get("conditions", []) if each["status"] == "True"}


def ends(
    job: Any, reason: str, budget: str, *said: str, code: int | None = None, kept: bool = True
) -> Object:
    """Checks the one end of attempt 0: reason, sentence, exit codes, price and Event; gives the status.

    A job that has failed keeps its last pods, unless they were taken away: `kept`.
    """
    if budget == PERMANENT:
        status = job.until(
            lambda status: status.get("phase") == "Failed" and status["attempts"][0].get("end")
        )
        told, restarts = job.condition("Failed"), {"user": 0, "infrastructure": 0}
        assert job.condition("Finished")["status"] == "True"
        assert status["message"] == told["message"]
        assert bool(remaining(job)) == kept
    else:
        status = job.until(lambda status: status.get("attempt") == 1)
        told, restarts = job.condition("Restarting"), {"user": 0, "infrastructure": 0, budget: 1}
    first = status["attempts"][0]
    assert (told["reason"], told["status"]) == (reason, "True")
    assert (first["reason"], first["message"]) == (reason, told["message"])
    assert status["restarts"] == restarts
    assert [part for part in said if part not in told["message"]] == [], told["message"]
    assert code is None or code in first["exitCodes"]
    job.until_event(reason)
    posted = [each for each in job.events() if each["reason"] not in WAITS]
    assert [(each["reason"], each["type"], each["message"]) for each in posted] == [
        (reason, "Warning", told["message"])
    ]
    return status


def remaining(job: Any) -> list[Object]:
    """The pods that are there."""
    path = f"/api/v1/namespaces/{job.namespace}/pods?labelSelector={selector(job)}"
    found: list[Object] = job.client.items(path)
    return found


def selector(job: Any, attempt: int | None = None) -> str:
    """Of the pods of a job, or of one attempt of it."""
    of_job = f"qlora.dev/job-name={job.name}"
    return of_job if attempt is None else f"{of_job},qlora.dev/attempt={attempt}"


# --- exit codes


@pytest.mark.parametrize("code", CODES)
def test_an_exit_code_says_why_an_attempt_ended(jobs: Callable[..., Any], code: int) -> None:
    """An exit code says why an attempt ended: alone, before those of ranks that only follow, and after them."""
    made = jobs(alone=1, first=4, last=4)
    fails(*only(made["alone"]), code)
    fails_first(*made["first"], code)
    fails_last(*made["last"], code)
    for name, index in {"alone": 0, "first": 1, "last": 1}.items():
        (reason, budget), told = CODES[code], LINE
        each, pods = made[name]
        if name == "last" and code in OBEYED:
            reason, budget, told, index = "PeerLost", INFRASTRUCTURE, "lost rank 1", 0
        ends(
            each,
            reason,
            budget,
            f"pod {pods[index]['metadata']['name']} on node played-node",
            told,
            code=code,
        )


OBEYED = (50, 137)
"""Codes of a pod that was told to stop, as the others are after the first one has failed: no cause."""


def fails_first(job: Any, pods: list[Object], code: int) -> None:
    """The second pod fails, and takes the others along."""
    fails(job, pods[1], code)
    until_failing(job)
    for pod, other in zip((pods[0], *pods[2:]), COLLATERAL, strict=True):
        fails(job, pod, other, message=words(other, "lost rank 1"))


def fails_last(job: Any, pods: list[Object], code: int) -> None:
    """The same, but the second pod's end is reported after those of the others."""
    fails(job, pods[0], 40, message=words(40, "lost rank 1"))
    until_failing(job)
    fails(job, pods[2], 41, message=words(41, "lost rank 1"))
    fails(job, pods[3], 143, message="")
    job.kubelet.failed(pods[1], code, message=words(code))
    job.until(lambda status: status["attempts"][0].get("reason"))
    job.kubelet.finish_termination(pods[1])


@pytest.mark.parametrize("code", COLLATERAL)
def test_a_pod_that_only_left_with_others_costs_the_infrastructure_s_budget(
    job: Callable[..., Any], code: int
) -> None:
    """A pod that only left with others costs the infrastructure's budget when no other pod tells more."""
    made, [pod] = job(pods=1)
    fails(made, pod, code)
    ends(made, COLLATERAL[code], INFRASTRUCTURE, pod["metadata"]["name"], LINE, code=code)


# --- memory, disruptions, admission


def test_a_pod_killed_at_its_memory_limit_fails_the_job_and_says_what_helps(job: Callable[..., Any]) -> None:
    """A pod that the kernel killed at its memory limit fails the job and says which setting helps."""
    made, pods = job()
    fails(made, pods[1], 137, reason="OOMKilled", message="")
    until_failing(made)
    fails(made, pods[0], 40)
    said = (pods[1]["metadata"]["name"], "played-node", "memory limit", "topology.memoryPerRank")
    ends(made, "OutOfMemory", PERMANENT, *said, code=137)


DISRUPTIONS = {
    "EvictionByEvictionAPI": "Drained",
    "PreemptionByScheduler": "Preempted",
    "DeletionByTaintManager": "NodeLost",
    "TerminationByKubelet": "Evicted",
    "DeletionByPodGC": "NodeLost",
}


@pytest.mark.parametrize("why", DISRUPTIONS)
def test_a_pod_that_the_cluster_takes_away_costs_the_infrastructure_s_budget(
    job: Callable[..., Any], why: str
) -> None:
    """A pod that the cluster takes away costs the infrastructure's budget, and its condition says why."""
    made, pods = job()
    disrupt(made, pods[1], why)
    made.until(lambda status: status["attempts"][0].get("reason"))
    fails(made, pods[0], 40)
    made.kubelet.finish_termination(pods[1], exit_code=50)
    ends(made, DISRUPTIONS[why], INFRASTRUCTURE, f"pod {pods[1]['metadata']['name']} on node played-node")


def disrupt(job: Any, pod: Object, why: str) -> None:
    """The cluster begins to take a pod away; its containers still run."""
    path = pod_path(pod)
    if why == "EvictionByEvictionAPI":
        named = {"metadata": {key: pod["metadata"][key] for key in ("name", "namespace")}}
        job.client.post(f"{path}/eviction", {"apiVersion": "policy/v1", "kind": "Eviction", **named})
        return
    target = pod_status.condition("DisruptionTarget", "True", why, f"played: {why}")
    ready = pod_status.condition("Ready", "False")
    job.client.patch(f"{path}/status", {"status": {"conditions": [target, ready]}}, STRATEGIC_PATCH)
    if why != "TerminationByKubelet":
        job.client.delete(path)


def remove(job: Any, pod: Object) -> None:
    """The pod goes, whatever it says."""
    job.client.delete(pod_path(pod), {"gracePeriodSeconds": 0})


def pod_path(pod: Object) -> str:
    """Of the object."""
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def test_the_job_tells_what_became_of_pods_while_the_operator_was_away(
    shared_operator: Any, jobs: Callable[..., Any]
) -> None:
    """What became of pods that are gone when the operator comes back is told by their Job."""
    made = jobs(**{why.lower(): 1 for why in (*DISRUPTIONS, "failed", "evicted")})
    with away(shared_operator):
        fails(*only(made["failed"]), 11)
        remove(*only(made["failed"]))
        made["evicted"][0].kubelet.evicted(only(made["evicted"])[1], "memory")
        for why in DISRUPTIONS:
            each, pod = only(made[why.lower()])
            disrupt(each, pod, why)
            remove(each, each.kubelet.failed(pod, 50))
        for each, _ in made.values():
            until_failing(each)
    for why in DISRUPTIONS:
        each, pod = only(made[why.lower()])
        ends(each, "Disrupted", INFRASTRUCTURE, f"pod {pod['metadata']['name']} was disrupted")
    each, pod = only(made["failed"])
    said = f"pod {pod['metadata']['name']} exited with code 11"
    ends(each, "InvalidData", PERMANENT, said, code=11, kept=False)
    each, pod = only(made["evicted"])
    ends(each, "Evicted", INFRASTRUCTURE, pod["metadata"]["name"], "low on resource: memory", code=137)


def only(made: tuple[Any, list[Object]]) -> tuple[Any, Object]:
    """A job and its one pod."""
    job, [pod] = made
    return job, pod


@contextmanager
def away(operator: Any) -> Iterator[None]:
    """The operator is dead meanwhile."""
    operator.kill()
    try:
        yield
    finally:
        operator.start()


@pytest.mark.parametrize(
    "why", ["TopologyAffinityError", "UnexpectedAdmissionError", "OutOfcpu", "NodeAffinity"]
)
def test_a_pod_that_a_kubelet_refuses_costs_the_infrastructure_s_budget(
    shared_operator: Any, make_job: Callable[..., Any], why: str
) -> None:
    """A pod that a kubelet does not admit costs the infrastructure's budget, in the kubelet's words."""
    made = make_job()
    pods = made.pods(0)
    made.kubelet.rejected(pods[1], why, "played refusal")
    said = f"the kubelet of node played-node refused pod {pods[1]['metadata']['name']}: {why}: "
    ends(made, "AdmissionRejected", INFRASTRUCTURE, said, "played refusal")


# --- lost nodes


@pytest.fixture
def on_lost_node(
    shared_operator: Any, make_job: Callable[..., Any], namespace: str
) -> Iterator[tuple[Any, list[Object], str]]:
    """A running job, its pods, and the node of its second pod, which does not answer any more."""
    made = make_job()
    pods, node = made.pods(0), f"node-{namespace[-8:]}"
    made.kubelet.bind(pods[1], node)
    pods = made.run()
    answers(made, node, "Unknown")
    yield made, pods, node
    with suppress(ApiError):  # the test has deleted it
        made.client.delete(f"/api/v1/nodes/{node}")


def answers(job: Any, node: str, ready: str) -> None:
    """A node's heartbeats come, or do not."""
    condition = pod_status.condition(
        "Ready", ready, "NodeStatusUnknown", "Kubelet stopped posting node status."
    )
    job.client.patch(f"/api/v1/nodes/{node}/status", {"status": {"conditions": [condition]}}, STRATEGIC_PATCH)


@pytest.mark.parametrize("then", ["back", "deleted", "out-of-service"])
def test_no_attempt_follows_while_a_pod_may_live_on_a_lost_node(
    on_lost_node: tuple[Any, list[Object], str], then: str
) -> None:
    """No attempt follows while a pod may live on a lost node; it does once that pod is known to be dead."""
    made, pods, node = on_lost_node
    disrupt(made, pods[1], "DeletionByTaintManager")
    made.until(lambda status: status["attempts"][0].get("reason"))
    fails(made, pods[0], 40)
    until_failing(made)
    status = made.until(lambda status: "may still run on node" in status.get("message", ""))
    assert (status["phase"], status["attempt"]) == ("Restarting", 0)
    assert (made.condition("Running")["reason"], len(made.gangs())) == ("NodeLost", 1)
    assert [part for part in (pods[1]["metadata"]["name"], node) if part not in status["message"]] == []
    if then == "back":
        answers(made, node, "True")
        made.kubelet.finish_termination(pods[1], exit_code=143)
    else:
        collect(made, pods[1], node, then)
    ends(made, "NodeLost", INFRASTRUCTURE, f"pod {pods[1]['metadata']['name']} on node {node}")


def collect(job: Any, pod: Object, node: str, then: str) -> None:
    """What the pod garbage collector does, within a minute, with the pods of a node that is dead for sure."""
    if then == "deleted":
        job.client.delete(f"/api/v1/nodes/{node}")
    else:
        taint = {"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}
        job.client.patch(f"/api/v1/nodes/{node}", {"spec": {"taints": [taint]}})
    job.client.patch(f"{pod_path(pod)}/status", {"status": {"phase": "Failed"}}, STRATEGIC_PATCH)
    remove(job, pod)


def test_ranks_that_lose_a_peer_name_its_node(on_lost_node: tuple[Any, list[Object], str]) -> None:
    """Ranks that lose a peer whose node does not answer name that node, before the cluster gives it up."""
    made, pods, node = on_lost_node
    fails(made, pods[0], 40)
    made.until(lambda status: status["attempts"][0].get("reason"))
    made.kubelet.finish_termination(pods[1], exit_code=143)
    ends(made, "NodeLost", INFRASTRUCTURE, f"node {node} of pod {pods[1]['metadata']['name']}", code=40)


# --- words


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("step 1\n\x1b[31mRuntimeError: no\x07 room\x1b[0m\n\n", ": RuntimeError: no room"),
        ("x" * 4000, ": " + "x" * 599 + "…"),
        ("", " exited with code 1"),
    ],
    ids=["coloured", "long", "none"],
)
def test_without_a_report_the_last_line_of_the_log_is_quoted(
    job: Callable[..., Any], text: str, quoted: str
) -> None:
    """Without the trainer's report the last line of the log is quoted: printable, and of bounded length."""
    made, [pod] = job(pods=1)
    fails(made, pod, 1, message=text)
    status = ends(made, "UnexpectedError", USER)
    assert status["attempts"][0]["message"].endswith(quoted)


# --- the end of the budgets


def test_a_job_without_restarts_left_fails_once_and_keeps_its_pods(job: Callable[..., Any]) -> None:
    """With no restart left the job fails and says of what, once; its pods are kept."""
    made, pods = job(pods=1, backoffLimit=0)
    fails(made, pods[0], 30)
    used_up(made, "BackoffLimitExceeded", "RendezvousFailed", LINE, "backoffLimit is 0")


def test_a_disruption_without_restarts_left_fails_the_job_and_keeps_its_pods(job: Callable[..., Any]) -> None:
    """The same after a disruption: the pods that are left are kept, although the Job had not failed yet."""
    made, pods = job(infrastructureBackoffLimit=0)
    disrupt(made, pods[1], "EvictionByEvictionAPI")
    made.until_phase("Failed")
    fails(made, pods[0], 40)
    made.kubelet.finish_termination(pods[1], exit_code=50)
    said = (pods[1]["metadata"]["name"], "infrastructureBackoffLimit is 0")
    used_up(made, "InfrastructureBackoffLimitExceeded", "Drained", *said)


def used_up(job: Any, reason: str, last: str, *said: str) -> None:
    """Checks the end of a job that has no restart left."""
    status = job.until(lambda status: status.get("phase") == "Failed" and status["attempts"][0].get("end"))
    failed = job.condition("Failed")
    assert (failed["reason"], status["attempts"][0]["reason"]) == (reason, last)
    assert status["message"] == failed["message"]
    assert [part for part in said if part not in failed["message"]] == [], failed["message"]
    assert status["restarts"] == {"user": 0, "infrastructure": 0}
    job.until_event(reason)
    assert [each["reason"] for each in job.events() if each["reason"] not in WAITS] == [reason]
    assert remaining(job)


# --- namespaces


def test_a_deleted_namespace_takes_its_jobs_with_it(shared_operator: Any, job: Callable[..., Any]) -> None:
    """A namespace that is deleted takes its jobs with it, without retries and without noise in the log."""
    made, _ = job()
    path = f"/api/v1/namespaces/{made.namespace}"
    before = len(shared_operator.log.read_text())
    with made.kubelet.finish_terminations(made.namespace):
        made.client.delete(path)
        wait_for(lambda: is_gone(made.client, path), 60)
    made.client.post(
        "/api/v1/namespaces", {"metadata": {"name": made.namespace}}
    )  # for the fixture to delete
    lines = shared_operator.log.read_text()[before:].splitlines()
    assert [line for line in lines if made.namespace in line and " INFO " not in line] == []
    assert shared_operator.get("/healthz")[0] == 200


def is_gone(client: Any, path: str) -> bool:
    """Whether there is no such object."""
    try:
        client.get(path)
    except ApiError as error:
        return error.code == 404
    return False
