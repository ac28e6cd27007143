"""Each state that is played gives the outcome that the real Job controller documents."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from testcluster.cluster import Cluster
from testcluster.control_plane import ControlPlane
from testcluster.errors import ClusterError
from testcluster.fixtures import fresh_namespace
from testcluster.kubelet import EVICTION_API, KUBELET, TAINT_MANAGER, Kubelet
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

Object = dict[str, Any]
Play = Callable[[Kubelet, list[Object]], object]
PERMANENT, LOST_PEER, OTHER = 10, 40, 137
RULES = [
    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [PERMANENT]}},
    {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [LOST_PEER, 143]}},
]


def gang(name: str, pods: int = 2) -> Object:
    """An Indexed Job as the operator makes them: restricted, no retry, every cause named by a rule."""
    container = {
        "name": "c",
        "image": "example.org/trainer:1",
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    secure = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    pod = {"restartPolicy": "Never", "containers": [container], "securityContext": secure}
    return {
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": RULES},
            "template": {"spec": pod},
        },
    }


def create(cluster: Cluster, namespace: str, job: Object) -> str:
    """Create the Job; gives its path."""
    cluster.client.post(f"/apis/batch/v1/namespaces/{namespace}/jobs", job)
    return f"/apis/batch/v1/namespaces/{namespace}/jobs/{job['metadata']['name']}"


def true_conditions(job: Object) -> dict[str, Object]:
    """The Job's conditions that hold, by type."""
    conditions = job.get("status", {}).get("conditions", [])
    return {each["type"]: each for each in conditions if each["status"] == "True"}


ENDS: dict[str, tuple[Play, str, str, str]] = {
    "succeeded": (
        lambda k, pods: [k.succeeded(pod) for pod in pods],
        "Complete",
        "CompletionsReached",
        "Reached",
    ),
    "permanent-code": (
        lambda k, pods: k.failed(pods[1], PERMANENT, message="bad data"),
        "Failed",
        "PodFailurePolicy",
        "failed with exit code 10 matching FailJob rule at index 1",
    ),
    "out-of-memory": (
        lambda k, pods: k.failed(pods[0], OTHER, reason="OOMKilled"),
        "Failed",
        "PodFailurePolicy",
        "exit code 137 matching FailJob rule at index 2",
    ),
    "lost-peer": (
        lambda k, pods: k.failed(pods[0], LOST_PEER),
        "Failed",
        "BackoffLimitExceeded",
        "Job has reached the specified backoff limit",
    ),
    "node-lost": (
        lambda k, pods: k.disrupted(pods[0], TAINT_MANAGER),
        "Failed",
        "PodFailurePolicy",
        "has condition DisruptionTarget matching FailJob rule at index 0",
    ),
    "drained": (
        lambda k, pods: k.disrupted(pods[0], EVICTION_API, exit_code=50),
        "Failed",
        "PodFailurePolicy",
        "has condition DisruptionTarget matching FailJob rule at index 0",
    ),
    "node-shut-down": (
        lambda k, pods: k.disrupted(pods[0], KUBELET),
        "Failed",
        "PodFailurePolicy",
        "has condition DisruptionTarget matching FailJob rule at index 0",
    ),
    "evicted": (
        lambda k, pods: k.evicted(pods[0]),
        "Failed",
        "PodFailurePolicy",
        "has condition DisruptionTarget matching FailJob rule at index 0",
    ),
    "rejected": (
        lambda k, pods: k.rejected(pods[0]),
        "Failed",
        "BackoffLimitExceeded",
        "Job has reached the specified backoff limit",
    ),
}
"""What is played on a running gang; the Job's final condition, its reason, and a part of its message."""


@pytest.fixture(scope="module")
def played(control_plane: ControlPlane) -> Iterator[dict[str, Object]]:
    """The finished Job of each of ENDS: played side by side, since the Job controller waits a second in each."""
    with fresh_namespace(control_plane, "played") as namespace:
        kubelet = Kubelet(control_plane.client)

        def play(name: str) -> Object:
            path = create(control_plane, namespace, gang(name))
            pods = kubelet.pods(namespace, f"batch.kubernetes.io/job-name={name}", 2)
            if name != "rejected":  # such a pod never ran
                pods = [kubelet.running(pod) for pod in pods]
            ENDS[name][0](kubelet, pods)
            wait_for(lambda: true_conditions(control_plane.client.get(path)).keys() & {"Complete", "Failed"})
            return {"job": control_plane.client.get(path), "pods": [pod["metadata"]["name"] for pod in pods]}

        with kubelet.finish_terminations(namespace), ThreadPoolExecutor(len(ENDS)) as pool:
            yield dict(zip(ENDS, pool.map(play, ENDS), strict=True))


@pytest.mark.parametrize("name", ENDS)
def test_the_job_ends_as_documented(played: dict[str, Object], name: str) -> None:
    """The Job controller gives the end, reason and message that it documents for what the kubelet reported."""
    _, end, reason, message = ENDS[name]

    condition = true_conditions(played[name]["job"])[end]

    assert condition["reason"] == reason
    assert message in condition["message"]


