"""manifests/rbac.yaml grants what the operator does, and nothing that it does not.

Compared with the API server's audit log of the whole session so far, whatever ran of it: what was used must be
granted. What was granted must be used by this module's own tour of all that an operator ever does.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from testcluster.client import Client
from testcluster.control_plane import ControlPlane
from testcluster.faulty import FaultyProxy, answer
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

RBAC = Path(__file__).parents[2] / "manifests" / "rbac.yaml"
USER = "system:serviceaccount:qlora-system:qlora-operator"
WRITES = {"create", "update", "patch", "delete"}
ASKED_BY_ADMISSION = {("update", "qlora.dev", "qlorajobs/finalizers")}
"""Checked where admission polices owner references that block deletion, and in no request of its own."""

Permission = tuple[str, str, str]
"""Verb, API group, resource with its subresource."""


def granted() -> set[Permission]:
    """What the ClusterRole allows."""
    role = next(doc for doc in yaml.safe_load_all(RBAC.read_text()) if doc["kind"] == "ClusterRole")
    return {
        (verb, group, resource)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def requests(cluster: ControlPlane) -> list[Any]:
    """The operator's requests for resources, from the audit log."""
    lines = cluster.audit_log.read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if entry["user"]["username"] == USER and "objectRef" in entry]


def permission(entry: Any) -> Permission:
    """What a request needs."""
    ref = entry["objectRef"]
    resource = f"{ref['resource']}/{ref['subresource']}" if "subresource" in ref else ref["resource"]
    return entry["verb"], ref.get("apiGroup", ""), resource


def used(cluster: ControlPlane) -> set[Permission]:
    """What was asked for so far, whether or not it was allowed."""
    return {permission(entry) for entry in requests(cluster)}


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
    waits_for_volumes(make_job)


def conflict(client: Client, namespace: str) -> None:
    """Somebody else's Job has the name of the first attempt's."""
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "other:1"}]}}
    body = {"metadata": {"name": "job-a0"}, "spec": {"suspend": True, "template": template}}
    client.post(f"/apis/batch/v1/namespaces/{namespace}/jobs", body)


def lose_network(client: Client, job: Any) -> None:
    """The Service goes, and comes back with the NetworkPolicy found in its place; and the other way round."""
    for prefix, plural in (("/api/v1", "services"), ("/apis/networking.k8s.io/v1", "networkpolicies")):
        client.delete(f"{prefix}/namespaces/{job.namespace}/{plural}/job-ranks")
        wait_for(lambda plural=plural: job.children(plural))


def waits_for_volumes(make_job: Callable[..., Any]) -> None:
    """A job whose claim is missing: the operator looks at the Events of its pods."""
    job = make_job("waits")
    job.until(lambda status: status.get("message", "").startswith("pod "))


def test_what_is_granted_is_used(tour: None, control_plane: ControlPlane) -> None:
    """Every permission of the operator's role is one that it uses."""
    assert granted() - ASKED_BY_ADMISSION - used(control_plane) == set()


def test_what_is_used_is_granted(
    operator: Any, make_job: Callable[..., Any], control_plane: ControlPlane
) -> None:
    """The operator asks for nothing that its role does not grant, neither here nor in tests that ran before."""
    job = make_job()
    job.succeed(job.run())
    assert used(control_plane) - granted() == set()


def test_writes_until_running(
    operator: Any, make_job: Callable[..., Any], control_plane: ControlPlane
) -> None:
    """A job of two pods costs at most six writes until it runs."""
    job = make_job()
    job.run()
    writes = [
        f"{entry['verb']} {permission(entry)[2]}"
        for entry in requests(control_plane)
        if entry["verb"] in WRITES and entry["objectRef"].get("namespace") == job.namespace
    ]
    assert len(writes) <= 6, writes
