"""What keeps an attempt's pods from starting: its reason, in whose words, and that the job goes on by itself."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from testcluster import pod_status
from testcluster.client import STRATEGIC_PATCH, ApiError
from testcluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_operator")]

Object = dict[str, Any]


def waits(job: Any, reason: str, *said: str, kind: str = "Running", phase: str = "Starting") -> Object:
    """Checks that the job waits for this reason: condition, message and one Event; gives the status."""
    status = job.until(lambda status: reason_of(status, kind) == reason)
    assert status["phase"] == phase
    assert [part for part in said if part not in status["message"]] == [], status["message"]
    job.until_event(reason)
    assert [each["type"] for each in job.events() if each["reason"] == reason] == ["Warning"]
    return status


def reason_of(status: Object, kind: str) -> str | None:
    """Of a condition that does not hold."""
    conditions = status.get("conditions", [])
    return next((c["reason"] for c in conditions if c["type"] == kind and c["status"] == "False"), None)


def goes_on(job: Any) -> None:
    """Checks that the same attempt runs once its pods do, and that nothing was charged for the wait."""
    job.run()
    assert job.status["restarts"] == {"user": 0, "infrastructure": 0}


def container_waits(job: Any, pod: Object, reason: str, message: str) -> None:
    """The kubelet says why it does not start the pod's container."""
    job.kubelet.bind(pod)
    path = f"/api/v1/namespaces/{job.namespace}/pods/{pod['metadata']['name']}/status"
    job.client.patch(path, {"status": pod_status.waiting(pod, reason, message)}, STRATEGIC_PATCH)


CONTAINER_WAITS = {
    "ErrImagePull": "ImagePullError",
    "ImagePullBackOff": "ImagePullError",
    "InvalidImageName": "ImagePullError",
    "ErrImageNeverPull": "ImagePullError",
    "CreateContainerConfigError": "ContainerConfigError",
    "CreateContainerError": "ContainerConfigError",
}


@pytest.mark.parametrize("why", CONTAINER_WAITS)
def test_a_container_that_cannot_start_is_named_with_the_kubelet_s_words(
    make_job: Callable[..., Any], why: str
) -> None:
    """A container that the kubelet cannot start is named with its pod, its node and the kubelet's words."""
    job = make_job()
    pods = job.pods(0)
    job.kubelet.bind(pods[0])
    container_waits(job, pods[1], why, 'secret "pull" not found')
    name = pods[1]["metadata"]["name"]
    waits(job, CONTAINER_WAITS[why], f'pod {name} on node played-node: secret "pull" not found')
    goes_on(job)


def test_a_volume_that_cannot_be_mounted_is_told_with_pod_and_node(make_job: Callable[..., Any]) -> None:
    """A volume that a node cannot mount shows in Events alone, and is told with pod and node."""
    job = make_job()
    pods = job.pods(0)
    for pod in pods:
        job.kubelet.missing_volume(pod, "workspace", "mount failed: exit status 32")
    waits(job, "VolumeNotReady", f"pod {pods[0]['metadata']['name']} on node", "mount failed: exit status 32")
    goes_on(job)


# --- claims


@pytest.fixture
def volume(api_cluster: Any, namespace: str) -> Iterator[None]:
    """A volume for the claim that jobs ask for."""
    body = {
        "metadata": {"name": f"work-{namespace}"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "1Gi"},
            "hostPath": {"path": "/nowhere"},
            "claimRef": {"name": "work", "namespace": namespace},
        },
    }
    api_cluster.client.post("/api/v1/persistentvolumes", body)
    yield
    api_cluster.client.delete(f"/api/v1/persistentvolumes/work-{namespace}")


