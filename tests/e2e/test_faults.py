"""What a job survives on real nodes, with the adapter that an undisturbed run gives."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testcluster import features
from testcluster.cluster import Cluster
from testcluster.nodes import NodeCluster

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(900)]

AMX = {"AMXTILE": "true", "AMXBF16": "true"}


def weights(volume: Path, name: str) -> str:
    """sha256 of a job's adapter."""
    file = volume / "work" / "jobs" / name / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_disturbed_jobs_end_as_undisturbed_ones(
    operator: Cluster, small_job: Callable[..., Any], volume: Path
) -> None:
    """A rank's container is killed; the operator and rank 0 are killed together; the job is suspended and resumed:
    each time it goes on from its checkpoint, at the right cost, and the adapter is the undisturbed one's."""
    small_job("calm").until_phase("Succeeded")
    undisturbed = weights(volume, "calm")

    killed = small_job("killed")
    killed.until_step(40)
    killed.kill_container(1)
    status = killed.until_phase("Succeeded")
    assert status["restarts"] == {"user": 1, "infrastructure": 0}
    assert status["attempts"][0]["reason"] == "Killed"
    assert "node-b" in status["attempts"][0]["message"] or "node-a" in status["attempts"][0]["message"]
    assert weights(volume, "killed") == undisturbed

    both = small_job("both")
    both.until_step(40)
    operator.kubectl(
        "-n",
        "qlora-system",
        "delete",
        "pod",
        "-l",
        "app.kubernetes.io/name=qlora-operator",
        "--force",
        "--wait=false",
    )
    both.kill_container(0)
    status = both.until_phase("Succeeded")
    assert status["restarts"]["user"] == 1
    assert weights(volume, "both") == undisturbed

    held = small_job("held")
    held.until_step(40)
    held.patch({"suspend": True})
    held.until(lambda status: status["phase"] == "Suspended" and status["attempts"][-1].get("end"))
    assert held.pods() == []
    held.patch({"suspend": False})
    status = held.until_phase("Succeeded")
    assert status["restarts"] == {"user": 0, "infrastructure": 0}
    assert [attempt["reason"] for attempt in status["attempts"]] == ["Suspended", "Succeeded"]
    assert weights(volume, "held") == undisturbed


def test_a_node_is_lost_and_comes_back(
    operator: Cluster, small_job: Callable[..., Any], volume: Path
) -> None:
    """A node that stops costs one infrastructure restart; the job waits for it, says so, and goes on when it is
    back, from the last checkpoint."""
    assert isinstance(operator, NodeCluster)
    small_job("calm").until_phase("Succeeded")
    job = small_job("lost")
    job.until_step(40)
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
    assert weights(volume, "lost") == weights(volume, "calm")


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
