"""Which tier an attempt gets, and what happens when its nodes have no room: with the real scheduler."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qlora_contract.exit_codes import ExitCode
from qlora_contract.run_config import ISA_TIERS
from qlora_operator.api.names import TIER_LABELS
from testcluster.client import Client
from testcluster.cluster import Cluster
from testcluster.errors import ClusterError
from testcluster.kubelet import Kubelet
from testcluster.rank_zero import rank_zero
from testcluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("pools", "shared_operator", "claim")]

MakeJob = Callable[..., Any]
NO_RESTARTS = {"user": 0, "infrastructure": 0}
NODES = {
    "tiers-amx": ("tiers", "amx_bf16"),
    "tiers-avx512": ("tiers", "avx512"),
    "pair-1": ("pair", "avx512"),
    "pair-2": ("pair", "avx512"),
    "twins-1": ("twins", "amx_bf16"),
    "twins-2": ("twins", "amx_bf16"),
    "bare-1": ("bare", None),
    "tainted-1": ("tainted", "avx512"),
}
"""Nodes with one CPU each: the pool that a job selects, and the tier."""


def labels_of(tier: str | None) -> dict[str, str]:
    """What Node Feature Discovery gives to a node of a tier: the labels of the lesser ones, too."""
    lesser = () if tier is None else ISA_TIERS[ISA_TIERS.index(tier) :]
    return {label: "true" for each in lesser for label in TIER_LABELS[each]}


@pytest.fixture(scope="module")
def pools(api_cluster: Cluster) -> Iterator[None]:
    """The nodes, there before the operator looks first."""
    kubelet = Kubelet(api_cluster.client)
    for name, (pool, tier) in NODES.items():
        kubelet.add_node(name, labels={"pool": pool, **labels_of(tier)}, cpu="1")
    taint = {"key": "dedicated", "value": "training", "effect": "NoSchedule"}
    api_cluster.client.patch("/api/v1/nodes/tainted-1", {"spec": {"taints": [taint]}})
    yield
    kubelet.remove_nodes()


@pytest.fixture
def client(api_cluster: Cluster) -> Client:
    """The administrator's."""
    return api_cluster.client


def in_pool(pool: str, **scheduling: Any) -> dict[str, Any]:
    """spec.scheduling for a pool."""
    return {"nodeSelector": {"pool": pool}, **scheduling}


def node_of(job: Any, attempt: int) -> str:
    """The node that the scheduler gives to the attempt's only pod."""
    return str(wait_for(lambda: job.pods(attempt, 1)[0]["spec"].get("nodeName")))


# --- tiers


@pytest.mark.parametrize(
    ("allowed", "tier", "node"),
    [
        pytest.param(list(ISA_TIERS), "amx_bf16", "tiers-amx", id="the best there is"),
        pytest.param(["avx512_bf16", "avx512"], "avx512_bf16", "tiers-amx", id="labels only, in part"),
        pytest.param(["avx2", "amx_bf16"], "avx2", None, id="the user's order"),
    ],
)
def test_the_tier_is_the_first_that_nodes_have(
    make_job: MakeJob, allowed: list[str], tier: str, node: str | None
) -> None:
    """An attempt gets the first tier of isa.allowed for which there are nodes."""
    job = make_job(isa={"allowed": allowed}, topology={"pods": 1}, scheduling=in_pool("tiers"))

    assert node_of(job, 0) in ([node] if node else NODES)
    assert job.status["placement"]["isa"] == tier


def test_a_job_without_room_steps_down_to_the_next_tier(make_job: MakeJob, fill: Any) -> None:
    """When a tier's nodes have no room the next tier is tried after isa.stepDownSeconds, at no cost."""
    fill("tiers-amx")
    isa = {"allowed": ["amx_bf16", "avx512"], "stepDownSeconds": 1}
    job = make_job(isa=isa, topology={"pods": 1}, scheduling=in_pool("tiers"), infrastructureBackoffLimit=0)

    status = job.until(lambda status: status.get("attempt") == 1)

    assert node_of(job, 1) == "tiers-avx512"
    assert status["attempts"][0]["reason"] == "SteppedDown"
    assert "no pod was scheduled within isa.stepDownSeconds: 1: " in status["attempts"][0]["message"]
    assert "Insufficient cpu" in status["attempts"][0]["message"]
    assert status["placement"]["isa"] == "avx512"
    assert status["restarts"] == NO_RESTARTS
    job.run(1, count=1)