def test_the_condition_names_the_pod(played: dict[str, Object]) -> None:
    """The message of PodFailurePolicy names the pod whose exit code matched."""
    job, pods = played["permanent-code"]["job"], played["permanent-code"]["pods"]

    message = true_conditions(job)["FailureTarget"]["message"]

    assert message.startswith(
        f"Container c for pod {job['metadata']['namespace']}/{pods[1]} failed with exit code 10"
    )


def test_running_pods_are_counted(api_cluster: Cluster, namespace: str, kubelet: Kubelet) -> None:
    """Running pods are active, and ready when they say so."""
    path = create(api_cluster, namespace, gang("g", pods=3))

    first, *others = kubelet.pods(namespace, "batch.kubernetes.io/job-name=g", 3)
    kubelet.running(first, ready=False)
    addresses = [kubelet.running(pod)["status"]["podIP"] for pod in others]

    assert len(set(addresses)) == 2
    assert wait_for(lambda: api_cluster.client.get(path)["status"].get("ready") == 2)
    assert api_cluster.client.get(path)["status"]["active"] == 3


def test_a_gang_is_ordered_by_completion_index(
    api_cluster: Cluster, namespace: str, kubelet: Kubelet
) -> None:
    """play gives the pods in the order of their completion index."""
    create(api_cluster, namespace, gang("g", pods=3))

    pods = kubelet.play(namespace, "batch.kubernetes.io/job-name=g", 3, kubelet.running)

    assert [pod["metadata"]["name"].rsplit("-", 1)[0] for pod in pods] == ["g-0", "g-1", "g-2"]


def test_too_few_pods_are_an_error(namespace: str, kubelet: Kubelet) -> None:
    """Waiting for pods that never come ends with a sentence that counts them."""
    with pytest.raises(ClusterError, match=r"0 pods match app=none in .* not 2"):
        kubelet.pods(namespace, "app=none", 2, seconds=0.1)


def test_a_termination_message_is_kept(api_cluster: Cluster, namespace: str, kubelet: Kubelet) -> None:
    """What a container wrote as its termination message is in the pod's status."""
    create(api_cluster, namespace, gang("g", pods=1))

    [pod] = kubelet.play(namespace, "batch.kubernetes.io/job-name=g", 1, kubelet.running)
    ended = kubelet.succeeded(pod, message="adapter stored")

    assert ended["status"]["containerStatuses"][0]["state"]["terminated"]["message"] == "adapter stored"


def test_a_pod_that_nobody_ends_holds_the_job(api_cluster: Cluster, namespace: str, kubelet: Kubelet) -> None:
    """While a pod of a failing Job is stuck in its termination, the Job has FailureTarget and never Failed."""
    path = create(api_cluster, namespace, gang("g"))
    first, second = kubelet.play(namespace, "batch.kubernetes.io/job-name=g", 2, kubelet.running)

    kubelet.failed(first, PERMANENT)
    wait_for(lambda: "deletionTimestamp" in api_cluster.client.get(pod_path(second))["metadata"])
    held = true_conditions(api_cluster.client.get(path))
    kubelet.finish_termination(second)
    wait_for(lambda: "Failed" in true_conditions(api_cluster.client.get(path)))

    assert "FailureTarget" in held
    assert "Failed" not in held


@pytest.mark.parametrize(
    ("play", "reason", "event"),
    [
        (
            lambda k, pod: k.unpullable(pod),
            "ImagePullBackOff",
            'Failed to pull image "example.org/trainer:1"',
        ),
        (lambda k, pod: k.missing_volume(pod, "run"), "ContainerCreating", 'SetUp failed for volume "run"'),
    ],
    ids=["unpullable", "missing-volume"],
)
def test_a_pod_that_cannot_start_waits(
    api_cluster: Cluster,
    namespace: str,
    kubelet: Kubelet,
    play: Callable[[Kubelet, Object], Object],
    reason: str,
    event: str,
) -> None:
    """The pod stays pending, its container's state says what it waits for, and an event says why."""
    path = create(api_cluster, namespace, gang("g", pods=1))

    [pod] = kubelet.pods(namespace, "batch.kubernetes.io/job-name=g", 1)
    waiting = play(kubelet, pod)
    events = api_cluster.client.items(f"/api/v1/namespaces/{namespace}/events")

    assert waiting["status"]["phase"] == "Pending"
    assert waiting["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == reason
    assert any(event in each["message"] and each["type"] == "Warning" for each in events)
    assert true_conditions(api_cluster.client.get(path)) == {}


def test_the_scheduler_uses_an_added_node(api_cluster: Cluster, namespace: str, kubelet: Kubelet) -> None:
    """A node that was added takes the pods that ask for its labels."""
    kubelet.add_node(f"node-{namespace}", labels={"only": namespace}, cpu="2")
    job = gang("g", pods=1)
    job["spec"]["template"]["spec"]["nodeSelector"] = {"only": namespace}
    create(api_cluster, namespace, job)

    [pod] = kubelet.pods(namespace, "batch.kubernetes.io/job-name=g", 1)
    placed = wait_for(lambda: api_cluster.client.get(pod_path(pod))["spec"].get("nodeName"))

    assert placed == f"node-{namespace}"


def pod_path(pod: Object) -> str:
    """Where the pod is in the API."""
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
