"""A cluster that exists serves the same tests, and what it cannot show is skipped with the reason."""

from pathlib import Path

import pytest

from testcluster.control_plane import ControlPlane
from testcluster.errors import ClusterError
from testcluster.existing import ExistingCluster


@pytest.fixture
def existing(control_plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExistingCluster:
    """The API tier's cluster, known by its kubeconfig alone."""
    monkeypatch.setenv("PATH", str(control_plane.binaries["kubectl"].parent))
    return ExistingCluster(tmp_path, control_plane.kubeconfig)


@pytest.mark.cluster
def test_it_is_used_like_one_of_ours(existing: ExistingCluster, namespace: str) -> None:
    """kubectl, the client and kubeconfigs of service accounts work."""
    config = existing.kubeconfig_for("default", namespace)

    assert f"namespace/{namespace}" in existing.kubectl("get", "namespaces", "-o", "name")
    assert existing.client.get(f"/api/v1/namespaces/{namespace}")["metadata"]["name"] == namespace
    assert f"{namespace}:default" in existing.kubectl("auth", "whoami", kubeconfig=config)


@pytest.mark.cluster
@pytest.mark.parametrize("ability", ["audit_log", "processes", "restart_apiserver", "pause"])
def test_what_it_cannot_show_is_skipped_with_the_reason(existing: ExistingCluster, ability: str) -> None:
    """Asking for an ability of our own clusters skips the test and says why."""
    with pytest.raises(pytest.skip.Exception, match=r"on a cluster that exists, its .* not ours"):
        getattr(existing, ability)


def test_a_missing_kubeconfig_is_an_error(tmp_path: Path) -> None:
    """E2E_KUBECONFIG that names no file is refused with what to set."""
    with pytest.raises(ClusterError, match=r"E2E_KUBECONFIG=.*absent is no file"):
        ExistingCluster(tmp_path, tmp_path / "absent")