def test_a_job_on_the_tier_with_the_most_nodes_waits_there(make_job: MakeJob, fill: Any) -> None:
    """It has the nodes of the better tiers, too: it gets whichever is free first, and its pods are not made anew."""
    free = fill("tiers-amx")
    fill("tiers-avx512")
    isa = {"allowed": ["amx_bf16", "avx512"], "stepDownSeconds": 1}
    job = make_job(isa=isa, topology={"pods": 1}, scheduling=in_pool("tiers"))
    job.until(lambda status: status.get("attempt") == 1, 40)
    (pod,) = job.pods(1, 1)
    time.sleep(15)  # more than one look at its pods
    assert job.status["attempt"] == 1

    free()

    assert node_of(job, 1) == "tiers-amx"
    assert [each["metadata"]["uid"] for each in job.pods(1, 1)] == [pod["metadata"]["uid"]]


def test_the_pending_deadline_counts_on_over_tiers(make_job: MakeJob, fill: Any) -> None:
    """pendingDeadlineSeconds counts on while tiers are tried in turn, and the message quotes the scheduler."""
    fill("tiers-amx")
    fill("tiers-avx512")
    isa = {"allowed": ["amx_bf16", "avx512"], "stepDownSeconds": 1}
    job = make_job(isa=isa, topology={"pods": 1}, scheduling=in_pool("tiers"), pendingDeadlineSeconds=7)

    status = job.until_phase("Failed")

    assert len(status["attempts"]) > 1
    assert job.condition("Failed")["reason"] == "PendingDeadlineExceeded"
    assert "pendingDeadlineSeconds: 7: " in status["message"]
    assert "Insufficient cpu" in status["message"]


def test_a_job_with_one_tier_waits_for_room(make_job: MakeJob, fill: Any) -> None:
    """Without another tier to try, a job waits for the scheduler, and shows its words."""
    free = fill("tiers-amx")
    isa = {"allowed": ["amx_bf16"], "stepDownSeconds": 1}
    job = make_job(isa=isa, topology={"pods": 1}, scheduling=in_pool("tiers"))
    status = job.until(lambda status: "Insufficient cpu" in (status.get("message") or ""))
    assert status["phase"] == "Starting"
    assert job.condition("Running")["reason"] == "Unschedulable"

    free()

    assert node_of(job, 0) == "tiers-amx"


def test_a_job_starts_with_the_pods_that_have_nodes_and_asks_for_all_at_its_next_restart(
    make_job: MakeJob, fill: Any, terminations: None
) -> None:
    """With one of its two nodes taken, topology.minPods lets it start with one pod; once both are free it has two."""
    free = fill("pair-1")
    isa = {"allowed": ["avx512"], "stepDownSeconds": 1}
    job = make_job(isa=isa, topology={"pods": 2, "minPods": 1}, scheduling=in_pool("pair"))
    status = job.until(lambda status: status.get("attempt") == 1, 40)
    assert status["attempts"][0]["reason"] == "Shrunk"
    assert status["attempts"][1]["pods"] == 1
    assert node_of(job, 1) == "pair-2"
    (pod,) = job.kubelet.pods(job.namespace, f"qlora.dev/job-name={job.name},qlora.dev/attempt=1", 1)
    job.kubelet.running(pod)
    status = job.until(lambda status: status.get("phase") == "Running")
    assert (status["columns"]["ranks"], status["restarts"]) == ("1/1", NO_RESTARTS)

    free()
    job.kubelet.failed(pod, exit_code=1)

    status = job.until(lambda status: status.get("attempt") == 2, 60)
    assert "pods" not in status["attempts"][2]
    job.kubelet.pods(job.namespace, f"qlora.dev/job-name={job.name},qlora.dev/attempt=2", 2)


# --- no nodes