def claim(job: Any) -> None:
    """Create the claim that the job asks for, of no class: no provisioner makes a volume for it."""
    body = {
        "metadata": {"name": "work"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    job.client.post(f"/api/v1/namespaces/{job.namespace}/persistentvolumeclaims", body)


def test_pods_wait_for_a_missing_claim_and_start_once_it_is_there(
    make_job: Callable[..., Any], volume: None
) -> None:
    """A claim that is missing is told in the scheduler's words, and the pods start once it is there."""
    job = make_job()
    waits(job, "VolumeNotReady", f"pod {job.pods(0)[0]['metadata']['name']}", '"work" not found')
    claim(job)
    job.until(lambda _: all(pod["spec"].get("nodeName") == "big" for pod in job.pods(0)))
    goes_on(job)


def test_pods_wait_for_a_claim_without_a_volume(make_job: Callable[..., Any]) -> None:
    """So is one for which nobody has made a volume."""
    job = make_job()
    claim(job)
    waits(job, "VolumeNotReady", "unbound immediate PersistentVolumeClaims")
    goes_on(job)


# --- what refuses pods


QUOTA = {
    "apiVersion": "v1",
    "kind": "ResourceQuota",
    "metadata": {"name": "limit"},
    "spec": {"hard": {"pods": "1"}},
}
LIMITS = {
    "apiVersion": "v1",
    "kind": "LimitRange",
    "metadata": {"name": "limit"},
    "spec": {"limits": [{"type": "Container", "max": {"memory": "512Mi"}}]},
}


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        ("resourcequotas", QUOTA, "exceeded quota: limit, requested: pods=1, used: pods=1, limited: pods=1"),
        ("limitranges", LIMITS, "maximum memory usage per Container is 512Mi"),
    ],
    ids=["ResourceQuota", "LimitRange"],
)
def test_pods_refused_by_a_quota_or_limit_are_told_and_made_later(
    make_job: Callable[..., Any], api_cluster: Any, namespace: str, kind: str, body: Object, said: str
) -> None:
    """Pods that the namespace's quota or limits refuse are told in their words; the job goes on without them."""
    path = f"/api/v1/namespaces/{namespace}/{kind}"
    api_cluster.client.post(path, body)
    job = make_job()
    waits(job, "QuotaExceeded", "the pods of job-a0 are refused", said)
    api_cluster.client.delete(f"{path}/limit")
    goes_on(job)


def test_an_attempt_whose_job_a_quota_refuses_starts_when_it_is_raised(
    make_job: Callable[..., Any], api_cluster: Any, namespace: str
) -> None:
    """A quota that refuses the attempt's Job itself is told, and the same attempt starts when it is raised."""
    path = f"/api/v1/namespaces/{namespace}/resourcequotas"
    api_cluster.client.post(path, {**QUOTA, "spec": {"hard": {"count/jobs.batch": "0"}}})
    wait_for(lambda: api_cluster.client.get(f"{path}/limit").get("status", {}).get("used"))
    job = make_job()
    waits(job, "QuotaExceeded", "exceeded quota: limit", kind="Initialized", phase="Pending")
    api_cluster.client.patch(f"{path}/limit", {"spec": {"hard": {"count/jobs.batch": "1"}}})
    goes_on(job)


def test_pods_refused_for_a_missing_priority_class_are_told(make_job: Callable[..., Any]) -> None:
    """Pods that are refused for another reason are told in the API server's words."""
    job = make_job(scheduling={"priorityClassName": "urgent"})
    waits(job, "Refused", "the pods of job-a0 are refused", "no PriorityClass with name urgent was found")


def test_pods_are_admitted_where_pod_security_enforces_restricted(
    make_job: Callable[..., Any], api_cluster: Any, namespace: str
) -> None:
    """Pods are admitted where Pod Security enforces restricted, which refuses a pod that asks for more."""
    labels = api_cluster.client.get(f"/api/v1/namespaces/{namespace}")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    job = make_job()
    [pod, _] = job.pods(0)
    spec = {key: value for key, value in pod["spec"].items() if key not in ("priority", "nodeName")}
    spec["securityContext"] = {**spec["securityContext"], "runAsNonRoot": False}
    copy = {"metadata": {"name": "copy"}, "spec": spec}
    with pytest.raises(ApiError, match='violates PodSecurity "restricted'):
        api_cluster.client.post(f"/api/v1/namespaces/{namespace}/pods?dryRun=All", copy)
