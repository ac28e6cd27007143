"""The operator as a process of its own against a real API server, with its own service account's permissions."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import ON_ONE_CLAIM, job_manifest, merged
from testcluster.chart import RELEASE, SYSTEM, install_rbac
from testcluster.client import Client
from testcluster.cluster import Cluster
from testcluster.control_plane import ControlPlane
from testcluster.errors import KubectlError
from testcluster.faulty import FaultyProxy
from testcluster.kubelet import Kubelet
from testcluster.processes import with_parent
from testcluster.waiting import wait_for
from testcluster.witness import Witness

IMAGE = "registry.example/qlora-trainer:1"
JOBS = "/apis/qlora.dev/v1alpha1"
CHILDREN = (
    ("/apis/batch/v1", "jobs"),
    ("/api/v1", "pods"),
    ("/api/v1", "services"),
    ("/apis/networking.k8s.io/v1", "networkpolicies"),
)

Object = dict[str, Any]

EVERY = 0.05
"""Seconds between two looks at what is waited for."""

AMX_NODE = {
    "feature.node.kubernetes.io/cpu-cpuid.AMXTILE": "true",
    "feature.node.kubernetes.io/cpu-cpuid.AMXBF16": "true",
}
AVX512_NODE = {f"feature.node.kubernetes.io/cpu-cpuid.{flag}": "true" for flag in ("AVX512F", "AVX2")}


@pytest.fixture(scope="session")
def told_cluster(api_cluster: Cluster, crd: None) -> Cluster:
    """A cluster whose kubectl knows jobs: an API server tells of a new kind a moment after it serves it."""

    def known() -> bool:
        try:
            return bool(api_cluster.kubectl("explain", "qlorajobs"))
        except KubectlError:
            return False

    wait_for(known, 20, every=EVERY)
    return api_cluster


@pytest.fixture(scope="session")
def account(api_cluster: Cluster, crd: None) -> Path:
    """A kubeconfig with the operator's own permissions."""
    install_rbac(api_cluster)
    return api_cluster.kubeconfig_for(RELEASE, SYSTEM)


class Operator:
    """One operator's process."""

    def __init__(
        self, folder: Path, kubeconfig: Path, *arguments: str, image: str = IMAGE, **settings: Any
    ) -> None:
        self.folder, self.kubeconfig, self.arguments = folder, kubeconfig, arguments
        self.settings = folder / "settings.yaml"
        known = {"trainerImage": image, "allowedImages": ["registry.example/*"], **settings}
        self.settings.write_text(yaml.safe_dump(known))
        self.log = folder / "operator.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self, *, wait: bool = True) -> None:
        """Begin, and be ready."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "qlora_operator", "--config", str(self.settings)]
        command += ["--port", str(self.port), *self.arguments]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                # Other threads that start one, such as a proxy's, may end before the test does.
                with_parent(command) if threading.current_thread() is threading.main_thread() else command,
                env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if wait:
            self.ready()

    def ready(self, seconds: float = 30) -> None:
        """Wait for its readiness."""
        wait_for(
            lambda: self.get("/readyz")[0] == 200,
            seconds,
            or_else=lambda: self.log.read_text()[-3000:],
            every=EVERY,
        )

    def get(self, path: str) -> tuple[int, str]:
        """GET from its own server: status (0: no answer) and text."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def kill(self, number: int = signal.SIGKILL) -> int:
        """End it with a signal; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def close(self) -> None:
        """End it if it lives."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)


@pytest.fixture
def new_operator(
    account: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Operator]]:
    """make(*arguments) -> an operator, not started; ended with the test."""
    made: list[Operator] = []

    def make(*arguments: str, **options: Any) -> Operator:
        made.append(Operator(tmp_path_factory.mktemp("operator"), account, *arguments, **options))
        return made[-1]

    yield make
    for operator in made:
        operator.close()


@pytest.fixture
def operator(new_operator: Callable[..., Operator], namespace: str) -> Operator:
    """A running operator for the test's namespace alone."""
    made = new_operator("--namespace", namespace)
    made.start()
    return made


@pytest.fixture
def proxy(control_plane: ControlPlane) -> Iterator[FaultyProxy]:
    """Between an operator and the API server, for those who are given its kubeconfig."""
    with FaultyProxy(control_plane) as made:
        yield made


@pytest.fixture
def witness(control_plane: ControlPlane, namespace: str) -> Witness:
    """Of the namespace's pods."""
    return Witness(control_plane.client, namespace)


@pytest.fixture
def terminations(kubelet: Kubelet, namespace: str) -> Iterator[None]:
    """The namespace's pods that are deleted end, as a kubelet sees to."""
    with kubelet.finish_terminations(namespace):
        yield


