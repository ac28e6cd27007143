"""A control plane whose scheduler knows gangs, under the fixtures of the folder above."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from testcluster.binaries import kubernetes_version
from testcluster.chart import RELEASE, SYSTEM, install_rbac
from testcluster.control_plane import ControlPlane, down
from testcluster.existing import cannot
from testcluster.fixtures import install_crds

GATES = ("GenericWorkload", "GangScheduling", "WorkloadWithJob")
"""Alpha in 1.36, where the Job controller makes the groups."""
API = "scheduling.k8s.io/v1alpha2"


@pytest.fixture(scope="session")
def api_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One of its own, with the gates on."""
    if os.environ.get("E2E_KUBECONFIG"):
        cannot("feature gates are its administrator's")
    if not kubernetes_version().startswith("1.36."):
        pytest.skip(f"{API} is of Kubernetes 1.36")
    started = ControlPlane.start(
        tmp_path_factory.mktemp("gangs") / "cluster",
        apiserver_options=[f"--runtime-config={API}=true"],
        feature_gates=GATES,
    )
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
