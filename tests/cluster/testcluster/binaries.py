"""The programs of a cluster: found on this machine, or built from Go modules into a cache."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from testcluster import go_modules
from testcluster.errors import ClusterError


@dataclass(frozen=True)
class Program:
    """Where a program comes from."""

    component: str
    package: str
    minutes: float
    """Building it when nothing is cached, on two cores; measured."""
    gigabytes: float
    """Disk for Go's own caches meanwhile."""


_KUBERNETES = "k8s.io/kubernetes/cmd"
PROGRAMS = {
    "etcd": Program("etcd", "go.etcd.io/etcd/server/v3", 1, 0.5),
    "kube-apiserver": Program("kubernetes", f"{_KUBERNETES}/kube-apiserver", 5, 3),
    "kube-controller-manager": Program("kubernetes", f"{_KUBERNETES}/kube-controller-manager", 2, 0.5),
    "kube-scheduler": Program("kubernetes", f"{_KUBERNETES}/kube-scheduler", 0.5, 0.2),
    "kubectl": Program("kubernetes", f"{_KUBERNETES}/kubectl", 1, 0.5),
    "kubelet": Program("kubernetes", f"{_KUBERNETES}/kubelet", 1, 0.5),
    "kube-proxy": Program("kubernetes", f"{_KUBERNETES}/kube-proxy", 0.5, 0.2),
    "coredns": Program("coredns", "github.com/coredns/coredns", 5, 1.5),
    "kueue": Program("kueue", "sigs.k8s.io/kueue/cmd/kueue", 4, 2),
    "kwok": Program("kwok", "sigs.k8s.io/kwok/cmd/kwok", 5, 1.5),
    "helm": Program("helm", "helm.sh/helm/v4/cmd/helm", 5, 1.5),
    "registry": Program("registry", "github.com/distribution/distribution/v3/cmd/registry", 3, 1),
    "syft": Program("syft", "github.com/anchore/syft/cmd/syft", 4, 2),
    "ollama-modelfile": Program("ollama", ".", 0.5, 0.2),
}
_API = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
TIERS = {
    "api": _API,
    "nodes": (*_API, "kubelet", "kube-proxy", "coredns"),
    "fleet": (*_API, "kwok"),
}
"""The programs that each tier needs."""
ASSETS = ("etcd", "kube-apiserver", "kubectl")
"""What a folder named by KUBEBUILDER_ASSETS holds."""


KUBERNETES_SOURCES = 4.0
"""GB of disk for the sources of Kubernetes and what it depends on, and for linking."""


@dataclass(frozen=True)
class Binaries:
    """The programs of a tier, by name."""

    version: str
    """Of Kubernetes, such as 1.36.3."""
    paths: dict[str, Path]

    def __getitem__(self, name: str) -> Path:
        """The program's file."""
        return self.paths[name]


def kubernetes_version() -> str:
    """$KUBERNETES_VERSION, or the locked version."""
    version = os.environ.get("KUBERNETES_VERSION") or go_modules.locked_version("kubernetes")
    if not re.fullmatch(r"1\.\d+\.\d+", version):
        raise ClusterError(f"KUBERNETES_VERSION={version} is no version: set it to one such as 1.36.3")
    return version


def version_of(component: str) -> str:
    """The version of a component that is asked for."""
    return kubernetes_version() if component == "kubernetes" else go_modules.locked_version(component)


def ensure(tier: str, *more: str) -> Binaries:
    """The programs of the tier, and those named besides; what is missing is built.

    Raises ClusterError when that is impossible.
    """
    if tier not in TIERS:
        raise ClusterError(f"there is no tier {tier!r}: choose one of {', '.join(TIERS)}")
    names = (*TIERS[tier], *more)
    paths = {name: path for name in names if (path := _found(name))}
    missing = [name for name in names if name not in paths]
    if missing:
        _check_disk(missing)
    for number, name in enumerate(missing, 1):
        paths[name] = built(name, f"{number} of {len(missing)}")
    return Binaries(kubernetes_version(), paths)


