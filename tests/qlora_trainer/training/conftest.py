"""A rank's surroundings without other ranks, and a job so small that it is set up and trained in a test."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from qlora_contract.run_config import RunConfig
from qlora_trainer.distributed import Group, World
from qlora_trainer.run_file import load_run
from qlora_trainer.storage.job_folder import JobFolder
from qlora_trainer.training.context import RankContext

RELEASE = Path(__file__).parents[2] / "releases" / "0.1.0" / "checkpoint"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums are added up in the same order each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def a_context(tmp_path: Path, a_run: Callable[..., RunConfig]) -> Callable[..., RankContext]:
    """make(volumes=..., **fields of the run) -> the context of the only rank of a job."""

    def make(volumes: dict[str, Path] | None = None, **fields: Any) -> RankContext:
        run = a_run(1, **fields)
        world = World(rank=0, size=1, local_rank=0, master_addr="127.0.0.1", master_port=1)
        folder = JobFolder(tmp_path / "job", run)
        return RankContext(run, Group(world, HashStore()), folder, volumes=volumes or {})

    return make


@pytest.fixture
def alone(a_context: Callable[..., RankContext]) -> RankContext:
    """The only rank of a job."""
    return a_context()


SMALL: dict[str, Any] = {
    "model": {"source": "pvc://smoke/model"},
    "dataset": {"source": "pvc://smoke/data.jsonl", "evalFraction": 0.2},
    "adapter": {"rank": 2, "alpha": 8.0},
    "training": {
        "maxSteps": 3, "globalBatchTokens": 500, "maxSequenceLength": 96, "learningRate": 0.003, "computeDtype": "fp32"
    },
    "evaluation": {"prompts": 0},  # which takes as long as the rest, and is tested apart
    "layout": {"memoryPerRank": 2**33},
}  # fmt: skip


@pytest.fixture
def ready(
    a_context: Callable[..., RankContext], smoke_folder: Path, tmp_path: Path
) -> Callable[..., RankContext]:
    """make(**sections) -> the context of a small job that is ready to train; `sections` are merged into SMALL's."""

    def make(**sections: Any) -> RankContext:
        merged = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}}
        context = a_context({"smoke": smoke_folder, "team": tmp_path}, **merged)
        context.folder.acquire()
        return context

    return make


@pytest.fixture
def begun_by_the_release_before(tmp_path: Path, smoke_folder: Path) -> RankContext:
    """The second attempt at a job that release 0.1.0 began, and was killed after a checkpoint of step 4."""
    shutil.copytree(smoke_folder, tmp_path / "smoke")
    run = load_run(RELEASE / "run.json")
    run = run.model_copy(update={"job": run.job.model_copy(update={"attempt": 1})})
    folder = JobFolder(tmp_path / "begun", run)
    shutil.copytree(RELEASE / "begun", folder.path)
    folder.acquire()
    world = World(rank=0, size=1, local_rank=0, master_addr="127.0.0.1", master_port=1)
    return RankContext(run, Group(world, HashStore()), folder, volumes={"team": tmp_path})
