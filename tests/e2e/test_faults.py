"""What a job survives on real nodes, with the adapter that an undisturbed run gives."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testcluster import features
from testcluster.cluster import Cluster
from testcluster.nodes import NodeCluster
from testcluster.waiting import wait_for

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(900)]

AMX = {"AMXTILE": "true", "AMXBF16": "true"}


_undisturbed: list[str] = []
"""sha256 of the adapter that an undisturbed job gives: neither names nor places change it."""


def weights(volume: Path, name: str) -> str:
    """sha256 of a job's adapter."""
    file = volume / "work" / "jobs" / name / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def undisturbed(small_job: Callable[..., Any], volume: Path) -> str:
    """sha256 of the undisturbed adapter; the first test trains it."""
    if not _undisturbed:
        small_job("calm").until_phase("Succeeded")
        _undisturbed.append(weights(volume, "calm"))
    return _undisturbed[0]


def test_a_killed_rank(small_job: Callable[..., Any], volume: Path, undisturbed: str) -> None:
    """A rank's container that is killed costs one user restart, and the gang goes on from its checkpoint."""
    job = small_job("killed")
    job.until_step(20)
    job.kill_container(1)

    status = job.until_phase("Succeeded")

    assert status["restarts"] == {"user": 1, "infrastructure": 0}
    assert status["attempts"][0]["reason"] == "Killed"
    assert "on node node-" in status["attempts"][0]["message"]
    assert weights(volume, "killed") == undisturbed


def test_operator_and_rank_0_killed_together(
    operator: Cluster, small_job: Callable[..., Any], volume: Path, undisturbed: str
) -> None:
    """The next operator finds out what happened, charges it once, and the job goes on."""
    job = small_job("both")
    job.until_step(20)
    pods = ("delete", "pod", "-l", "app.kubernetes.io/name=qlora-operator")
    operator.kubectl("-n", "qlora-system", *pods, "--force", "--wait=false")
    job.kill_container(0)

    status = job.until_phase("Succeeded")

    assert status["restarts"] == {"user": 1, "infrastructure": 0}
    assert weights(volume, "both") == undisturbed


def test_suspend_and_resume(small_job: Callable[..., Any], volume: Path, undisturbed: str) -> None:
    """A suspended job has no pods; resumed, it goes on from where it stopped, at no cost."""
    job = small_job("held")
    job.until_step(20)
    job.patch({"suspend": True})
    status = job.until(lambda status: status["phase"] == "Suspended" and status["attempts"][-1].get("end"))
    assert status["attempts"][-1]["reason"] == "Suspended"
    wait_for(lambda: not job.pods(), or_else="the end of its pods")
    job.patch({"suspend": False})

    status = job.until_phase("Succeeded")

    assert status["restarts"] == {"user": 0, "infrastructure": 0}
    assert [attempt["reason"] for attempt in status["attempts"]] == ["Suspended", "Succeeded"]
    assert weights(volume, "held") == undisturbed


def test_a_node_is_lost_and_comes_back(
    operator: Cluster, small_job: Callable[..., Any], volume: Path, undisturbed: str
) -> None:
    """A node that stops costs the infrastructure's budget; the job waits for it, says so, and goes on when it is
    back, from the last checkpoint."""
    assert isinstance(operator, NodeCluster)
    job = small_job("lost")
    job.until_step(20)
    operator.stop_node("node-b")
    try:
        status = job.until(
            lambda status: status["phase"] == "Restarting" and "node-b" in (status.get("message") or "")
        )
        assert status["restarts"]["user"] == 0
    finally:
        operator.start_node("node-b")

    status = job.until_phase("Succeeded")

    assert status["restarts"]["user"] == 0
    assert status["restarts"]["infrastructure"] >= 1
    assert weights(volume, "lost") == undisturbed


def test_a_label_is_no_proof(operator: Cluster, small_job: Callable[..., Any]) -> None:
    """With an AMX label on one node and only that tier allowed: where the processor has AMX the job runs there;
    where it has not, the rank's own probe objects, the node is avoided, and the status explains it."""
    assert isinstance(operator, NodeCluster)
    real = features.of_this_machine()
    labels = {f"feature.node.kubernetes.io/cpu-cpuid.{flag}": value for flag, value in AMX.items()}
    without = {key: value for key, value in real.items() if key not in labels}
    operator.set_features("node-a", {**real, **labels})
    operator.set_features("node-b", without)
    try:
        job = small_job("amx", isa={"allowed": ["amx_bf16"]}, topology={"pods": 1})
        if set(labels) <= set(real):
            status = job.until_phase("Succeeded")
            assert status["placement"]["nodes"] == ["node-a"]
            assert status["placement"]["isa"] == "amx_bf16"
        else:
            status = job.until(lambda status: "node-a" in (status.get("placement") or {}).get("avoid", []))
            assert status["attempts"][0]["reason"] == "IsaBelowTier"
            job.until(lambda status: "AMX" in (status.get("message") or ""))
    finally:
        operator.set_features("node-a", real)
        operator.set_features("node-b", real)
