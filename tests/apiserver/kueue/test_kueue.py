"""Jobs in the queues of a real Kueue. What is played are nodes and ranks."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from testcluster.control_plane import ControlPlane
from testcluster.kubelet import Kubelet
from testcluster.kueue import Kueue, Queues
from testcluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("kueue", "shared_operator", "terminations")]

MakeJob = Callable[..., Any]
Object = dict[str, Any]
NO_RESTARTS = {"user": 0, "infrastructure": 0}
POOL, RACK = "example.org/pool", "example.org/rack"
NODES = {"a-0": ("a", "r1"), "a-1": ("a", "r1"), "a-2": ("a", "r2"), "b-0": ("b", "r2"), "b-1": ("b", "r2")}
"""Nodes with their pools and racks."""
AVX512 = {f"feature.node.kubernetes.io/cpu-cpuid.{flag}": "true" for flag in ("AVX512F", "AVX2")}
BY_PRIORITY = {"preemption": {"withinClusterQueue": "LowerPriority"}}
PRIORITY = "kueue.x-k8s.io/priority-class"


@pytest.fixture(scope="module", autouse=True)
def nodes(api_cluster: ControlPlane) -> None:
    """Played nodes in two pools and two racks."""
    for name, (pool, rack) in NODES.items():
        Kubelet(api_cluster.client).add_node(name, labels={**AVX512, POOL: pool, RACK: rack}, cpu="4")


@pytest.fixture
def queues(kueue: Kueue, namespace: str) -> Queues:
    """Kueue's objects for the test's namespace."""
    return Queues(kueue.cluster.client, namespace)


def in_queue(name: str = "team-queue", **labels: str) -> Object:
    """Fields of a job that waits in this queue."""
    return {"scheduling": {"queueName": name}, "metadata": {"labels": labels}}


def waits(job: Any, words: str) -> Object:
    """The job's status, once it says that it waits in a queue because of this."""
    status: Object = job.until(lambda status: words in status.get("message", ""), 40)
    assert status["phase"] == "Queued"
    assert job.condition("QuotaReserved")["reason"] == "Queued"
    assert not job.children("pods")
    return status


def said(workload: Object, kind: str) -> Object:
    """A condition of a Workload; empty if there is none."""
    conditions = (workload.get("status") or {}).get("conditions") or []
    return next((each for each in conditions if each["type"] == kind), {})


def made_at(workload: Object) -> str:
    """When a Workload was made."""
    return str(workload["metadata"]["creationTimestamp"])


def kept_one(queues: Queues, name: str) -> Object:
    """The Workload of this name; empty if there is none."""
    return next((each for each in queues.workloads() if each["metadata"]["name"] == name), {})


def runs_again(job: Any) -> list[Object]:
    """The pods of a job that was evicted, once they run: those of the attempt that has kept its place in the queue, or
    of the next one, if Kueue has let the former in with pods of the attempt before."""

    def up() -> list[Object] | None:
        attempt = job.status["attempt"]
        mine = f"qlora.dev/job-name={job.name},qlora.dev/attempt={attempt}"
        path = f"/api/v1/namespaces/{job.namespace}/pods?labelSelector={mine}"
        pods = [pod for pod in job.client.items(path) if "deletionTimestamp" not in pod["metadata"]]
        if attempt == 0 or len(pods) != 2:
            return None
        found = [job.kubelet.running(pod) for pod in pods]
        status = job.until(lambda status: status["phase"] == "Running" or status["attempt"] != attempt)
        return found if status["attempt"] == attempt else None

    return wait_for(up, 60, or_else=lambda: str(job.status))


def test_a_gang_is_admitted_as_one_workload(make_job: MakeJob, queues: Queues) -> None:
    """All of its pods at once, onto nodes of the flavor; it is told when the quota was granted."""
    queues.cluster_queue({queues.flavor("a", {POOL: "a"}): 2})
    queues.local_queue()
    job = make_job(**in_queue())

    pods = job.run()

    (workload,) = queues.workloads()
    assert [each["count"] for each in workload["spec"]["podSets"]] == [2]
    assert said(workload, "Admitted")["status"] == "True"
    assert [pod["spec"]["nodeSelector"][POOL] for pod in pods] == ["a", "a"]
    assert job.condition("QuotaReserved")["status"] == "True"
    job.succeed(pods)
    wait_for(lambda: said(queues.workloads()[0], "Finished"), or_else="the workload's end")


