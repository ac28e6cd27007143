"""A rank's surroundings without other ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from qlora_contract.run import RunConfig
from qlora_trainer.distributed import Group, World
from qlora_trainer.storage.job_folder import JobFolder
from qlora_trainer.training.context import RankContext


@pytest.fixture
def a_context(tmp_path: Path, a_run: Callable[..., RunConfig]) -> Callable[..., RankContext]:
    """make(**fields of the run) -> the context of the only rank of a job."""

    def make(**fields: Any) -> RankContext:
        run = a_run(1, **fields)
        world = World(rank=0, size=1, local_rank=0, master_addr="127.0.0.1", master_port=1)
        return RankContext(run, Group(world, HashStore()), JobFolder(tmp_path / "job", run))

    return make


@pytest.fixture
def alone(a_context: Callable[..., RankContext]) -> RankContext:
    """The only rank of a job."""
    return a_context()
