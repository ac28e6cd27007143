"""A rank's surroundings, and how ranks exchange numbers."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_trainer.training.context import RankContext, ReducedScalars

pytestmark = pytest.mark.process


def test_one_rank_gets_its_own_numbers_back(alone: RankContext) -> None:
    """Sums keep their names, and nobody stops."""
    reduced = alone.all_reduce_scalars({"loss": 1.5, "tokens": 2.0**53}, local={"memory": 7.0})

    assert reduced == ReducedScalars(
        stop_requested=False, sums={"loss": 1.5, "tokens": 2.0**53}, per_rank={"memory": [7.0]}
    )


def test_a_signal_is_seen_through_an_all_reduce(alone: RankContext) -> None:
    """Once asked to stop, the next exchange says so."""
    alone.stop.set()

    assert alone.all_reduce_scalars({}).stop_requested


RANK = """
import os, pathlib, sys
from qlora_trainer.distributed import Group, World
from qlora_trainer.run_file import load_run
from qlora_trainer.storage.job_folder import JobFolder
from qlora_trainer.training.context import RankContext

run = load_run(pathlib.Path(sys.argv[1]))
world = World.from_environ(os.environ)
with Group.open(world, "gloo", 60, 60) as group:
    context = RankContext(run, group, JobFolder(pathlib.Path("unused"), run))
    own = {"memory": 10.0 + world.rank, "adapter": 20.0 + world.rank}
    before = context.all_reduce_scalars({"loss": world.rank + 0.5, "tokens": 2.0**52}, own)
    if world.rank == 1:
        context.stop.set()
    print([before, context.all_reduce_scalars({}).stop_requested, context.is_rank_zero])
    group.barrier()
"""


def test_ranks_exchange_sums_own_numbers_and_requests_to_stop(alone: RankContext, tmp_path: Path) -> None:
    """All ranks get the same sums in fp64, each rank's own number, and stop when any one is asked to."""
    run_json = tmp_path / "run.json"
    run_json.write_text(alone.run.to_json())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(run_json)], text=True, stdout=subprocess.PIPE,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        printed = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    reduced = ReducedScalars(
        stop_requested=False,
        sums={"loss": 2.0, "tokens": 2.0**53},
        per_rank={"memory": [10.0, 11.0], "adapter": [20.0, 21.0]},
    )

    assert printed == [f"[{reduced}, True, True]", f"[{reduced}, True, False]"]


def test_a_rank_reports_where_it_runs_and_what_it_took(alone: RankContext) -> None:
    """Host, CPUs and threads are this process's own; memory above the imports is part of the peak."""
    alone.tokens_trained = 17
    stats = alone.rank_stats()

    assert stats["host"] == socket.gethostname()
    assert stats["threads"] == torch.get_num_threads()
    assert stats["tokens"] == 17
    assert stats["cpus"] == alone.rank_info().cpus
    assert stats["peak_memory_bytes"] >= stats["peak_anonymous_bytes"] >= stats["imports_bytes"] > 0
    assert stats["peak_above_imports_bytes"] == stats["peak_anonymous_bytes"] - stats["imports_bytes"]


@pytest.mark.parametrize("attempt", [0, 3])
def test_the_live_report_begins_with_the_attempt(alone: RankContext, attempt: int) -> None:
    """Before anything is known it says which attempt at which job this is."""
    job = alone.run.job.model_copy(update={"attempt": attempt})
    run = alone.run.model_copy(update={"job": job})
    report = RankContext(run, alone.group, alone.folder).progress.report

    assert (report.job_uid, report.attempt, report.stage, report.step) == (job.uid, attempt, "Starting", 0)