@pytest.fixture(scope="module")
def shared_operator(account: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """A running operator for every namespace, for all tests of a module: who ends it starts it again."""
    made = Operator(tmp_path_factory.mktemp("operator"), account)
    made.start()
    yield made
    made.close()


REMOTE: Object = {
    "model": {"source": "hf://org/model", "revision": "v1", "credentialsSecret": "hub"},
    "dataset": {"source": "s3://bucket/docs.jsonl", "credentialsSecret": "store"},
    "output": {"destination": "s3://bucket/adapters", "credentialsSecret": "writer"},
}
FETCHED = {"model": "c0ffee" * 6 + "c0ff", "dataset": "d0" * 32}
STAGES: dict[str, tuple[int, str, Object]] = {
    "fetch": (1, "Fetching", {"fetched": FETCHED}),
    "train": (
        2,
        "Running",
        {"adapterUri": "pvc://work/here/jobs/job/adapter", "baseEvalLoss": 3.0, "evalLoss": 2.0},
    ),
    "export": (1, "Publishing", {}),
    "publish": (1, "Publishing", {"publishedUri": "s3://bucket/adapters/job"}),
}
"""Stage -> its pods, the phase in which it runs, and what its pods report at the end."""


def report(code: int = 0, cause: str = "done", **values: Any) -> str:
    """A termination message of the trainer's."""
    return json.dumps({"version": 1, "exitCode": code, "reason": "X", "cause": cause, **values})


class Job:
    """A QLoRAJob in the test's namespace, and its pods, which the test plays."""

    def __init__(self, client: Client, kubelet: Kubelet, namespace: str, name: str) -> None:
        self.client, self.kubelet, self.namespace, self.name = client, kubelet, namespace, name

    @property
    def path(self) -> str:
        """Of the object."""
        return f"{JOBS}/namespaces/{self.namespace}/qlorajobs/{self.name}"

    def get(self) -> Object:
        """The object."""
        return self.client.get(self.path)

    @property
    def status(self) -> Object:
        """Its status."""
        return self.get().get("status") or {}

    def condition(self, kind: str) -> Object:
        """A condition; empty when it was never said."""
        found = [c for c in self.status.get("conditions", []) if c["type"] == kind]
        return found[0] if found else {}

    def until(self, check: Callable[[Object], Any], seconds: float = 20) -> Object:
        """The status, once it is so."""
        return wait_for(
            lambda: (lambda status: check(status) and status)(self.status),
            seconds,
            or_else=lambda: str(self.status),
            every=EVERY,
        )

    def until_phase(self, phase: str, seconds: float = 20) -> Object:
        """The status, once the phase is this."""
        return self.until(lambda status: status.get("phase") == phase, seconds)

    def patch(self, spec: Object) -> Object:
        """Change spec."""
        return self.client.patch(self.path, {"spec": spec})

    def delete(self, policy: str = "Background") -> None:
        """Delete it."""
        self.client.delete(self.path, {"propagationPolicy": policy})

    def pods(self, attempt: int | None = None, count: int = 2) -> list[Object]:
        """The pods of an attempt, by index, once they are there."""
        number = self.status.get("attempt", 0) if attempt is None else attempt
        selector = f"qlora.dev/job-name={self.name},qlora.dev/attempt={number}"
        found = self.kubelet.pods(self.namespace, selector, count)
        return sorted(
            found, key=lambda pod: int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])
        )

    def gangs(self) -> list[Object]:
        """Its batch/v1 Jobs."""
        return self.client.items(
            f"/apis/batch/v1/namespaces/{self.namespace}/jobs?labelSelector=qlora.dev/job-name={self.name}"
        )

    def run(self, attempt: int = 0, count: int = 2) -> list[Object]:
        """Its attempt runs: every pod is up."""
        pods = [self.kubelet.running(pod) for pod in self.pods(attempt, count)]
        self.until(lambda status: status.get("phase") == "Running" and status.get("attempt") == attempt)
        return pods

    def begins(self, attempt: int, stage: str) -> list[Object]:
        """The pods of an attempt that has just begun, and goes through this stage."""
        self.until(lambda status: status.get("attempt") == attempt)
        pods = self.pods(attempt, STAGES[stage][0])
        assert self.status["attempts"][-1]["stage"] == stage
        return list(pods)

    def goes(self, attempt: int, stage: str) -> list[Object]:
        """The pods of an attempt in this stage, which runs."""
        pods = [self.kubelet.running(pod) for pod in self.begins(attempt, stage)]
        self.until(lambda status: (status["phase"], status["attempt"]) == (STAGES[stage][1], attempt))
        return pods

    def done(self, pods: list[Object], stage: str) -> None:
        """The pods of a stage end well, and report what they did."""
        for pod in pods:
            self.kubelet.succeeded(pod, message=report(**STAGES[stage][2]))

    def refuses(self, pod: Object, code: int, cause: str) -> None:
        """A transfer's pod ends with this code, for this cause."""
        self.kubelet.failed(pod, code, message=report(code, cause))

    def succeed(self, pods: list[Object], seconds: float = 20) -> Object:
        """Its ranks are done, and it is; its status."""
        for pod in pods:
            self.kubelet.succeeded(pod)
        return self.until_phase("Succeeded", seconds)

    def children(self, *plurals: str) -> list[str]:
        """All that is there of the job's, such as `jobs/job-a0`; or only of these plurals."""
        found = []
        for prefix, plural in CHILDREN:
            path = f"{prefix}/namespaces/{self.namespace}/{plural}"
            if not plurals or plural in plurals:
                items = self.client.items(f"{path}?labelSelector=qlora.dev/job-name={self.name}")
                found += [f"{plural}/{item['metadata']['name']}" for item in items]
        return found

    def until_gang(self, attempt: int, check: Callable[[Object], Any], seconds: float = 20) -> Object:
        """The batch/v1 Job of an attempt, once it is so."""

        def look() -> Object | None:
            found = [g for g in self.gangs() if g["metadata"]["labels"]["qlora.dev/attempt"] == str(attempt)]
            return found[0] if found and check(found[0]) else None

        return wait_for(
            look, seconds, or_else=lambda: str([gang["status"] for gang in self.gangs()]), every=EVERY
        )

    def until_event(self, reason: str, seconds: float = 20) -> Object:
        """The operator's Event with this reason, once it is there."""
        return wait_for(
            lambda: [event for event in self.events() if event["reason"] == reason],
            seconds,
            or_else=lambda: str([(event["reason"], event["message"]) for event in self.events()]),
            every=EVERY,
        )[0]

    def events(self) -> list[Object]:
        """The operator's Events about it."""
        found = self.client.items(f"/api/v1/namespaces/{self.namespace}/events")
        about = {"kind": "QLoRAJob", "name": self.name}
        return [event for event in found if about.items() <= event["involvedObject"].items()]


