"""A cluster that exists already: kind, k3s, a company's. What it cannot show is skipped."""

import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest

from testcluster.cluster import Cluster
from testcluster.errors import ClusterError

_ABILITIES = {
    "audit_log": "its audit log is not ours to read",
    "begin": "its programs are not ours to start",
    "binaries": "it was not built from our binaries",
    "end": "its programs are not ours to end",
    "issue": "its certificate authority is not ours",
    "pause": "its programs are not ours to pause",
    "processes": "its programs are not ours to look at",
    "restart_apiserver": "its API server is not ours to restart",
    "resume": "its programs are not ours to pause",
}
"""What only a cluster that the tests started can do, and why."""


class ExistingCluster(Cluster):
    """The cluster of a kubeconfig's current context; what a ControlPlane alone can do skips the test."""

    def __init__(self, folder: Path, kubeconfig: Path) -> None:
        if not kubeconfig.is_file():
            raise ClusterError(f"E2E_KUBECONFIG={kubeconfig} is no file: set it to a kubeconfig, or unset it")
        kubectl = shutil.which("kubectl")
        if kubectl is None:
            raise ClusterError("kubectl is not on PATH: install it (https://kubernetes.io/docs/tasks/tools)")
        super().__init__(folder, kubeconfig, Path(kubectl))

    def __getattr__(self, name: str) -> Any:
        if name in _ABILITIES:
            cannot(_ABILITIES[name])
        raise AttributeError(f"{type(self).__name__} has no {name}")


def cannot(why: str) -> NoReturn:
    """Skip the test that runs: an existing cluster cannot show this."""
    pytest.skip(f"E2E_KUBECONFIG: on a cluster that exists, {why}")
