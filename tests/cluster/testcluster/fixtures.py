"""pytest fixtures: a cluster per session, a namespace per test. A conftest names this module in pytest_plugins."""

import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from testcluster.client import ApiError, Client
from testcluster.cluster import Cluster
from testcluster.control_plane import ControlPlane, down
from testcluster.existing import ExistingCluster, cannot
from testcluster.fleet import Fleet
from testcluster.kubelet import Kubelet
from testcluster.waiting import wait_for

ROOT = Path(__file__).parents[3]
CRDS = ROOT / "manifests" / "crd"


@pytest.fixture(scope="session")
def api_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control plane without nodes, with its audit log on; with E2E_KUBECONFIG, the cluster that it reaches."""
    folder = tmp_path_factory.mktemp("api-cluster")
    existing = os.environ.get("E2E_KUBECONFIG")
    if existing:
        cluster = ExistingCluster(folder, Path(existing))
        yield cluster
        cluster.client.close()
        return
    started = ControlPlane.start(folder / "cluster", audit=True)
    yield started
    started.stop()
    down(started.folder)


@pytest.fixture(scope="session")
def control_plane(api_cluster: Cluster) -> ControlPlane:
    """The api_cluster as one that tests may break and play on; a cluster that exists is neither."""
    if not isinstance(api_cluster, ControlPlane):
        cannot("programs, nodes and kubelets are its own")
    return api_cluster


@pytest.fixture(scope="session")
def crd(api_cluster: Cluster) -> None:
    """The project's custom resource definitions, established."""
    install_crds(api_cluster)


def install_crds(cluster: Cluster) -> None:
    """Apply the project's custom resource definitions and wait until they are served."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRDS))
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    wait_for(
        lambda: all(established(raw) for raw in cluster.client.items(path)),
        or_else="the custom resource definitions",
    )


def established(raw: Any) -> bool:
    """Whether a custom resource definition is served."""
    conditions = (raw.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


@pytest.fixture
def namespace(api_cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh namespace that enforces Pod Security restricted; its name begins like the test's."""
    with fresh_namespace(api_cluster, request.node.name) as name:
        yield name


@contextmanager
def fresh_namespace(cluster: Cluster, test: str) -> Iterator[str]:
    """A namespace as the fixture makes it, for fixtures of a wider scope."""
    client = cluster.client
    name = namespace_name(test)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    client.post("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
    _wait_service_account(client, name)
    yield name
    # Pods on played nodes have no kubelet that would end them.
    client.delete(f"/api/v1/namespaces/{name}/pods", {"gracePeriodSeconds": 0})
    client.delete(f"/api/v1/namespaces/{name}")


@pytest.fixture
def kubelet(control_plane: ControlPlane) -> Iterator[Kubelet]:
    """Plays the kubelet on the API-only cluster; the nodes it added go with the test."""
    played = Kubelet(control_plane.client)
    yield played
    played.remove_nodes()


@pytest.fixture(scope="session")
def fleet(control_plane: ControlPlane) -> Iterator[Fleet]:
    """KWOK on the API-only cluster: its nodes are added by `fleet.add_nodes`."""
    started = Fleet.start(control_plane)
    yield started
    started.stop()


def namespace_name(test: str) -> str:
    """A name for a test's namespace that no other test has."""
    readable = re.sub(r"[^a-z0-9]+", "-", test.lower())[:40].strip("-")
    return f"{readable or 'test'}-{secrets.token_hex(4)}"


def _wait_service_account(client: Client, namespace: str) -> None:
    """Wait for the namespace's default service account, without which no pod is made."""
    deadline = time.monotonic() + 30
    while True:
        try:
            client.get(f"/api/v1/namespaces/{namespace}/serviceaccounts/default")
            return
        except ApiError as error:
            if error.code != 404 or time.monotonic() > deadline:
                raise
        time.sleep(0.02)
