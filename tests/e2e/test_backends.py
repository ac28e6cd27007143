"""Jobs over oneCCL and Intel MPI, a rank on each of two nodes: what gloo gives, whatever carries the numbers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testcluster.waiting import wait_for

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(900)]

STEPS = 100
"""Of which every tenth leaves a checkpoint."""

Make = Callable[..., Any]


@dataclass(frozen=True)
class Result:
    """What a job ends with."""

    eval_loss: float
    adapter: bytes
    """The file of weights."""


_with_gloo: list[Result] = []
"""One for all tests: neither names nor places change it."""


@pytest.fixture
def job(small_job: Callable[..., Any]) -> Make:
    """job(name, backend, **topology) -> a short job of two pods, created; what shapes the result is the same."""

    def make(name: str, backend: str, **topology: Any) -> Any:
        distributed = {"backend": backend, "timeoutSeconds": 10}
        return small_job(name, training={"maxSteps": STEPS}, distributed=distributed, topology=topology)

    return make


@pytest.fixture
def with_gloo(job: Make, volume: Path) -> Result:
    """The undisturbed job over gloo, whose launchers settle the number of ranks; the first test trains it."""
    if not _with_gloo:
        over_gloo = job("gloo", "gloo", ranksPerPod="auto")
        _with_gloo.append(result(over_gloo, volume))
        status = over_gloo.status
        assert (status["placement"]["worldSize"], status["columns"]["ranks"]) == (2, "0/2")
        # A job this short may end before its ranks have told where they are.
        assert {rank["numaNodes"] for rank in status.get("ranks") or []} <= {"0"}
    return _with_gloo[0]


def result(job: Any, volume: Path) -> Result:
    """What the job ended with, once it succeeded with a rank on each node."""
    status = job.until_phase("Succeeded")
    assert status["placement"]["nodes"] == ["node-a", "node-b"]
    file = volume / "work" / "jobs" / job.name / "adapter" / "adapter_model.safetensors"
    return Result(status["adapter"]["evalLoss"], file.read_bytes())


def test_a_rank_over_ccl_is_killed(job: Make, volume: Path, with_gloo: Result) -> None:
    """Over oneCCL a rank's container that is killed costs one user restart, and the gang goes on from its checkpoint
    to the adapter of a job over gloo."""
    killed = job("ccl", "ccl")
    checkpoints = volume / "work" / "jobs" / "ccl" / "checkpoints"
    # The status would tell too late: such a model does many steps a second.
    wait_for(lambda: list(checkpoints.glob("step-*")), 180, or_else=killed.logs)
    killed.kill_container(1)

    assert result(killed, volume) == with_gloo

    status = killed.status
    assert status["restarts"] == {"user": 1, "infrastructure": 0}
    assert status["attempts"][0]["reason"] == "Killed"


def test_mpi(job: Make, volume: Path, with_gloo: Result) -> None:
    """Over Intel MPI a job ends at once with the adapter of a job over gloo."""
    over_mpi = job("mpi", "mpi")

    assert result(over_mpi, volume) == with_gloo

    assert over_mpi.status["restarts"] == {"user": 0, "infrastructure": 0}


def test_a_prefix_over_mpi(small_job: Callable[..., Any], volume: Path) -> None:
    """P-tuning v2 as it was published, small: ranks on two nodes, MPI between them, trained keys and values."""
    tokens = 8
    prefix = small_job(
        "prefix",
        adapter={
            "method": "prefix-tuning",
            "numVirtualTokens": tokens,
            "promptInit": "text",
            "promptInitText": "Answer.",
        },
        quantization={"scheme": "none"},
        training={"maxSteps": 20, "learningRate": 1e-2},
        distributed={"backend": "mpi", "timeoutSeconds": 10},
        topology={"ranksPerPod": "auto"},
    )
    found = result(prefix, volume)
    status = prefix.status
    header = json.loads(found.adapter[8 : 8 + int.from_bytes(found.adapter[:8], "little")])

    assert status["restarts"] == {"user": 0, "infrastructure": 0}
    assert status["placement"]["worldSize"] == 2
    assert found.eval_loss < status["adapter"]["baseEvalLoss"]
    assert {name: facts["shape"][0] for name, facts in header.items() if name != "__metadata__"} == {
        "prompt_embeddings": tokens
    }