def test_a_job_that_no_node_fits_proceeds_once_one_is_labelled(make_job: MakeJob, client: Client) -> None:
    """A job that no node fits says why, counted, and proceeds by itself once a node does."""
    job = make_job(topology={"pods": 1}, scheduling=in_pool("bare"))
    status = job.until(lambda status: status.get("message"))
    assert status["phase"] == "Pending"
    assert job.condition("Initialized")["reason"] == "NoMatchingNodes"
    nodes = len(client.items("/api/v1/nodes"))
    assert status["message"].startswith(f"0/{nodes} nodes can take a rank pod: ")
    assert "lack the label pool=bare" in status["message"]
    assert "1 lacks AVX2" in status["message"]

    client.patch("/api/v1/nodes/bare-1", {"metadata": {"labels": labels_of("avx2")}})

    # The nodes are looked at every 10 s.
    job.until(lambda status: status.get("attempt") == 0, 40)
    assert node_of(job, 0) == "bare-1"
    assert job.status["placement"]["isa"] == "avx2"


# --- what the ranks find


def below_tier(job: Any, attempt: int) -> str:
    """The attempt's only rank finds less than its node's labels promise; the node."""
    node = node_of(job, attempt)
    (pod,) = job.run(attempt, count=1)
    job.kubelet.failed(pod, ExitCode.ISA_BELOW_TIER)
    return node


def test_a_node_below_its_labels_is_avoided(make_job: MakeJob) -> None:
    """A node whose rank finds less than its labels promise is avoided by the next attempt."""
    job = make_job(isa={"allowed": ["amx_bf16"]}, topology={"pods": 1}, scheduling=in_pool("twins"))
    first = below_tier(job, 0)

    status = job.until(lambda status: status["attempt"] == 1)

    assert status["attempts"][0]["reason"] == "IsaBelowTier"
    assert status["restarts"] == {"user": 0, "infrastructure": 1}
    assert status["placement"]["avoid"] == [first]
    assert {first, node_of(job, 1)} == {"twins-1", "twins-2"}


def test_a_node_below_its_labels_is_named_when_there_is_no_other(make_job: MakeJob) -> None:
    """When there is no other node than the one whose labels promise too much, the job says so."""
    job = make_job(isa={"allowed": ["amx_bf16"]}, topology={"pods": 1}, scheduling=in_pool("tiers"))
    below_tier(job, 0)

    status = job.until(lambda status: "left out" in status["message"])

    assert job.condition("Initialized")["reason"] == "NoMatchingNodes"
    assert "1 lacks AMXBF16" in status["message"]
    assert "promise: tiers-amx" in status["message"]


def test_a_job_begun_in_bf16_stays_on_native_tiers(make_job: MakeJob) -> None:
    """Once a step was made in bf16, tiers that can only emulate it are out, and the message says so."""
    isa = {"allowed": ["amx_bf16", "avx512"]}
    job = make_job(isa=isa, topology={"pods": 1}, scheduling=in_pool("tiers"))
    with rank_zero() as rank:
        rank.tell(job.get()["metadata"]["uid"], step=1, computeDtype="bf16")
        (pod,) = job.pods(0, 1)
        job.kubelet.running(pod, ip=rank.address)
        job.until(lambda status: status["placement"].get("dtype") == "bf16")
        job.kubelet.failed(pod, ExitCode.ISA_BELOW_TIER)

    status = job.until(lambda status: "has begun in bf16" in status["message"])
    assert job.condition("Initialized")["reason"] == "NoMatchingNodes"
    assert "only amx_bf16 will do" in status["message"]
    assert status["attempt"] == 0


def test_a_job_that_made_no_step_falls_back_to_another_tier(make_job: MakeJob) -> None:
    """A rank that finds its node below the tier before any step leaves the lesser tiers open."""
    isa = {"allowed": ["amx_bf16", "avx512"]}
    job = make_job(isa=isa, topology={"pods": 1}, scheduling=in_pool("tiers"))
    assert below_tier(job, 0) == "tiers-amx"

    assert job.until(lambda status: status["attempt"] == 1)["placement"]["isa"] == "avx512"
    assert node_of(job, 1) == "tiers-avx512"


# --- two gangs


