"""The chart's ClusterRole grants nothing that the operator does not do: this module takes it on a tour of all that an
operator ever does. That what it does is granted, test_whole_run.py tells of everything that ran.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testcluster.audit import Permission, granted, permission, requests
from testcluster.chart import operator_role
from testcluster.client import ApiError, Client
from testcluster.control_plane import ControlPlane
from testcluster.faulty import FaultyProxy, answer
from testcluster.rank_zero import rank_zero
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

USER = "system:serviceaccount:qlora-system:qlora-operator"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
WRITES = {"create", "update", "patch", "delete"}
ASKED_BY_ADMISSION = {("update", "qlora.dev", "qlorajobs/finalizers")}
"""Checked where admission polices owner references that block deletion, and in no request of its own."""


def used(cluster: ControlPlane) -> set[Permission]:
    """What the operator asked for so far, whether or not it was allowed."""
    return {permission(entry) for entry in requests(cluster, USER)}


@pytest.fixture
def tour(
    new_operator: Callable[..., Any],
    proxy: FaultyProxy,
    account: Path,
    namespace: str,
    make_job: Callable[..., Any],
    control_plane: ControlPlane,
    terminations: None,
) -> None:
    """An operator for all namespaces does everything that one ever does."""
    operator = new_operator(sweepSeconds=1)
    operator.kubeconfig = proxy.kubeconfig(account)
    operator.start()
    client = control_plane.client
    conflict(client, namespace)
    with proxy.fault(answer(409, "Conflict"), verb="update", resource="qlorajobs/status", times=1):
        job = make_job(ttlSecondsAfterFinished=0)
        job.until(lambda status: "that is not this job's" in status.get("message", ""))
    client.delete(f"/apis/batch/v1/namespaces/{namespace}/jobs/job-a0", {"propagationPolicy": "Background"})
    job.run(0)
    lose_network(client, job)
    # Its pods are orphans then, which the operator deletes; the next attempt's Job goes with a suspension.
    client.delete(f"/apis/batch/v1/namespaces/{namespace}/jobs/job-a0", {"propagationPolicy": "Orphan"})
    job.run(1)
    job.patch({"suspend": True})
    wait_for(lambda: not job.gangs())
    job.patch({"suspend": False})
    for pod in job.run(2):
        job.kubelet.succeeded(pod)
    jobs = f"/apis/qlora.dev/v1alpha1/namespaces/{namespace}/qlorajobs"
    wait_for(lambda: not client.items(jobs), or_else="the end of the job by its TTL")
    makes_a_checkpoint(make_job)
    job = make_job("stays")
    for pod in job.run():
        job.kubelet.succeeded(pod)
    wait_for(lambda: job.status["phase"] == "Succeeded" and not job.children("services", "networkpolicies"))
    is_refused(make_job)
    loses_its_quota(client, make_job)


def conflict(client: Client, namespace: str) -> None:
    """Somebody else's Job has the name of the first attempt's."""
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "other:1"}]}}
    body = {"metadata": {"name": "job-a0"}, "spec": {"suspend": True, "template": template}}
    client.post(f"/apis/batch/v1/namespaces/{namespace}/jobs", body)


def lose_network(client: Client, job: Any) -> None:
    """The Service goes, and comes back with the NetworkPolicy found in its place, and the other way round; both are
    edited, and mended."""
    for prefix, plural, edit in (
        ("/api/v1", "services", {"publishNotReadyAddresses": False}),
        ("/apis/networking.k8s.io/v1", "networkpolicies", {"ingress": [{}]}),
    ):
        path = f"{prefix}/namespaces/{job.namespace}/{plural}/job-ranks"
        made = client.get(path)["spec"]
        client.delete(path)
        wait_for(lambda plural=plural: job.children(plural))
        client.patch(path, {"spec": edit})
        wait_for(lambda path=path, made=made: client.get(path)["spec"] == made)


def is_refused(make_job: Callable[..., Any]) -> None:
    """A job whose pods are refused: the operator looks at the Events of its Job."""
    job = make_job("refused", scheduling={"priorityClassName": "none"})
    job.until(lambda status: "are refused" in status.get("message", ""))


def makes_a_checkpoint(make_job: Callable[..., Any]) -> None:
    """Rank 0 tells of a checkpoint: the operator annotates the attempt's Job, whose next attempt knows it at once."""
    job = make_job("saves")
    made = "2026-01-31T11:00:00Z"
    with rank_zero() as rank:
        checkpoint = {"step": 3, "time": made, "uri": "pvc://work/here/jobs/saves/checkpoints/3"}
        rank.tell(job.get()["metadata"]["uid"], step=3, checkpoint=checkpoint)
        first, second = job.pods(0)
        job.kubelet.running(first, ip=rank.address)
        job.kubelet.running(second)
        job.until_gang(
            0, lambda gang: gang["metadata"]["annotations"].get("qlora.dev/checkpoint-time") == made, 40
        )
    job.kubelet.failed(first, 50)
    job.until_gang(1, lambda gang: gang["metadata"]["annotations"]["qlora.dev/checkpoint-time"] == made)


