"""Programs are found before they are built, and built once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testcluster import binaries
from testcluster.binaries import PROGRAMS, TIERS, disk_shortage, ensure
from testcluster.errors import ClusterError


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that names no programs; the version may be chosen."""
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    return monkeypatch


@pytest.fixture
def built(plain: pytest.MonkeyPatch) -> binaries.Binaries:
    """The API tier's programs."""
    return ensure("api")


@pytest.mark.cluster
def test_every_program_of_the_tier_is_there(built: binaries.Binaries) -> None:
    """The programs run and say they are of the version asked for."""
    assert built.paths.keys() == set(TIERS["api"])
    assert binaries.reported_version(built["kube-apiserver"]) == built.version


@pytest.mark.cluster
def test_a_second_call_needs_no_go(built: binaries.Binaries, plain: pytest.MonkeyPatch) -> None:
    """What was built is found again without any other program."""
    plain.setenv("PATH", "/nowhere")

    assert ensure("api") == built


@pytest.mark.cluster
def test_kubebuilder_assets_are_used(
    built: binaries.Binaries, plain: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """etcd, kube-apiserver and kubectl come from KUBEBUILDER_ASSETS, the others from the cache."""
    for name in binaries.ASSETS:
        (tmp_path / name).symlink_to(built[name])
    plain.setenv("KUBEBUILDER_ASSETS", str(tmp_path))

    found = ensure("api")

    assert {name for name, path in found.paths.items() if path.parent == tmp_path} == set(binaries.ASSETS)
    assert found["kube-scheduler"] == built["kube-scheduler"]


@pytest.mark.cluster
def test_assets_of_another_minor_are_refused(
    built: binaries.Binaries, plain: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An API server of another minor than the one asked for is an error that names both."""
    for name in binaries.ASSETS:
        (tmp_path / name).symlink_to(built[name])
    plain.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    plain.setenv("KUBERNETES_VERSION", "1.20.0")

    with pytest.raises(
        ClusterError, match=rf"is of version {built.version}, but Kubernetes 1\.20\.0 is asked for"
    ):
        ensure("api")


def test_assets_without_a_program_are_refused(plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of assets that lacks a program is named."""
    plain.setenv("KUBEBUILDER_ASSETS", str(tmp_path))

    with pytest.raises(ClusterError, match="holds no etcd"):
        ensure("api")


@pytest.mark.cluster
def test_a_program_on_path_is_used_when_its_minor_fits(
    built: binaries.Binaries, plain: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With an empty cache, programs on PATH serve; those of another minor do not, and building needs Go."""
    for name, path in built.paths.items():
        (tmp_path / name).symlink_to(path)
    plain.setenv("QLORA_CLUSTER_CACHE", str(tmp_path / "empty"))
    plain.setenv("PATH", str(tmp_path))

    assert ensure("api")["kubectl"] == tmp_path / "kubectl"
    plain.setenv("KUBERNETES_VERSION", "1.20.0")
    with pytest.raises(ClusterError, match="Go is not installed: install Go"):
        ensure("api")


@pytest.mark.parametrize("version", ["v1.36.3", "1.36", "latest"])
def test_a_version_must_be_complete(plain: pytest.MonkeyPatch, version: str) -> None:
    """KUBERNETES_VERSION has three numbers."""
    plain.setenv("KUBERNETES_VERSION", version)

    with pytest.raises(ClusterError, match=rf"KUBERNETES_VERSION={version} is no version"):
        ensure("api")


def test_an_unknown_tier_is_refused() -> None:
    """The message lists the tiers."""
    with pytest.raises(ClusterError, match="choose one of api, nodes, fleet"):
        ensure("moon")


@pytest.mark.parametrize(
    ("names", "free", "cached", "fits"),
    [
        (TIERS["api"], 12, 0, True),
        (TIERS["api"], 5, 0, False),
        (TIERS["api"], 5, 7, True),
        (("etcd",), 1, 0, True),
        (("etcd",), 0.1, 0, False),
    ],
    ids=["enough", "too little", "cached before", "small", "none"],
)
def test_disk_is_checked_before_building(
    names: tuple[str, ...], free: float, cached: float, fits: bool
) -> None:
    """Building is refused when Go's caches have no room to grow, and the message says how much is needed."""
    why = disk_shortage(list(names), free, cached)

    assert (why is None) == fits
    assert fits or f"and only {free:.1f} GB are free" in str(why)


def test_every_tier_names_known_programs() -> None:
    """Each program of a tier can be built."""
    assert {name for names in TIERS.values() for name in names} <= PROGRAMS.keys()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_two_callers_build_once(plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of two processes that miss a program at the same time, one builds it and both get it."""
    code = "from testcluster.binaries import built; print(built('etcd'))"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "QLORA_CLUSTER_CACHE": str(tmp_path),
    }
    callers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [caller.communicate() for caller in callers]

    assert said[0][0] == said[1][0]
    assert Path(said[0][0].strip()).is_file()
    assert sum(err.count("building etcd") for _, err in said) == 1
    assert not list(tmp_path.rglob("*.partial"))
