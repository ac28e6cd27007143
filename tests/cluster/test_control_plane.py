"""A control plane is real, starts beside others, and leaves nothing behind."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from testcluster import control_plane as control_plane_module
from testcluster import kubeconfig
from testcluster.client import ApiError, Client
from testcluster.cluster import Cluster
from testcluster.control_plane import ControlPlane, down
from testcluster.errors import ClusterError, KubectlError
from testcluster.processes import recorded

pytestmark = pytest.mark.cluster

PROGRAMS = {"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"}
MEMORY_LIMIT = 1.5e9
"""Bytes, all programs together; shared pages count in proportion."""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A second control plane, without audit log, which tests may disturb."""
    cluster = ControlPlane.start(tmp_path_factory.mktemp("other") / "cluster")
    yield cluster
    cluster.stop()
    down(cluster.folder)


def using(folder: Path) -> list[int]:
    """The processes whose command line names the folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in argument for argument in process.info["cmdline"] or []):
            found.append(process.pid)
    return found


def test_two_run_side_by_side(control_plane: ControlPlane, other: ControlPlane, namespace: str) -> None:
    """Two clusters have different ports and do not see each other's objects."""
    assert control_plane.server != other.server
    with pytest.raises(ApiError, match="not found"):
        other.client.get(f"/api/v1/namespaces/{namespace}")


def test_the_kubeconfig_verifies_the_server(
    control_plane: ControlPlane, other: ControlPlane, tmp_path: Path
) -> None:
    """A server whose certificate another authority signed is refused."""
    config = json.loads(control_plane.kubeconfig.read_text())
    strange = json.loads(other.kubeconfig.read_text())["clusters"][0]["cluster"]["certificate-authority-data"]
    config["clusters"][0]["cluster"]["certificate-authority-data"] = strange

    client = Client(kubeconfig.write(tmp_path / "config", config))

    with pytest.raises(ApiError, match="certificate verify failed"):
        client.get("/api/v1/namespaces")


def test_an_unknown_user_is_refused(control_plane: ControlPlane, tmp_path: Path) -> None:
    """Without a token or certificate of this cluster, nothing can be read."""
    reached = json.loads(control_plane.kubeconfig.read_text())["clusters"][0]["cluster"]

    client = Client(kubeconfig.write(tmp_path / "config", kubeconfig.with_token(reached, "made-up")))

    with pytest.raises(ApiError, match="401 Unauthorized"):
        client.get("/api/v1/namespaces")


def test_a_fresh_service_account_may_nothing(api_cluster: Cluster, namespace: str) -> None:
    """RBAC denies a service account what nobody granted, and allows it what a role grants."""
    api_cluster.kubectl("create", "serviceaccount", "someone", "-n", namespace)
    config = api_cluster.kubeconfig_for("someone", namespace)
    listing = ("get", "configmaps", "-n", namespace)

    with pytest.raises(KubectlError, match=f"{namespace}:someone.* cannot list resource"):
        api_cluster.kubectl(*listing, kubeconfig=config)
    api_cluster.kubectl("create", "role", "reader", "--verb=list", "--resource=configmaps", "-n", namespace)
    who = f"--serviceaccount={namespace}:someone"
    api_cluster.kubectl("create", "rolebinding", "reader", "--role=reader", who, "-n", namespace)

    assert "kube-root-ca.crt" in api_cluster.kubectl(*listing, kubeconfig=config)


def test_pod_security_is_enforced(api_cluster: Cluster, namespace: str) -> None:
    """A test's namespace refuses a pod that is not restricted."""
    with pytest.raises(KubectlError, match='violates PodSecurity "restricted:latest"'):
        api_cluster.kubectl("run", "p", "--image=example.org/p:1", "-n", namespace)


def test_the_audit_log_names_requests(control_plane: ControlPlane, namespace: str) -> None:
    """Each line of the audit log is a request: who asked for what."""
    control_plane.client.get(f"/api/v1/namespaces/{namespace}/configmaps")

    events = [json.loads(line) for line in control_plane.audit_log.read_text().splitlines()]
    asked = [each for each in events if each["requestURI"] == f"/api/v1/namespaces/{namespace}/configmaps"]

    assert ("admin", "list") in {(each["user"]["username"], each["verb"]) for each in asked}