def loses_its_quota(client: Client, make_job: Callable[..., Any]) -> None:
    """A queue lets a job in and takes it out again: the operator asks for its Workload, and keeps it until the user
    suspends the job."""
    job = make_job("queued", scheduling={"queueName": "q"})
    gang = job.until_gang(0, lambda gang: gang["spec"]["suspend"])
    workloads = serve_workloads(client, job.namespace)
    labels = {"kueue.x-k8s.io/job-uid": gang["metadata"]["uid"]}
    body = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload", "spec": {}}
    client.post(workloads, {**body, "metadata": {"name": "played", "labels": labels}})
    path = f"/apis/batch/v1/namespaces/{job.namespace}/jobs/queued-a0"
    client.patch(path, {"spec": {"suspend": False}})
    job.run(0)
    client.patch(path, {"spec": {"suspend": True}})
    job.until_gang(1, lambda gang: "kueue.x-k8s.io/prebuilt-workload-name" in gang["metadata"]["labels"])
    job.patch({"suspend": True})
    wait_for(lambda: not client.items(workloads), or_else="the end of its Workload")
    client.delete(f"{DEFINITIONS}/workloads.kueue.x-k8s.io")


def serve_workloads(client: Client, namespace: str) -> str:
    """Kueue's Workloads exist, without Kueue; their path."""
    version = {"name": "v1beta2", "served": True, "storage": True}
    version["schema"] = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    names = {"plural": "workloads", "kind": "Workload"}
    spec = {"group": "kueue.x-k8s.io", "scope": "Namespaced", "names": names, "versions": [version]}
    client.post(DEFINITIONS, {"metadata": {"name": "workloads.kueue.x-k8s.io"}, "spec": spec})
    path = f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{namespace}/workloads"

    def is_served() -> bool:
        try:
            return client.items(path) == []
        except ApiError:
            return False

    wait_for(is_served, or_else="the definition of Workloads")
    return path


def test_what_is_granted_is_used(tour: None, control_plane: ControlPlane) -> None:
    """Every permission of the operator's role is one that it uses."""
    assert granted(operator_role()) - ASKED_BY_ADMISSION - used(control_plane) == set()


@pytest.mark.parametrize(("pods", "most"), [(2, 6), (1, 5)])
def test_a_job_costs_few_writes_until_it_runs(
    operator: Any,
    make_job: Callable[..., Any],
    control_plane: ControlPlane,
    terminations: None,
    pods: int,
    most: int,
) -> None:
    """A job of two pods costs at most six writes until it runs. One of a single pod has no Service, whose endpoints
    Kubernetes would write, too; nor does a resync make one."""
    job = make_job(topology={"pods": pods})
    job.run(count=pods)
    writes = [
        f"{entry['verb']} {permission(entry)[2]}"
        for entry in requests(control_plane, USER)
        if entry["verb"] in WRITES and entry["objectRef"].get("namespace") == job.namespace
    ]
    assert len(writes) <= most, writes
    assert ("create services" in writes) == (pods > 1)
    # Another operator resyncs at its start, and then restores what is missing.
    operator.kill()
    operator.start()
    job.kubelet.failed(job.pods(0, pods)[0], 1)
    job.run(1, pods)
    assert len(job.children("services")) == (pods > 1)
    assert len(job.children("networkpolicies")) == 1
