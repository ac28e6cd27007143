"""Jobs under Kubernetes' own gang scheduling: the Job controller makes a group for a Job of an attempt's form."""

from collections.abc import Callable
from typing import Any

import pytest

from testcluster.control_plane import ControlPlane
from testcluster.kubelet import Kubelet
from testcluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_operator", "claim", "terminations")]

MakeJob = Callable[..., Any]
AVX512 = {f"feature.node.kubernetes.io/cpu-cpuid.{flag}": "true" for flag in ("AVX512F", "AVX2")}


def test_a_gang_holds_no_node_before_there_is_room_for_all(
    make_job: MakeJob, api_cluster: ControlPlane, kubelet: Kubelet, fill: Any
) -> None:
    """The scheduler takes the pods of an attempt together: of two, none gets the one node that is free."""
    for node in ("first", "second"):
        kubelet.add_node(node, labels=AVX512, cpu="1")
    free = fill("second")

    job = make_job(isa={"allowed": ["avx512"]})

    job.until(lambda status: "Insufficient cpu" in (status.get("message") or ""), 40)
    assert job.condition("Running")["reason"] == "Unschedulable"
    groups = f"/apis/scheduling.k8s.io/v1alpha2/namespaces/{job.namespace}/podgroups"
    (group,) = api_cluster.client.items(groups)
    assert group["spec"]["schedulingPolicy"]["gang"]["minCount"] == 2
    pods = job.pods(0)
    assert [pod["spec"]["schedulingGroup"]["podGroupName"] for pod in pods] == [group["metadata"]["name"]] * 2
    assert [pod["spec"].get("nodeName") for pod in pods] == [None, None]

    free()

    wait_for(lambda: sorted(pod["spec"].get("nodeName", "") for pod in job.pods(0)) == ["first", "second"])
    job.run()
    assert job.status["restarts"] == {"user": 0, "infrastructure": 0}
