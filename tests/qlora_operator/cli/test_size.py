"""The size of a model on a machine that need not be here. What the trainer reads of it is tested with the trainer."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_contract.memory import ModelShape
from qlora_contract.plan import Machine, ModelSize
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli import size
from qlora_operator.cli.size import Imagined, imagined_of, is_model, machine_of, size_of_job, size_of_model
from qlora_operator.errors import CommandError

pytestmark = pytest.mark.process

GIB = 2**30
QWEN_7B = ModelShape(
    hidden=3584,
    intermediate=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    head_size=128,
    vocabulary=152064,
    tied=False,
    stored_bytes=2,
    linear_weights=6_525_288_448,
    largest_linear=67_895_296,
    adapter_weights=40_370_176,
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources whose size was asked for; it is always that of a 7B."""
    sources: list[str] = []

    def query_size(run: Any, _: Any) -> ModelSize:
        sources.append(run.model.source)
        dtype = "bf16" if run.isa in ("amx_bf16", "avx512_bf16") else "fp32"
        return ModelSize(compute_dtype=dtype, shape=QWEN_7B, download=15 * GIB, basis="config.json")

    monkeypatch.setattr(size, "query_size", query_size)
    return sources


def shown(plan: size.SizePlan) -> str:
    """What a user sees."""
    out = io.StringIO()
    size.show(plan, Console(file=out, width=200, highlight=False))
    return out.getvalue()


def test_a_server_that_is_not_here_is_planned_for(asked: list[str]) -> None:
    """A rank for each NUMA cluster, all its CPUs, and what the job would have to say."""
    plan = size_of_model("hf://Qwen/Qwen2.5-7B", imagined_of(64, "256Gi", "amx_bf16", 4), 1_000_000)

    assert asked == ["hf://Qwen/Qwen2.5-7B"]
    assert (plan.ranks, plan.cpus_per_rank, plan.isa, plan.exit_code) == (4, 16, "amx_bf16", 0)
    assert plan.needs.total * plan.ranks < 256 * GIB
    out = shown(plan)
    assert "hf://Qwen/Qwen2.5-7B: 7.62 billion weights, 15.0 GiB in files (from config.json)\n" in out
    assert "machine   64 CPUs, 256 GiB, amx_bf16, computing in bf16\n" in out
    assert "ranksPerPod: 4, cpusPerRank: 16, memoryPerRank: " in out
    assert plan.time.basis in out


def test_ranks_are_as_many_as_memory_holds(asked: list[str]) -> None:
    """Eight clusters without room for what each rank has for itself make fewer ranks, and none too large."""
    plan = size_of_model("hf://org/name", imagined_of(64, "8Gi", "amx_bf16", 8), 1000)

    assert 1 <= plan.ranks < 8
    assert plan.needs.total <= plan.memory_per_rank
    assert plan.problems == []


def test_a_machine_that_is_too_small_is_a_problem(asked: list[str]) -> None:
    """It says what one rank needs, and the exit code is that of a job that does not fit."""
    plan = size_of_model("hf://org/name", imagined_of(4, "4Gi", "avx2", None), 1000)

    assert plan.exit_code == 10
    assert "problem: one rank needs " in shown(plan)


def test_a_job_has_its_own_settings(asked: list[str], a_job: Callable[..., QLoRAJob]) -> None:
    """Ranks, memory and tier as written, held against the machine that is named."""
    topology = {"ranksPerPod": 2, "cpusPerRank": 8, "memoryPerRank": "8Gi", "pinning": "strict"}
    fits = size_of_job(a_job(topology=topology), {}, imagined_of(16, "64Gi", "amx_bf16", 2), 1000)
    small = size_of_job(a_job(topology=topology), {}, imagined_of(8, "8Gi", "amx_bf16", 2), 1000)

    assert (fits.ranks, fits.cpus_per_rank, fits.memory_per_rank) == (2, 8, 8 * GIB)
    assert [problem.partition(":")[0] for problem in fits.problems] == []
    assert len(small.problems) == 2
    assert small.exit_code == 10


def test_what_is_not_said_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One option changes one thing."""
    here = machine_of(Imagined())

    assert isinstance(here, Machine)
    assert machine_of(imagined_of(None, "256Gi", None, None)) == here.model_copy(
        update={"memory": 256 * GIB, "free_memory": 256 * GIB}
    )
    told = machine_of(imagined_of(6, None, "avx512", None))
    assert (told.cpus, told.tiers) == (list(range(6)), ["avx512", "avx2"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param((0, None, None, None), "--cpus 0: must be from 1", id="no CPU"),
        pytest.param((4, None, None, 8), "--numa-nodes 8: there are only 4 CPUs", id="more nodes than CPUs"),
        pytest.param((4, "lots", None, None), "--memory lots: must be a size such as 256Gi", id="no size"),
        pytest.param((4, None, "sse", None), "--isa sse: must be one of amx_bf16, ", id="no tier"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(options: tuple[Any, ...], message: str) -> None:
    """Each with the option's name, as wrong usage."""
    with pytest.raises(CommandError, match=message) as refused:
        imagined_of(*options)

    assert refused.value.code == 2


def test_a_model_is_told_from_a_job(tmp_path: Path) -> None:
    """By its scheme, or by its config.json."""
    (tmp_path / "job.yaml").touch()
    assert is_model("hf://org/name")
    assert not is_model(str(tmp_path))
    assert not is_model(str(tmp_path / "job.yaml"))
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert is_model(str(tmp_path))
