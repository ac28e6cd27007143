"""The quotas that docs/quotas.md shows, on a real API server: they hold, and jobs say so."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from testcluster.client import ApiError
from testcluster.cluster import Cluster
from testcluster.errors import ClusterError
from testcluster.kubelet import Kubelet
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

DOCUMENT = Path(__file__).parents[2] / "docs" / "quotas.md"
SUMS, CLASSES = (
    yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
)
AVX512 = {f"feature.node.kubernetes.io/cpu-cpuid.{flag}": "true" for flag in ("AVX512F", "AVX2")}
JOBS_COUNTED = "count/qlorajobs.qlora.dev"
KNOWN_SECONDS = 60.0
"""The controller manager looks every 30 s which kinds there are to be counted; a quota that was made before that does
not count a new one for minutes."""


@pytest.fixture
def enforce(
    api_cluster: Cluster, namespace: str, make_job: Callable[..., Any]
) -> Callable[[dict[str, Any]], None]:
    """enforce(quota) -> it holds in the namespace."""

    path = f"/api/v1/namespaces/{namespace}/resourcequotas"

    def used(quota: dict[str, Any]) -> dict[str, str]:
        return api_cluster.client.get(f"{path}/{quota['metadata']['name']}").get("status", {}).get("used", {})

    def counts(quota: dict[str, Any]) -> bool:
        """Whether the quota, made anew, counts all that it should."""
        one = f"{path}/{quota['metadata']['name']}"
        with contextlib.suppress(ApiError):
            api_cluster.client.delete(one)
        api_cluster.client.post(path, quota)
        try:
            hard = set(quota["spec"]["hard"])
            wait_for(lambda: set(used(quota)) == hard, 5)
        except ClusterError:
            return False
        return True

    def counts_a_job(quota: dict[str, Any]) -> bool:
        """Whether a job is counted as it is created, and not any more when it is gone. Admission learns of a quota a
        little later than who asks for it, and the controller may be about to calculate it once more."""
        probe = make_job("probe", suspend=True)
        counted = used(quota)[JOBS_COUNTED] == "1"
        probe.delete()
        wait_for(lambda: used(quota)[JOBS_COUNTED] == "0", or_else="the end of the job that was counted")
        return counted

    def make(quota: dict[str, Any]) -> None:
        wait_for(lambda: counts(quota), KNOWN_SECONDS, or_else="the quota's numbers")
        if JOBS_COUNTED in quota["spec"]["hard"]:
            wait_for(lambda: counts_a_job(quota), or_else="a job that is counted")

    return make


@pytest.fixture
def huge_node(kubelet: Kubelet) -> None:
    """A node with more than the quota."""
    kubelet.add_node("huge", labels=AVX512, cpu="128", memory="1Ti")


def test_one_job_more_than_the_quota_is_refused(
    crd: None, enforce: Callable[..., None], make_job: Callable[..., Any]
) -> None:
    """One job more than the quota has is refused when it is created; a deleted one makes room."""
    enforce(SUMS)
    most = int(SUMS["spec"]["hard"][JOBS_COUNTED])
    jobs = [make_job(f"job-{number}", suspend=True) for number in range(most)]

    with pytest.raises(
        ApiError, match=r"exceeded quota: fine-tuning, requested: count/qlorajobs\.qlora\.dev=1"
    ):
        make_job("one-more", suspend=True)
    jobs[0].delete()
    wait_for(lambda: accepted(make_job), 20, or_else="room for another job")


def accepted(make_job: Callable[..., Any]) -> bool:
    """Whether another job is taken now."""
    try:
        make_job("another", suspend=True)
    except ApiError as error:
        if "exceeded quota" in error.message:
            return False
        raise
    return True


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        (
            {"pods": 2, "cpusPerRank": 40, "memoryPerRank": "1Gi"},
            "requested: requests.cpu=40, used: requests.cpu=40, limited: requests.cpu=64",
        ),
        (
            {"pods": 2, "cpusPerRank": 1, "memoryPerRank": "300Gi"},
            "limited: limits.memory=512Gi,requests.memory=512Gi",
        ),
    ],
    ids=["CPUs", "memory"],
)
def test_a_job_whose_pods_exceed_the_quota_waits_with_its_words(
    operator: Any,
    huge_node: None,
    enforce: Callable[..., None],
    make_job: Callable[..., Any],
    topology: dict[str, Any],
    said: str,
) -> None:
    """A job whose pods do not fit any more waits, with the quota's own words, and ends when it may wait no longer."""
    enforce(SUMS)
    job = make_job(topology=topology, pendingDeadlineSeconds=5)
    job.until(lambda status: reason(status, "Running") == "QuotaExceeded" and said in status["message"])
    job.until(lambda status: reason(status, "Failed") == "PendingDeadlineExceeded")


def test_pods_of_a_class_that_the_quota_keeps_out_are_refused(
    operator: Any,
    api_cluster: Cluster,
    namespace: str,
    enforce: Callable[..., None],
    make_job: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> None:
    """Pods of a class that the quota keeps out are refused, and the job says so; others are not."""
    path = "/apis/scheduling.k8s.io/v1/priorityclasses"
    api_cluster.client.post(path, {"metadata": {"name": "urgent"}, "value": 1000})
    request.addfinalizer(lambda: api_cluster.client.delete(f"{path}/urgent"))
    enforce(CLASSES)
    wait_for(lambda: refused(api_cluster, namespace, "urgent"), or_else="the quota's refusal")
    urgent = make_job("urgent", scheduling={"priorityClassName": "urgent"})

    make_job("patient").pods(0)
    urgent.until(lambda status: "exceeded quota: nothing-is-urgent" in status.get("message", ""))


def refused(cluster: Cluster, namespace: str, priority_class: str) -> bool:
    """Whether a pod of the class would be refused for the quota."""
    limits = {"cpu": "1", "memory": "1Gi"}
    restricted = {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {
        "name": "probe",
        "image": "probe",
        "resources": {"requests": limits, "limits": limits},
        "securityContext": restricted,
    }
    pod = {
        "metadata": {"name": "probe"},
        "spec": {"priorityClassName": priority_class, "containers": [container]},
    }
    try:
        cluster.client.post(f"/api/v1/namespaces/{namespace}/pods?dryRun=All", pod)
    except ApiError as error:
        return "exceeded quota" in error.message
    return False


def reason(status: dict[str, Any], condition: str) -> str | None:
    """The reason of a condition."""
    found = [each["reason"] for each in status.get("conditions", []) if each["type"] == condition]
    return found[0] if found else None