def test_of_two_gangs_that_do_not_both_fit_one_lets_go(make_job: MakeJob, client: Client, fill: Any) -> None:
    """Of two gangs that each hold half of the nodes one lets go, the other runs to its end, and then the first."""
    free = [fill(node) for node in ("pair-1", "pair-2")]
    isa = {"allowed": ["avx512"], "stepDownSeconds": 3}
    limits = {"backoffLimit": 0, "infrastructureBackoffLimit": 0}
    jobs = [make_job(name, isa=isa, scheduling=in_pool("pair"), **limits) for name in ("one", "two")]
    for node, job in zip(("pair-1", "pair-2"), jobs, strict=True):
        job.kubelet.bind(job.pods(0)[0], node)
    for each in free:
        each()

    def one_that_runs() -> Any:
        return next((job for job in jobs if runs_on(client, job, {"pair-1", "pair-2"})), None)

    with jobs[0].kubelet.finish_terminations(jobs[0].namespace):
        winner = wait_for(one_that_runs, 60)
        (loser,) = set(jobs) - {winner}
        finish(winner)
        wait_for(lambda: runs_on(client, loser, {"pair-1", "pair-2"}), 60)
        finish(loser)

    assert [job.until_phase("Succeeded")["restarts"] for job in jobs] == [NO_RESTARTS, NO_RESTARTS]
    assert "Released" in {attempt["reason"] for attempt in loser.status["attempts"]}


def nodes_of(client: Client, job: Any) -> set[str]:
    """The nodes that a job's living pods are on."""
    path = f"/api/v1/namespaces/{job.namespace}/pods?labelSelector=qlora.dev/job-name={job.name}"
    living = [pod for pod in client.items(path) if pod["status"]["phase"] in ("Pending", "Running")]
    return {pod["spec"].get("nodeName", "") for pod in living if "deletionTimestamp" not in pod["metadata"]}


def runs_on(client: Client, job: Any, nodes: set[str]) -> bool:
    """Whether the job has all these nodes; then its pods are up. It may let go of them at the very last moment."""
    if nodes_of(client, job) != nodes:
        return False
    try:
        selector = f"qlora.dev/job-name={job.name}"
        for pod in job.kubelet.pods(job.namespace, selector, len(nodes), seconds=1):
            job.kubelet.running(pod)
        wait_for(lambda: job.status["phase"] == "Running", 10)
    except ClusterError:
        return False
    return True


def finish(job: Any) -> None:
    """The attempt that runs ends well."""
    for pod in job.pods():
        job.kubelet.succeeded(pod)
    job.until_phase("Succeeded")


# --- how pods ask for nodes


@pytest.mark.parametrize(("pinning", "quality"), [("strict", "Guaranteed"), ("best-effort", "Burstable")])
def test_strict_pinning_gets_the_quality_of_service_that_it_needs(
    make_job: MakeJob, pinning: str, quality: str
) -> None:
    """Strict pinning needs the quality of service for which a kubelet gives CPUs of their own."""
    job = make_job(topology={"pods": 1, "pinning": pinning})

    (pod,) = job.pods(0, 1)

    assert pod["status"]["qosClass"] == quality


def test_pods_go_where_scheduling_says(make_job: MakeJob, client: Client, namespace: str) -> None:
    """Pods go where scheduling says, to a tainted node that they tolerate, with their priority."""
    client.post("/apis/scheduling.k8s.io/v1/priorityclasses", {"metadata": {"name": namespace}, "value": 7})
    toleration = {"key": "dedicated", "operator": "Equal", "value": "training", "effect": "NoSchedule"}
    scheduling = in_pool("tainted", tolerations=[toleration], priorityClassName=namespace)
    job = make_job(topology={"pods": 1}, scheduling=scheduling)

    assert node_of(job, 0) == "tainted-1"
    assert job.pods(0, 1)[0]["spec"]["priority"] == 7
    client.delete(f"/apis/scheduling.k8s.io/v1/priorityclasses/{namespace}")


def test_a_taint_that_is_not_tolerated_is_a_reason(make_job: MakeJob) -> None:
    """A taint without its toleration is a reason, counted."""
    job = make_job(topology={"pods": 1}, scheduling=in_pool("tainted"))

    status = job.until(lambda status: status.get("message"))

    assert "1 has the taint dedicated=training:NoSchedule" in status["message"]