def test_a_full_queue_holds_the_whole_gang(make_job: MakeJob, queues: Queues) -> None:
    """Two pods where one has room wait, and say what is missing; they start when another job has ended."""
    queues.of_cpus(3)
    first = make_job("first", **in_queue())
    pods = first.run()
    second = make_job("second", **in_queue())

    waits(second, "insufficient unused quota for cpu")
    first.succeed(pods)

    second.run()
    assert second.status["restarts"] == NO_RESTARTS


def test_more_than_the_quota_is_told(make_job: MakeJob, queues: Queues) -> None:
    """A job that the queue can never admit says so."""
    queues.of_cpus(1)

    waits(make_job(**in_queue()), "insufficient quota for cpu")


def test_a_missing_queue_is_told(make_job: MakeJob, queues: Queues) -> None:
    """A LocalQueue that is not there is named; once it is, the job runs."""
    queues.cluster_queue({queues.flavor("any"): 2})
    job = make_job(**in_queue("mistyped"))

    waits(job, "LocalQueue mistyped doesn't exist")
    queues.local_queue("mistyped")

    job.run()


def test_a_stopped_queue_is_told(make_job: MakeJob, queues: Queues) -> None:
    """So is a ClusterQueue that admits nothing now."""
    queues.of_cpus(2, stopPolicy="Hold")

    waits(make_job(**in_queue()), "is inactive")


def test_the_flavor_follows_the_jobs_own_selector(make_job: MakeJob, queues: Queues) -> None:
    """Of several flavors a job gets the first whose nodes it may go to."""
    queues.cluster_queue({queues.flavor("a", {POOL: "a"}): 9, queues.flavor("b", {POOL: "b"}): 9})
    queue = queues.local_queue()
    job = make_job(scheduling={"queueName": queue, "nodeSelector": {POOL: "b"}})

    assert [pod["spec"]["nodeSelector"][POOL] for pod in job.run()] == ["b", "b"]


def test_no_flavor_for_the_jobs_nodes_is_told(make_job: MakeJob, queues: Queues) -> None:
    """A job for nodes that no flavor has waits, and says that it does."""
    queues.cluster_queue({queues.flavor("a", {POOL: "a"}): 9})
    queue = queues.local_queue()

    waits(
        make_job(scheduling={"queueName": queue, "nodeSelector": {POOL: "b"}}), "doesn't match node affinity"
    )


def test_a_preempted_job_pays_nothing_and_goes_on(make_job: MakeJob, queues: Queues) -> None:
    """A job of higher priority takes its quota: it keeps its checkpoint, waits, and continues when there is room."""
    queues.of_cpus(2, **BY_PRIORITY)
    high, low = queues.priority("high", 100), queues.priority("low", 1)
    budgets = {"backoffLimit": 0, "infrastructureBackoffLimit": 0}
    loser = make_job("loser", **in_queue(**{PRIORITY: low}), **budgets)
    loser.run()

    winner = make_job("winner", **in_queue(**{PRIORITY: high}))
    pods = winner.run()

    status = loser.until(lambda status: status["attempt"] == 1 and status["phase"] == "Queued")
    assert status["attempts"][0]["reason"] == "Requeued"
    assert status["restarts"] == NO_RESTARTS
    waits(loser, "insufficient unused quota for cpu")
    winner.succeed(pods)
    runs_again(loser)
    assert loser.status["restarts"] == NO_RESTARTS


def test_a_preempted_job_keeps_its_place(make_job: MakeJob, queues: Queues) -> None:
    """It goes on before a job of the same priority that came later, by the same Workload."""
    queues.of_cpus(2, **BY_PRIORITY)
    high, low = queues.priority("high", 100), queues.priority("low", 1)
    loser = make_job("loser", **in_queue(**{PRIORITY: low}))
    loser.run()
    ((workload, made),) = [(each["metadata"]["name"], made_at(each)) for each in queues.workloads()]
    later = make_job("later", **in_queue(**{PRIORITY: low}))
    waits(later, "insufficient unused quota for cpu")

    winner = make_job("winner", **in_queue(**{PRIORITY: high}))
    pods = winner.run()
    loser.until(lambda status: status["attempt"] == 1 and status["phase"] == "Queued")
    winner.succeed(pods)
    pods = runs_again(loser)

    waits(later, "insufficient unused quota for cpu")
    assert later.status["attempt"] == 0
    (kept,) = [each for each in queues.workloads() if each["metadata"]["name"] == workload]
    assert made_at(kept) == made
    loser.succeed(pods)
    later.run()
    wait_for(lambda: said(kept_one(queues, workload), "Finished") or not kept_one(queues, workload))


