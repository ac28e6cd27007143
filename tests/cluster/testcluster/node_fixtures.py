"""pytest fixtures of the nodes tier. A conftest names this module in pytest_plugins."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testcluster import cgroups, nodes
from testcluster.cluster import Cluster
from testcluster.errors import ClusterError
from testcluster.existing import ExistingCluster, cannot
from testcluster.fixtures import fresh_namespace
from testcluster.nodes import NodeCluster

_ABILITIES = (
    "control_plane",
    "cut_link",
    "delay_link",
    "heal_link",
    "nodes",
    "set_features",
    "shared_volume",
    "start_node",
    "stop_kubelet",
    "stop_node",
)


class ExistingNodes(ExistingCluster):
    """A cluster that exists and has nodes; they are not ours to break."""

    def image(self, name: str) -> str:
        """The image that E2E_IMAGE_<NAME> names; skips the test without it."""
        variable = f"E2E_IMAGE_{name.upper()}"
        return os.environ.get(variable) or cannot(
            f"images must be pulled: set {variable} to one that it can pull"
        )

    def __getattr__(self, name: str) -> Any:
        if name in _ABILITIES:
            cannot("the nodes and their disks are not ours")
        return super().__getattr__(name)


@pytest.fixture(scope="session")
def node_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control plane with two nodes; with E2E_KUBECONFIG, the cluster that it reaches.

    Skips without root and without control groups, and says what to set.
    """
    folder = tmp_path_factory.mktemp("node-cluster")
    if existing := os.environ.get("E2E_KUBECONFIG"):
        reached = ExistingNodes(folder, Path(existing))
        yield reached
        reached.client.close()
        return
    if why := _cannot_have_nodes():
        pytest.skip(f"{why}; or set E2E_KUBECONFIG to the kubeconfig of a cluster with nodes")
    cluster = nodes.up(folder / "cluster", detached=False)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def own_nodes(node_cluster: Cluster) -> NodeCluster:
    """The node_cluster as one whose nodes tests may break."""
    if not isinstance(node_cluster, NodeCluster):
        cannot("the nodes and their disks are not ours")
    return node_cluster


@pytest.fixture
def doomed_nodes(own_nodes: NodeCluster) -> NodeCluster:
    """The node_cluster for a test that ends it: such tests run after all others."""
    return own_nodes


@pytest.fixture
def node_namespace(node_cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh namespace on the node_cluster that enforces Pod Security restricted.

    At the end its pods are gone, and the CPUs that they owned are free again.
    """
    with fresh_namespace(node_cluster, request.node.name) as name:
        yield name
        _end_pods(node_cluster, name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that end the session's cluster run last."""
    items.sort(key=lambda item: "doomed_nodes" in getattr(item, "fixturenames", ()))


def _cannot_have_nodes() -> str | None:
    """Why this machine cannot have nodes at all, or None."""
    if os.geteuid() != 0:
        return "the nodes tier makes control groups, mounts and network interfaces: run the tests as root"
    try:
        cgroups.hierarchies()
    except ClusterError as error:
        return str(error)
    return None


def _end_pods(cluster: Cluster, namespace: str, *, seconds: float = 60) -> None:
    """Delete what makes pods, then the pods, and wait for the kubelets to have ended them."""
    background = {"propagationPolicy": "Background"}
    cluster.client.delete(f"/apis/batch/v1/namespaces/{namespace}/jobs", background)
    pods = f"/api/v1/namespaces/{namespace}/pods"
    cluster.client.delete(pods, {"gracePeriodSeconds": 1})
    deadline = time.monotonic() + seconds
    while left := cluster.client.items(pods):
        if time.monotonic() > deadline:
            names = ", ".join(pod["metadata"]["name"] for pod in left)
            raise ClusterError(f"after {seconds:.0f} s these pods of {namespace} have not ended: {names}")
        time.sleep(0.1)