@pytest.fixture
def make_job(api_cluster: Cluster, kubelet: Kubelet, crd: None, namespace: str) -> Callable[..., Job]:
    """make(name="job", **spec) -> a job of two pods, created."""

    def make(name: str = "job", **spec: Any) -> Job:
        body = job_manifest(name, **merged({**ON_ONE_CLAIM, "topology": {"pods": 2}}, spec))
        api_cluster.client.post(f"{JOBS}/namespaces/{namespace}/qlorajobs", body)
        return Job(api_cluster.client, kubelet, namespace, name)

    return make


@pytest.fixture
def make_remote_job(make_job: Callable[..., Job]) -> Callable[..., Job]:
    """make(**spec) -> a job with remote sources and a remote destination, created."""
    return lambda **spec: make_job(**{**REMOTE, **spec})


@pytest.fixture
def claim(api_cluster: Cluster, namespace: str) -> Iterator[None]:
    """The jobs' claim, bound: without it the scheduler places nothing."""
    client = api_cluster.client
    volume = {
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "",
        "hostPath": {"path": "/nowhere"},
    }
    of = {"namespace": namespace, "name": "work"}
    asked = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": namespace}
    asked["resources"] = {"requests": {"storage": "1Gi"}}
    path = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
    client.post(
        "/api/v1/persistentvolumes", {"metadata": {"name": namespace}, "spec": {**volume, "claimRef": of}}
    )
    client.post(path, {"metadata": {"name": "work"}, "spec": asked})
    wait_for(lambda: client.get(f"{path}/work")["status"].get("phase") == "Bound")
    yield
    _empty(client, namespace)
    client.delete(f"/api/v1/persistentvolumes/{namespace}")


def _empty(client: Client, namespace: str) -> None:
    """Free the nodes for the next test: no job, and no pod that nobody would end."""
    at_once, pods = {"gracePeriodSeconds": 0}, f"/api/v1/namespaces/{namespace}/pods"
    client.delete(f"/apis/qlora.dev/v1alpha1/namespaces/{namespace}/qlorajobs")
    client.delete(f"/apis/batch/v1/namespaces/{namespace}/jobs", {"propagationPolicy": "Background"})
    wait_for(lambda: client.delete(pods, at_once) and not client.items(pods))


@pytest.fixture
def fill(api_cluster: Cluster, namespace: str) -> Callable[[str], Callable[[], None]]:
    """fill(node) takes all of a node's CPUs; what it gives frees them."""

    def make(node: str) -> Callable[[], None]:
        container = {
            "name": "filler",
            "image": "registry.example/filler:1",
            "resources": {"requests": {"cpu": "1"}},
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
        security = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
        spec = {"nodeName": node, "containers": [container], "securityContext": security}
        path = f"/api/v1/namespaces/{namespace}/pods"
        api_cluster.client.post(path, {"metadata": {"name": f"filler-{node}"}, "spec": spec})
        return lambda: api_cluster.client.delete(f"{path}/filler-{node}", {"gracePeriodSeconds": 0}) and None

    return make


@pytest.fixture(scope="session", autouse=True)
def node(api_cluster: Cluster) -> None:
    """One big node with AVX-512, played."""
    Kubelet(api_cluster.client).add_node("big", labels=AVX512_NODE)
