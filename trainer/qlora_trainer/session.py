"""What a rank works with from its start to its end."""

import os
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora_contract.cpus import format_cpu_list
from qlora_contract.progress import RankFacts
from qlora_contract.run import RunConfig
from qlora_trainer import cpu
from qlora_trainer.distributed import Group, World
from qlora_trainer.memory_watch import MemoryWatch
from qlora_trainer.progress import Progress, Rate
from qlora_trainer.storage import JobFolder
from qlora_trainer.topology import machine


class Stopping(Exception):  # noqa: N818 - a request, not an error
    """All ranks agreed to leave here because one was asked to."""


@dataclass
class Session:
    """One rank's surroundings."""

    run: RunConfig
    world: World
    group: Group
    volumes: dict[str, Path]
    folder: JobFolder
    progress: Progress
    memory: MemoryWatch
    isa: str
    rate: Rate = field(default_factory=Rate)
    tokens_trained: int = 0
    """By this rank, in this attempt."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set by SIGTERM. Looked at only through `agree`, so that all ranks see it at the same place."""

    @property
    def leads(self) -> bool:
        """Rank 0 writes files and reports."""
        return self.world.rank == 0

    def place(self) -> RankFacts:
        """Where this rank runs, for the live report."""
        cpus = os.sched_getaffinity(0)
        return RankFacts(
            rank=self.world.rank,
            host=socket.gethostname(),
            isa=self.isa,
            cpus=format_cpu_list(cpus),
            threads=torch.get_num_threads(),
            pod=self.world.pod,
            nodes=format_cpu_list(machine.read().nodes_of(cpus)),
        )

    def facts(self) -> dict[str, Any]:
        """Where this rank ran, what it did and what it took, for training_report.json."""
        self.memory.sample()
        _, cgroup_peak = cpu.memory_current_and_peak()
        return {
            **self.place().model_dump(by_alias=False),
            "tokens": self.tokens_trained,
            "peak_memory_bytes": self.memory.peak_total,
            "peak_anonymous_bytes": self.memory.peak_needed,
            "peak_above_imports_bytes": self.memory.peak_needed - self.memory.baseline.needed,
            "imports_bytes": self.memory.baseline.needed,
            "cgroup_peak_bytes": cgroup_peak,
        }

    def agree(self, sums: list[float], own: float = 0.0) -> "Agreed":
        """Sum `sums` over all ranks in fp64 (counts stay exact up to 2^53), and gather each rank's `own`."""
        vector = torch.zeros(1 + len(sums) + self.world.size, dtype=torch.float64)
        vector[0] = float(self.stop.is_set())
        vector[1 : 1 + len(sums)] = torch.tensor(sums, dtype=torch.float64)
        vector[1 + len(sums) + self.world.rank] = own
        self.group.all_reduce_sum(vector)
        numbers: list[float] = vector.tolist()
        return Agreed(numbers[0] > 0, numbers[1 : 1 + len(sums)], numbers[1 + len(sums) :])


class Agreed(NamedTuple):
    """What all ranks know alike."""

    stopping: bool
    """A rank was asked to stop."""
    sums: list[float]
    each: list[float]
    """Every rank's own number."""
