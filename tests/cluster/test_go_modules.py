"""Versions are locked in one place, and another version is derived from upstream's own list."""

import shutil
from pathlib import Path

import pytest

from testcluster import go_modules
from testcluster.errors import ClusterError

UPSTREAM = """\
module k8s.io/kubernetes

go 1.25.0

replace (
\tk8s.io/api => ./staging/src/k8s.io/api
\tk8s.io/client-go => ./staging/src/k8s.io/client-go
\texample.org/other => example.org/fork v1.2.3
)
"""
needs_go = pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")


@pytest.mark.parametrize("component", go_modules.PATHS)
def test_each_component_is_locked(component: str) -> None:
    """Each component's folder names one version and holds the checksums of all it depends on."""
    version = go_modules.locked_version(component)
    sums = (go_modules.MODULES / component / "go.sum").read_text()

    assert f"{go_modules.PATHS[component]} v{version} h1:" in sums


def test_another_version_replaces_the_staging_modules() -> None:
    """Each staging module of upstream's go.mod is replaced by its published version, and no other."""
    text = go_modules.other_go_mod("kubernetes", "1.35.4", UPSTREAM)

    assert text.splitlines() == [
        "module qlora.dev/tests/cluster/kubernetes",
        "go 1.25.0",
        "require k8s.io/kubernetes v1.35.4",
        "replace k8s.io/api => k8s.io/api v0.35.4",
        "replace k8s.io/client-go => k8s.io/client-go v0.35.4",
    ]


def test_without_go_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Building without Go names Go and the way around it."""
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ClusterError, match=r"Go is not installed: install Go .* or set KUBEBUILDER_ASSETS"):
        go_modules.build(
            "etcd", go_modules.locked_version("etcd"), "go.etcd.io/etcd/server/v3", tmp_path / "etcd"
        )


@needs_go
def test_a_go_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When the module needs a newer Go than there is, the message says which."""
    (tmp_path / "etcd").mkdir()
    (tmp_path / "etcd" / "go.mod").write_text(
        "module m\ngo 1.999\nrequire go.etcd.io/etcd/server/v3 v3.6.16\n"
    )
    monkeypatch.setattr(go_modules, "MODULES", tmp_path)
    monkeypatch.setenv("GOTOOLCHAIN", "local")

    with pytest.raises(
        ClusterError, match=r"Go is too old: (?s:.*)go >= 1\.999 .*install that version or newer"
    ):
        go_modules.build("etcd", "3.6.16", "go.etcd.io/etcd/server/v3", tmp_path / "program")


@needs_go
def test_a_failed_build_shows_what_go_said(tmp_path: Path) -> None:
    """Go's own message is part of the error."""
    with pytest.raises(ClusterError, match=r"`go build .*` failed:(?s:.*)no/such/package"):
        go_modules.build("etcd", go_modules.locked_version("etcd"), "no/such/package", tmp_path / "program")