def cache() -> Path:
    """Where built programs are kept: $QLORA_CLUSTER_CACHE, or a folder in the user's cache."""
    named = os.environ.get("QLORA_CLUSTER_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "qlora-operator" / "cluster"


def _cached(name: str) -> Path:
    component = PROGRAMS[name].component
    return cache() / f"{component}-{version_of(component)}" / name


def _found(name: str) -> Path | None:
    """The program where no building is needed: KUBEBUILDER_ASSETS, the cache, or PATH."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets and name in ASSETS:
        return _asset(Path(assets) / name)
    cached = _cached(name)
    if cached.is_file():
        return cached
    on_path = shutil.which(name)
    wanted = version_of(PROGRAMS[name].component)
    return Path(on_path) if on_path and _minor(reported_version(Path(on_path))) == _minor(wanted) else None


def _asset(path: Path) -> Path:
    if not path.is_file():
        raise ClusterError(f"KUBEBUILDER_ASSETS={path.parent} holds no {path.name}: fill it, or unset it")
    version, wanted = reported_version(path), kubernetes_version()
    if PROGRAMS[path.name].component == "kubernetes" and _minor(version) != _minor(wanted):
        raise ClusterError(
            f"{path} is of version {version or 'unknown'}, but Kubernetes {wanted} is asked for: set "
            f"KUBERNETES_VERSION to a version of the same minor as in KUBEBUILDER_ASSETS, or unset the latter"
        )
    return path


def reported_version(path: Path) -> str | None:
    """What the program says its version is, or None."""
    arguments = {"kubectl": ["version", "--client"], "helm": ["version", "--short"], "coredns": ["-version"]}
    command = [str(path), *arguments.get(path.name, ["--version"])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\d+\.\d+\.\d+", done.stdout)
    return found[0] if found else None


def _minor(version: str | None) -> str | None:
    return version.rpartition(".")[0] if version else None


def _check_disk(missing: list[str]) -> None:
    """Raise ClusterError unless Go's caches may still grow by what building from nothing takes."""
    cached = Path(os.environ.get("GOCACHE") or Path.home() / ".cache" / "go-build")
    folder = _existing(cached)
    if why := disk_shortage(missing, shutil.disk_usage(folder).free / 1e9, _size(cached) / 1e9):
        raise ClusterError(
            f"{why} at {folder}: free space, or set GOCACHE, GOMODCACHE and QLORA_CLUSTER_CACHE"
        )


def disk_shortage(missing: list[str], free: float, cached: float) -> str | None:
    """Why the programs cannot be built with so many GB free, of which Go's build cache already holds some."""
    needed = sum(PROGRAMS[name].gigabytes for name in missing)
    if any(PROGRAMS[name].component == "kubernetes" for name in missing):
        needed += KUBERNETES_SOURCES
    if free + cached >= needed:
        return None
    return f"building {', '.join(missing)} takes {needed:.0f} GB of disk, and only {free:.1f} GB are free"


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _size(folder: Path) -> int:
    """Bytes of all files below; what vanishes meanwhile counts as nothing."""
    total = 0
    for where, _, files in os.walk(folder):
        for file in files:
            try:
                total += (Path(where) / file).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def built(name: str, which: str = "1 of 1") -> Path:
    """Build the program into the cache, unless it is there or gets there while this waits for another process."""
    target = _cached(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent.with_name(f"{target.parent.name}.lock")):
        if not target.is_file():
            _build(name, target, which)
    return target


def _build(name: str, target: Path, which: str) -> None:
    program = PROGRAMS[name]
    version = version_of(program.component)
    _say(
        f"building {name} {version} ({which}): up to {program.minutes:g} min on two cores, seconds when cached"
    )
    partial = target.with_name(f"{name}.partial")
    start = time.monotonic()
    go_modules.build(program.component, version, program.package, partial)
    partial.replace(target)
    _say(f"built {name} {version} in {time.monotonic() - start:.0f} s: {target}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that builds into {path.with_suffix('').name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
