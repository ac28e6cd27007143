"""A rank's surroundings, and how ranks agree."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from qlora_contract.progress import ProgressReport
from qlora_contract.run import RunConfig
from qlora_trainer.distributed import Group, World
from qlora_trainer.errors import Diverged
from qlora_trainer.memory_watch import MemoryWatch
from qlora_trainer.outcome import done, failed
from qlora_trainer.progress import Progress
from qlora_trainer.session import Session
from qlora_trainer.storage import JobFolder

RUN = RunConfig.model_validate(
    {
        "job": {"name": "smollm2", "uid": "u-1", "attempt": 0},
        "workspace": "pvc://data/work",
        "model": {"source": "pvc://data/model"},
        "dataset": {"source": "pvc://data/train.jsonl"},
        "training": {"epochs": 1},
        "layout": {"memoryPerRank": 2**30},
        "isa": "avx2",
    }
)
STARTING = ProgressReport(
    job_uid="u-1", attempt=0, stage="Starting", step=0, total_steps=0, epoch=0.0, updated_time="2026-01-01T00:00:00Z"
)  # fmt: skip


@pytest.fixture
def alone(tmp_path: Path) -> Session:
    """The only rank of a job."""
    world = World(rank=0, size=1, local_rank=0, master_addr="127.0.0.1", master_port=1)
    group = Group(world, HashStore())
    folder = JobFolder(tmp_path, RUN)
    return Session(RUN, world, group, {}, folder, Progress(STARTING), MemoryWatch(), "avx2")


def test_one_rank_agrees_with_itself(alone: Session) -> None:
    """Sums and own numbers come back, and nobody stops."""
    assert alone.agree([1.5, 2.0**53], own=7.0) == (False, [1.5, 2.0**53], [7.0])


def test_a_signal_is_seen_through_an_agreement(alone: Session) -> None:
    """Once asked to stop, the next agreement says so."""
    alone.stop.set()

    assert alone.agree([]).stopping


RANK = """
import os, sys
import torch
from qlora_trainer.distributed import Group, World
from qlora_trainer.session import Session

world = World.from_environ(os.environ)
with Group.open(world, "gloo", 60, 60) as group:
    session = Session(None, world, group, {}, None, None, None, "avx2")
    before = session.agree([world.rank + 0.5, 2.0**52], own=10.0 + world.rank)
    if world.rank == 1:
        session.stop.set()
    print([before, session.agree([]).stopping, session.leads])
    group.barrier()
"""


def test_ranks_agree_on_sums_numbers_and_stopping() -> None:
    """All ranks get the same sums in fp64, each rank's own number, and stop when any one is asked to."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], text=True, stdout=subprocess.PIPE,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    agreed = "Agreed(stopping=False, sums=[2.0, 9007199254740992.0], each=[10.0, 11.0])"

    assert said == [f"[{agreed}, True, True]", f"[{agreed}, True, False]"]


def test_a_rank_says_where_it_runs_and_what_it_took(alone: Session) -> None:
    """Host, CPUs and threads are this process's own; memory above the imports is part of the peak."""
    alone.tokens_trained = 17
    facts = alone.facts()

    assert facts["host"] == socket.gethostname()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["tokens"] == 17
    assert facts["cpus"] == alone.place().cpus
    assert facts["peak_memory_bytes"] >= facts["peak_anonymous_bytes"] >= facts["imports_bytes"] > 0
    assert facts["peak_above_imports_bytes"] == facts["peak_anonymous_bytes"] - facts["imports_bytes"]


@pytest.mark.parametrize(
    ("loss", "cause"), [(1.25, "adapter published, eval loss 1.2500"), (None, "adapter published")]
)
def test_a_good_end_says_what_came_of_it(alone: Session, loss: float | None, cause: str) -> None:
    """The termination report has the adapter's place and digest, and the losses that were measured."""
    report = done(
        alone,
        {
            "eval_loss": loss, "steps": 4, "not_bit_exact": None, "compute_dtype": "fp32", "base_eval_loss": 2.0,
            "base_eval_loss_quantized": 2.1, "adapter_sha256": "ab", "world_size": 3,
        },
    )  # fmt: skip

    assert (report.exit_code, report.reason, report.cause) == (0, "DONE", cause)
    assert report.adapter_uri == "pvc://data/work/jobs/smollm2/adapter"
    assert (report.step, report.adapter_sha256, report.eval_loss, report.world_size) == (4, "ab", loss, 3)


def test_a_bad_end_says_how_far_it_came(alone: Session) -> None:
    """Step and compute dtype are those of the live report."""
    alone.progress.update(step=7, compute_dtype="bf16")
    report = failed(Diverged("NaN"), 0, alone)

    assert (report.step, report.compute_dtype, report.checkpoint_step) == (7, "bf16", None)