def test_no_audit_log_unless_asked_for(other: ControlPlane) -> None:
    """Without audit=True there is no file."""
    assert not other.audit_log.exists()


def test_memory_is_bounded(control_plane: ControlPlane) -> None:
    """All programs together stay below the limit."""
    used = {name: psutil.Process(pid).memory_full_info().pss for name, pid in control_plane.processes.items()}

    assert used.keys() >= PROGRAMS
    assert sum(used.values()) < MEMORY_LIMIT, used


def test_objects_survive_a_restart_of_the_api_server(other: ControlPlane) -> None:
    """restart_apiserver gives another process with the same address and objects."""
    before = other.processes["kube-apiserver"]
    other.kubectl("create", "configmap", "kept")

    other.restart_apiserver()

    assert other.processes["kube-apiserver"] != before
    assert other.kubectl("get", "configmap", "kept", "-o", "name") == "configmap/kept\n"


def test_a_paused_api_server_does_not_answer(other: ControlPlane) -> None:
    """pause makes requests hang until resume."""
    other.pause("kube-apiserver")
    try:
        with pytest.raises(KubectlError, match=r"(?i)timeout|deadline"):
            other.kubectl("get", "namespaces", "--request-timeout=1s")
    finally:
        other.resume("kube-apiserver")

    assert "default" in other.kubectl("get", "namespaces")


def test_an_ended_api_server_refuses(other: ControlPlane) -> None:
    """end makes connections be refused until begin."""
    other.end("kube-apiserver")
    with pytest.raises(KubectlError, match="refused"):
        other.kubectl("get", "namespaces")

    other.begin("kube-apiserver")

    assert "default" in other.kubectl("get", "namespaces")


def test_down_leaves_nothing(tmp_path: Path) -> None:
    """After down there is no process and no folder."""
    cluster = ControlPlane.start(tmp_path / "cluster")
    started = using(cluster.folder)

    cluster.stop()
    down(cluster.folder)

    assert len(started) == len(PROGRAMS)
    assert using(tmp_path) == []
    assert not cluster.folder.exists()


def test_the_next_start_cleans_up_after_a_killed_one(tmp_path: Path) -> None:
    """A detached cluster outlives its killed starter; a start in its folder replaces it."""
    folder = tmp_path / "cluster"
    code = (
        "import sys, pathlib, time; from testcluster.control_plane import ControlPlane; "
        "ControlPlane.start(pathlib.Path(sys.argv[1]), detached=True); print(flush=True); time.sleep(300)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        parent.kill()
    first = recorded(folder)

    cluster = ControlPlane.start(folder)
    second = cluster.processes
    running = using(folder)
    cluster.stop()

    assert first.keys() == second.keys() == PROGRAMS
    assert set(running) == set(second.values())


def test_a_port_that_was_taken_meanwhile_is_not_insisted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When another process takes a free port before it is used, the start goes on with others."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        choices = [dict.fromkeys(("etcd", "etcd-peer", "apiserver"), taken.getsockname()[1])]
        free_ports = control_plane_module.free_ports
        monkeypatch.setattr(
            control_plane_module,
            "free_ports",
            lambda address: choices.pop() if choices else free_ports(address),
        )

        cluster = ControlPlane.start(tmp_path / "cluster")
        answer = cluster.kubectl("get", "namespace", "default", "-o", "name")
        running = using(cluster.folder)
        cluster.stop()

    assert choices == []
    assert answer == "namespace/default\n"
    assert len(running) == len(PROGRAMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"apiserver_options": ["--no-such-option"]}, "kube-apiserver ended with 1(?s:.*)no-such-option"),
        ({"address": "198.51.100.1"}, "198.51.100.1 is no address of this machine"),
    ],
    ids=["unknown option", "foreign address"],
)
def test_a_start_that_cannot_succeed_says_why(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    """A failed start names the program and what it said, and leaves no process."""
    with pytest.raises(ClusterError, match=message):
        ControlPlane.start(tmp_path / "cluster", **options)  # type: ignore[arg-type]

    assert using(tmp_path) == []
