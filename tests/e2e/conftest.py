"""The operator in a pod, on two real nodes, and jobs that really train."""

import contextlib
import copy
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from testcluster.chart import SYSTEM, Releases
from testcluster.cluster import Cluster
from testcluster.errors import KubectlError
from testcluster.nodes import NodeCluster
from testcluster.waiting import wait_for

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
USER = 1000
"""Of the pods, and thus of the files in their volumes."""

Object = dict[str, Any]


@pytest.fixture(scope="session")
def operator(node_cluster: Cluster, values: Object, settle: Callable[[], None]) -> Iterator[Cluster]:
    """The cluster, with the operator installed by its chart."""
    kubectl = node_cluster.kubectl
    kubectl("create", "namespace", SYSTEM)
    kubectl("label", "namespace", SYSTEM, "pod-security.kubernetes.io/enforce=restricted")
    # On a cluster that exists, other tests may have put the definition there.
    Releases(node_cluster, SYSTEM).install(values, "--take-ownership", "--force-conflicts")
    settle()
    yield node_cluster
    with contextlib.suppress(KubectlError):  # tests that end the cluster come last
        print(kubectl("-n", SYSTEM, "logs", "deployment/qlora-operator", "--tail=200"))


@pytest.fixture(scope="session")
def settle(node_cluster: Cluster) -> Callable[[], None]:
    """settle() waits until the operator's newest pod is ready."""
    kubectl = node_cluster.kubectl

    def wait() -> None:
        try:
            kubectl("-n", SYSTEM, "rollout", "status", "deployment/qlora-operator", "--timeout=120s")
        except KubectlError:
            print(kubectl("-n", SYSTEM, "describe", "pods"))
            print(kubectl("-n", SYSTEM, "logs", "deployment/qlora-operator", "--tail=50"))
            raise

    return wait


@pytest.fixture(scope="session")
def values(node_cluster: Cluster) -> Object:
    """Of the chart: the test's images, and no CPU of the two there are."""
    operator, trainer = (
        dict(zip(("repository", "tag"), node_cluster.image(name).rsplit(":", 1), strict=True))
        for name in ("operator", "trainer")
    )
    return {
        "image": operator,
        "jobs": {"image": trainer},
        "resources": {"requests": {"cpu": None}},
    }


class Job:
    """A QLoRAJob that trains in the test's namespace."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self.cluster, self.namespace, self.name = cluster, namespace, name

    @property
    def status(self) -> Object:
        """Its status."""
        path = f"/apis/qlora.dev/v1alpha1/namespaces/{self.namespace}/qlorajobs/{self.name}"
        return self.cluster.client.get(path).get("status") or {}

    def until(self, check: Callable[[Object], Any], seconds: float = 180) -> Object:
        """The status, once it is so."""

        def look() -> Object | None:
            status = self.status
            if status.get("phase") == "Failed" and not check(status):
                pytest.fail(f"the job failed: {status['message']}\n{self.logs()}")
            return status if check(status) else None

        return wait_for(
            look, seconds, or_else=lambda: f"{json.dumps(self.status, indent=1)}\n{self.logs()}", every=0.2
        )

    def until_phase(self, phase: str, seconds: float = 300) -> Object:
        """The status, once the phase is this."""
        return self.until(lambda status: status.get("phase") == phase, seconds)

    def until_step(self, step: int) -> Object:
        """The status, once a step is done in the current attempt."""
        return self.until(lambda status: (status.get("progress") or {}).get("step", 0) >= step)

    def patch(self, spec: Object) -> None:
        """Change spec."""
        self.cluster.kubectl(
            "-n", self.namespace, "patch", "qlj", self.name, "--type=merge", "-p", json.dumps({"spec": spec})
        )

    def pods(self) -> list[Object]:
        """Its pods of the current attempt, by index."""
        selector = f"qlora.dev/job-name={self.name},qlora.dev/attempt={self.status.get('attempt', 0)}"
        path = f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={selector}"
        index = "batch.kubernetes.io/job-completion-index"
        return sorted(self.cluster.client.items(path), key=lambda pod: pod["metadata"]["labels"][index])

    def logs(self) -> str:
        """The last lines of its pods."""
        try:
            return self.cluster.kubectl(
                "-n", self.namespace, "logs", f"-lqlora.dev/job-name={self.name}", "--tail=30", "--prefix"
            )
        except KubectlError as error:
            return str(error)

    def kill_container(self, index: int) -> None:
        """SIGKILL to a pod's first process."""
        uid = self.pods()[index]["metadata"]["uid"]
        pids = [
            int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _is_of(path, uid)
        ]
        launchers = [pid for pid in pids if b"qlora_trainer.launch" in _command(pid)]
        assert launchers, f"no launcher of pod {uid} runs"
        os.kill(min(launchers), signal.SIGKILL)


def _is_of(process: Path, uid: str) -> bool:
    try:
        return f"pod{uid}" in (process / "cgroup").read_text()
    except OSError:
        return False


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def volume(operator: Cluster, node_namespace: str) -> Path:
    """The folder of the claim `demo`, which pods of both nodes share."""
    if not isinstance(operator, NodeCluster):
        pytest.skip("a cluster that exists has no volume whose files this test could write and read")
    return operator.shared_volume(node_namespace, "demo")


@pytest.fixture
def attach(operator: Cluster, node_namespace: str) -> Callable[[str, Path], Job]:
    """attach(name, volume) -> the job of that name, which may use everything in the volume."""

    def make(name: str, volume: Path) -> Job:
        give(volume)
        return Job(operator, node_namespace, name)

    return make


def give(folder: Path) -> None:
    """Everything in the folder is the pods'."""
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, USER, USER)


@pytest.fixture
def small_job(
    operator: Cluster,
    node_namespace: str,
    volume: Path,
    small_model: Callable[..., Path],
    demo_data: Path,
) -> Callable[..., Job]:
    """make(name, **spec) -> a job of two pods on a tiny model whose steps are quick, created."""
    shutil.copytree(small_model("llama"), volume / "model")
    (volume / "data").mkdir()
    lines = (demo_data / "train.jsonl").read_text().splitlines(keepends=True)
    (volume / "data" / "train.jsonl").write_text("".join(lines[:300]))
    (volume / "data" / "eval.jsonl").write_text("".join(lines[300:320]))
    give(volume)
    sample = yaml.safe_load((MANIFESTS / "samples" / "two-nodes.yaml").read_text())

    def make(name: str, **spec: Any) -> Job:
        body = copy.deepcopy(sample)
        body["metadata"]["name"] = name
        body["spec"]["training"] |= {"maxSteps": 300, "computeDtype": "fp32", "learningRate": 1e-3}
        body["spec"]["checkpoint"] = {"everySteps": 10, "keep": 3}
        body["spec"]["distributed"] = {"timeoutSeconds": 10}
        body["spec"]["terminationGracePeriodSeconds"] = 20
        for key, value in spec.items():
            merged = {**body["spec"].get(key, {}), **value} if isinstance(value, dict) else value
            body["spec"][key] = merged
        operator.kubectl("-n", node_namespace, "apply", "-f", "-", input=yaml.safe_dump(body))
        return Job(operator, node_namespace, name)

    return make
