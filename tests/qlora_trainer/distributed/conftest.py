"""Several ranks as real processes."""

import multiprocessing
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_operator.cli.processes import free_port
from qlora_trainer.distributed import World

PROCESSES = multiprocessing.get_context("forkserver")
"""Processes that start from one which has imported torch already: seconds less for each."""
PROCESSES.set_forkserver_preload(["qlora_trainer.distributed"])

BEGIN = """
import os
for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{folder}/{name}-{environ['RANK']}", os.O_WRONLY | os.O_CREAT), number)
os.environ.update(environ)
"""


class Ranks:
    """Processes of one world that run the same script; their output is kept."""

    def __init__(self, folder: Path, script: str, size: int, ranks: list[int]) -> None:
        self._folder = folder
        self.port = free_port()
        self.processes = {rank: self._start(script, rank, size) for rank in ranks}

    def _start(self, script: str, rank: int, size: int) -> multiprocessing.process.BaseProcess:
        own = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": self.port}
        environ = {name: str(value) for name, value in own.items()}
        environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        scope = {"folder": str(self._folder), "environ": environ}
        process = PROCESSES.Process(target=exec, args=(BEGIN + textwrap.dedent(script), scope))
        process.start()
        return process

    def outputs(self) -> dict[int, str]:
        """What each rank said, once all have ended."""
        for process in self.processes.values():
            process.join(120)
        return {rank: (self._folder / f"out-{rank}").read_text().strip() for rank in self.processes}


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """Start ranks; none outlives the test."""
    made: list[Ranks] = []

    def start(script: str, size: int, ranks: list[int] | None = None) -> Ranks:
        made.append(Ranks(tmp_path, script, size, list(range(size)) if ranks is None else ranks))
        return made[-1]

    yield start
    for process in (process for each in made for process in each.processes.values()):
        process.kill()
        process.join()


@pytest.fixture
def world() -> Callable[..., World]:
    """Worlds on this machine that share one free port."""
    port = free_port()

    def make(rank: int, size: int, master_addr: str = "127.0.0.1") -> World:
        return World(rank=rank, size=size, local_rank=rank, master_addr=master_addr, master_port=port)

    return make
