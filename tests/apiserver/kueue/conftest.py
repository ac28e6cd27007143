"""A control plane with a real Kueue, under the fixtures of the folder above."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from testcluster.binaries import built
from testcluster.chart import RELEASE, SYSTEM, install_rbac
from testcluster.control_plane import ControlPlane, down
from testcluster.errors import ClusterError
from testcluster.existing import cannot
from testcluster.fixtures import install_crds
from testcluster.kueue import PROGRAM, Kueue


@pytest.fixture(scope="session")
def api_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One of its own: Kueue's webhooks see every Job and pod of a cluster."""
    if os.environ.get("E2E_KUBECONFIG"):
        cannot("Kueue is not ours to install")
    try:
        built(PROGRAM)
    except ClusterError as error:
        pytest.skip(f"Kueue cannot be built here: {error}")
    started = ControlPlane.start(tmp_path_factory.mktemp("kueue") / "cluster")
    yield started
    started.stop()
    down(started.folder)


@pytest.fixture(scope="session")
def control_plane(api_cluster: ControlPlane) -> ControlPlane:
    """The same, as tests play on it."""
    return api_cluster


@pytest.fixture(scope="session")
def crd(api_cluster: ControlPlane) -> None:
    """The project's definitions."""
    install_crds(api_cluster)


@pytest.fixture(scope="session")
def account(api_cluster: ControlPlane, crd: None) -> Path:
    """A kubeconfig with the operator's own permissions."""
    install_rbac(api_cluster)
    return api_cluster.kubeconfig_for(RELEASE, SYSTEM)


@pytest.fixture(scope="session", autouse=True)
def node() -> None:
    """The tests here have nodes of their own."""


@pytest.fixture(scope="session")
def kueue(api_cluster: ControlPlane) -> Kueue:
    """A running Kueue."""
    return Kueue.start(api_cluster)