def test_an_eviction_that_the_operator_sleeps_through_costs_nothing(
    make_job: MakeJob, queues: Queues, shared_operator: Any
) -> None:
    """What Kueue has done to its Job meanwhile is understood."""
    queues.of_cpus(2, **BY_PRIORITY)
    loser = make_job("loser", **in_queue(), backoffLimit=0, infrastructureBackoffLimit=0)
    loser.run()
    shared_operator.kill()
    try:
        another_job(queues, queues.priority("high", 100))
        loser.until_gang(0, lambda gang: gang["spec"]["suspend"])
    finally:
        shared_operator.start()

    status = loser.until(lambda status: status["attempt"] == 1 and status["phase"] == "Queued", 40)

    assert status["attempts"][0]["reason"] == "Requeued"
    assert "Preempted to accommodate a workload" in status["attempts"][0]["message"]
    assert status["restarts"] == NO_RESTARTS


def another_job(queues: Queues, priority: str) -> None:
    """Somebody's Job of two CPUs."""
    container = {
        "name": "c",
        "image": "example.org/i:1",
        "resources": {"requests": {"cpu": "2", "memory": "1Gi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    secure = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    pod = {"restartPolicy": "Never", "containers": [container], "securityContext": secure}
    labels = {"kueue.x-k8s.io/queue-name": "team-queue", PRIORITY: priority}
    body = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "another", "labels": labels},
        "spec": {"template": {"spec": pod}},
    }
    queues.client.post(f"/apis/batch/v1/namespaces/{queues.namespace}/jobs", body)


def test_a_deactivated_workload_holds_its_job(make_job: MakeJob, queues: Queues) -> None:
    """Until it is activated again: then the job goes on, at no cost."""
    queues.of_cpus(2)
    job = make_job(**in_queue(), infrastructureBackoffLimit=0)
    job.run()

    queues.set_active(False)
    job.until(lambda status: "until the Workload of its Job is activated again" in status["message"])
    assert job.condition("QuotaReserved")["reason"] == "Deactivated"
    wait_for(lambda: not job.children("pods"), or_else="the end of its pods")
    queues.set_active(True)

    runs_again(job)
    assert job.status["restarts"] == NO_RESTARTS


def test_pods_that_are_not_ready_in_time_come_later(make_job: MakeJob, queues: Queues, kueue: Kueue) -> None:
    """Kueue's waitForPodsReady evicts them: the job pays nothing, and waits for a minute."""
    kueue.configure(waitForPodsReady={"timeout": "2s"})
    try:
        queues.of_cpus(2)
        job = make_job(**in_queue(), infrastructureBackoffLimit=0)

        status = job.until(lambda status: status.get("attempts", [{}])[0].get("end"), 40)
    finally:
        kueue.configure()

    assert status["attempts"][0]["reason"] == "NotReadyInTime"
    assert "Exceeded the PodsReady timeout" in status["attempts"][0]["message"]
    assert status["restarts"] == NO_RESTARTS
    assert job.condition("Initialized")["reason"] == "BackOff"


def test_a_default_queue_takes_every_job(make_job: MakeJob, queues: Queues) -> None:
    """A job that names no queue waits in the LocalQueue `default`, if the namespace has one."""
    queues.cluster_queue({queues.flavor("any"): 2})
    queues.local_queue("default")
    first = make_job("first")
    first.run()

    waits(make_job("second"), "insufficient unused quota for cpu")

    assert {each["spec"]["queueName"] for each in queues.workloads()} == {"default"}


def test_pods_are_placed_within_one_level_of_the_topology(make_job: MakeJob, queues: Queues) -> None:
    """The annotations on a job reach Kueue, which places all of its pods in one rack."""
    queues.topology("racks", RACK, "kubernetes.io/hostname")
    queues.cluster_queue(
        {queues.flavor("b", {"kubernetes.io/os": "linux"}, topologyName=queues.name("racks")): 9}
    )
    queue = queues.local_queue()
    metadata = {"annotations": {"kueue.x-k8s.io/podset-required-topology": RACK}}
    job = make_job(scheduling={"queueName": queue}, metadata=metadata)

    def nodes() -> list[str]:
        """Kueue lets the scheduler see a pod when it knows its node."""
        return [pod["spec"].get("nodeSelector", {}).get("kubernetes.io/hostname", "") for pod in job.pods(0)]

    named = wait_for(lambda: (found := nodes()) and all(found) and found, 40, or_else=lambda: str(nodes()))

    assert queues.workloads()[0]["spec"]["podSets"][0]["topologyRequest"]["required"] == RACK
    assert len({NODES[name][1] for name in named}) == 1


def test_a_job_starts_with_the_pods_that_have_quota(make_job: MakeJob, queues: Queues) -> None:
    """With topology.minPods Kueue may let a part of a job in: an attempt of as many pods takes over its Workload. What
    is evicted asks for all pods again, by the same Workload."""
    queues.of_cpus(1)
    job = make_job(**in_queue(), topology={"minPods": 1})

    (pod,) = job.run(1, count=1)

    first, second = job.status["attempts"]
    assert (first["reason"], first["placed"], second["pods"]) == ("Shrunk", 1, 1)
    assert first["message"] == "the queue lets in 1 of 2 pods, as topology.minPods allows"
    assert job.status["placement"]["worldSize"] == 1
    assert json.loads(pod["metadata"]["annotations"]["qlora.dev/run-config"])["layout"].get("pods", 1) == 1
    (workload,) = queues.workloads()
    assert workload["metadata"]["name"] == first["workload"]
    queues.set_active(False)
    job.until(lambda status: "until the Workload of its Job is activated again" in status["message"])
    wait_for(lambda: not job.children("pods"), or_else="the end of its pod")
    queues.set_active(True)
    job.until(lambda status: status["attempt"] >= 2 and len(job.children("pods")) == 1, 60)
    assert queues.workloads()[0]["metadata"]["name"] == workload["metadata"]["name"]
    assert job.status["restarts"] == NO_RESTARTS


def test_a_job_that_somebody_gives_fewer_pods_ends_its_attempt(make_job: MakeJob, queues: Queues) -> None:
    """Somebody lets Kueue admit a part of its pods: the ranks that came would wait for the others."""
    queues.of_cpus(1)
    job = make_job(**in_queue())
    waits(job, "insufficient quota for cpu")
    (gang,) = job.gangs()
    fewer = {"metadata": {"annotations": {"kueue.x-k8s.io/job-min-parallelism": "1"}}}
    queues.client.patch(f"/apis/batch/v1/namespaces/{job.namespace}/jobs/{gang['metadata']['name']}", fewer)

    status = job.until(lambda status: status["attempt"] == 1, 40)

    assert status["attempts"][0]["reason"] == "JobChanged"
    assert "set the parallelism of the Job job-a0 to 1" in status["attempts"][0]["message"]


def test_a_queue_of_multikueue_says_that_it_cannot_run_the_job(make_job: MakeJob, queues: Queues) -> None:
    """It would run the attempt's Job, without the rest of the QLoRAJob, in another cluster."""
    check = queues.multikueue_check()
    queues.of_cpus(2, admissionChecksStrategy={"admissionChecks": [{"name": check}]})
    job = make_job(**in_queue())

    job.until(lambda status: "is kueue.x-k8s.io/multikueue" in status.get("message", ""), 40)

    assert job.status["phase"] == "Queued"
    assert job.gangs()[0]["spec"]["managedBy"] == "kueue.x-k8s.io/multikueue"


def test_a_deleted_job_leaves_the_queue(make_job: MakeJob, queues: Queues) -> None:
    """Its Workload goes with it, and the next job has its turn."""
    queues.of_cpus(2)
    running, queued = make_job("running", **in_queue()), make_job("queued", **in_queue())
    running.run()
    waits(queued, "insufficient unused quota")

    queued.delete()
    wait_for(lambda: len(queues.workloads()) == 1, or_else=lambda: str(queues.workloads()))
    running.delete()
    wait_for(lambda: not queues.workloads(), or_else=lambda: str(queues.workloads()))
