"""KWOK's nodes take and run pods, and nothing else is touched."""

from collections.abc import Iterator
from typing import Any

import pytest

from testcluster.control_plane import ControlPlane
from testcluster.fixtures import fresh_namespace
from testcluster.fleet import RUNS_FOR, Fleet
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

AMX = {"feature.node.kubernetes.io/cpu-cpuid.AMXBF16": "true"}


@pytest.fixture(scope="module")
def completing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet on a cluster of its own, whose pods end well."""
    cluster = ControlPlane.start(tmp_path_factory.mktemp("fleet") / "cluster")
    started = Fleet.start(cluster, pods="complete")
    started.add_nodes(3, labels=AMX, cpu="4", memory="16Gi")
    started.add_nodes(2, prefix="plain")
    yield started
    started.stop()
    cluster.stop()


def job(name: str, *, pods: int, cpu: str = "1", annotations: dict[str, str] | None = None) -> dict[str, Any]:
    """A Job whose pods ask for AMX and run with the restricted profile."""
    container = {
        "name": "c",
        "image": "example.org/trainer:1",
        "resources": {"requests": {"cpu": cpu, "memory": "1Gi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    secure = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {
        "restartPolicy": "Never",
        "containers": [container],
        "securityContext": secure,
        "nodeSelector": AMX,
    }
    template = {"metadata": {"annotations": annotations or {}}, "spec": spec}
    return {
        "metadata": {"name": name},
        "spec": {"completionMode": "Indexed", "completions": pods, "parallelism": pods, "template": template},
    }


def test_nodes_are_ready_with_their_size_and_labels(completing: Fleet) -> None:
    """The nodes have the asked-for labels and size, are ready, and renew their leases."""
    client = completing.cluster.client

    node = wait_for(lambda: _if_ready(client.get("/api/v1/nodes/fleet-0")))

    assert node["metadata"]["labels"].items() >= AMX.items()
    assert node["status"]["allocatable"]["cpu"] == "4"
    assert wait_for(lambda: client.items("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"))


def test_a_job_runs_to_its_end(completing: Fleet) -> None:
    """The real scheduler places a Job's pods on nodes with the labels, and they end well."""
    client = completing.cluster.client
    with fresh_namespace(completing.cluster, "fleet") as namespace:
        jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        client.post(jobs, job("g", pods=3, cpu="3"))

        wait_for(lambda: client.get(f"{jobs}/g")["status"].get("succeeded") == 3)
        pods = client.items(f"/api/v1/namespaces/{namespace}/pods")

        assert {pod["spec"]["nodeName"] for pod in pods} == {"fleet-0", "fleet-1", "fleet-2"}


def test_what_does_not_fit_stays_pending(completing: Fleet) -> None:
    """A pod for which no node has room is unschedulable, and the scheduler says why."""
    client = completing.cluster.client
    with fresh_namespace(completing.cluster, "fleet") as namespace:
        client.post(f"/apis/batch/v1/namespaces/{namespace}/jobs", job("g", pods=1, cpu="5"))

        condition = wait_for(lambda: _unschedulable(client.items(f"/api/v1/namespaces/{namespace}/pods")))

        assert "3 Insufficient cpu" in condition["message"]
        assert "2 node(s) didn't match Pod's node affinity/selector" in condition["message"]


def test_a_deleted_pod_ends_like_one_that_obeyed(completing: Fleet) -> None:
    """A running pod that is deleted ends with 143, and the Job counts it as failed."""
    client = completing.cluster.client
    with fresh_namespace(completing.cluster, "fleet") as namespace:
        jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        client.post(jobs, job("g", pods=1, annotations={RUNS_FOR: "600s"}))
        wait_for(lambda: client.get(f"{jobs}/g")["status"].get("ready") == 1)

        [pod] = client.items(f"/api/v1/namespaces/{namespace}/pods")
        client.delete(f"/api/v1/namespaces/{namespace}/pods/{pod['metadata']['name']}")

        assert wait_for(lambda: client.get(f"{jobs}/g")["status"].get("failed") == 1)


def test_other_nodes_are_left_alone(completing: Fleet) -> None:
    """A pod on a node without KWOK's annotation stays as it is."""
    client = completing.cluster.client
    client.post("/api/v1/nodes", {"metadata": {"name": "not-kwok"}})
    with fresh_namespace(completing.cluster, "fleet") as namespace:
        pod = job("g", pods=1)["spec"]["template"]
        pod["metadata"] = {"name": "p"}
        pod["spec"]["nodeName"] = "not-kwok"
        client.post(f"/api/v1/namespaces/{namespace}/pods", pod)
        # A pod that KWOK does play, made later, runs.
        client.post(f"/apis/batch/v1/namespaces/{namespace}/jobs", job("g", pods=1))
        wait_for(
            lambda: client.get(f"/apis/batch/v1/namespaces/{namespace}/jobs/g")["status"].get("succeeded")
        )

        assert client.get(f"/api/v1/namespaces/{namespace}/pods/p")["status"]["phase"] == "Pending"


def test_nodes_are_removed(completing: Fleet) -> None:
    """Removing a fleet's nodes leaves the others."""
    client = completing.cluster.client
    other = Fleet(completing.cluster)

    other.add_nodes(2, prefix="brief")
    before = {each["metadata"]["name"] for each in client.items("/api/v1/nodes")}
    other.remove_nodes()
    after = {each["metadata"]["name"] for each in client.items("/api/v1/nodes")}

    assert before - after == {"brief-0", "brief-1"}
    assert "fleet-0" in after


def _if_ready(node: dict[str, Any]) -> dict[str, Any] | None:
    ready = [each for each in node["status"].get("conditions", []) if each["type"] == "Ready"]
    return node if ready and ready[0]["status"] == "True" else None


def _unschedulable(pods: list[dict[str, Any]]) -> dict[str, Any] | None:
    conditions = [each for pod in pods for each in pod["status"].get("conditions", [])]
    return next((each for each in conditions if each.get("reason") == "Unschedulable"), None)
