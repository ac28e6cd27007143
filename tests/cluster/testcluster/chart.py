"""The project's Helm chart: its objects, and releases of it on a cluster."""

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from testcluster.binaries import ensure
from testcluster.cluster import Cluster
from testcluster.errors import ClusterError

ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts" / "qlora-operator"
INSTALL = ROOT / "manifests" / "install.yaml"
RELEASE = "qlora-operator"
SYSTEM = "qlora-system"
"""Namespace of the release that manifests/install.yaml is the rendering of."""
RBAC = {"ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}

Object = dict[str, Any]


class HelmError(ClusterError):
    """helm ended with an error; `text` is what it printed."""

    def __init__(self, arguments: tuple[str, ...], text: str) -> None:
        self.text = text
        super().__init__(f"helm {' '.join(arguments)}: {text}")


def helm(*arguments: str, values: Mapping[str, Any] | None = None, kubeconfig: Path | None = None) -> str:
    """What helm prints, of both streams; `values` are a file of values. Raises HelmError when it fails."""
    program = ensure("api", "helm")["helm"]
    with tempfile.TemporaryDirectory() as folder:
        more = []
        if values is not None:
            file = Path(folder) / "values.yaml"
            file.write_text(yaml.safe_dump(dict(values)))
            more = ["--values", str(file)]
        homes = {f"HELM_{kind}_HOME": f"{folder}/{kind}" for kind in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [program, *arguments, *more],
            env={**os.environ, **homes, "KUBECONFIG": str(kubeconfig or f"{folder}/none")},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise HelmError(arguments, done.stderr or done.stdout)
    return done.stdout + done.stderr


def render(
    values: Mapping[str, Any] | None = None,
    *,
    release: str = RELEASE,
    namespace: str = SYSTEM,
    chart: Path = CHART,
) -> list[Object]:
    """The objects of a release with these values, in the order in which helm makes them, hooks last."""
    return _objects(helm("template", release, str(chart), "--namespace", namespace, values=values or {}))


def installed() -> list[Object]:
    """The objects of manifests/install.yaml."""
    return _objects(INSTALL.read_text())


def _objects(text: str) -> list[Object]:
    # The definition is long: the loader in C takes a tenth of the time.
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def find(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """The one object of the kind, or the one of the kind and name. Raises ClusterError unless there is one."""
    found = [each for each in objects if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    if len(found) != 1:
        raise ClusterError(f"{len(found)} objects of kind {kind} and name {name}, not one")
    return found[0]


def operator_role() -> Object:
    """The ClusterRole of the operator that serves every namespace."""
    return find(installed(), "ClusterRole", f"{RELEASE}.{SYSTEM}")


def install_rbac(cluster: Cluster) -> None:
    """Apply the operator's namespace, service account and permissions as manifests/install.yaml has them."""
    objects = [each for each in installed() if each["kind"] in {"Namespace", *RBAC}]
    cluster.kubectl("apply", "--server-side", "-f", "-", input=yaml.safe_dump_all(objects))


class Releases:
    """helm on one cluster, in one namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace

    def __call__(self, *arguments: str, values: Mapping[str, Any] | None = None) -> str:
        """What `helm ARGUMENTS` prints."""
        return helm(
            *arguments, "--namespace", self.namespace, values=values, kubeconfig=self.cluster.kubeconfig
        )

    def install(self, values: Mapping[str, Any] | None = None, *arguments: str) -> str:
        """Install or upgrade the release, without waiting for its pods; what helm prints, the notes included."""
        return self("upgrade", "--install", RELEASE, str(CHART), *arguments, values=values or {})
