"""The witness notices what must never be."""

from typing import Any

import pytest

from testcluster.control_plane import ControlPlane
from testcluster.kubelet import Kubelet
from testcluster.waiting import wait_for
from testcluster.witness import Witness

pytestmark = pytest.mark.cluster


def start(cluster: ControlPlane, namespace: str, name: str, attempt: int) -> Any:
    """A batch/v1 Job as of one attempt; its pod, which runs."""
    labels = {"qlora.dev/job-uid": "one", "qlora.dev/attempt": str(attempt)}
    security: Any = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {"name": "main", "image": "none", "securityContext": security}
    profile = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    # Nothing but the test puts it on a node.
    spec = {"restartPolicy": "Never", "containers": [container], "nodeSelector": {"no": "node"}}
    spec["securityContext"] = profile
    body = {"metadata": {"name": name}, "spec": {"template": {"metadata": {"labels": labels}, "spec": spec}}}
    cluster.client.post(f"/apis/batch/v1/namespaces/{namespace}/jobs", body)
    kubelet = Kubelet(cluster.client)
    return kubelet.running(kubelet.pods(namespace, f"job-name={name}", 1)[0])


def ends(cluster: ControlPlane, pod: Any) -> None:
    """The pod is over."""
    Kubelet(cluster.client).succeeded(pod)
    path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
    wait_for(lambda: cluster.client.get(path)["status"]["phase"] == "Succeeded")


def test_one_after_the_other(control_plane: ControlPlane, namespace: str) -> None:
    """Gangs of which one begins when the other is over are in order."""
    witness = Witness(control_plane.client, namespace)
    ends(control_plane, start(control_plane, namespace, "a", 0))
    ends(control_plane, start(control_plane, namespace, "b", 1))
    witness.look()
    assert witness.faults == []
    assert {attempt: len(jobs) for (_, attempt), jobs in witness.jobs.items()} == {"0": 1, "1": 1}


def test_two_at_a_time(control_plane: ControlPlane, namespace: str) -> None:
    """Two gangs at a time are noticed, though both are over when somebody looks."""
    witness = Witness(control_plane.client, namespace)
    pods = [start(control_plane, namespace, name, 0) for name in ("a", "b")]
    for pod in pods:
        ends(control_plane, pod)
    witness.look()
    assert "two gangs at a time" in witness.faults[0]
    assert [len(jobs) for jobs in witness.jobs.values()] == [2]
