"""What a rank works with from its start to its end, and how the ranks agree on numbers."""

import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from qlora_contract.cpus import format_cpu_list
from qlora_contract.progress import RankFacts
from qlora_contract.run_config import RunConfig
from qlora_trainer.distributed import Group, World
from qlora_trainer.host.cgroups import memory_current_and_peak
from qlora_trainer.host.isa import probe_isa
from qlora_trainer.host.memory_sampler import MemorySampler
from qlora_trainer.host.numa import read_machine
from qlora_trainer.storage.job_folder import JobFolder
from qlora_trainer.telemetry.progress import Progress, Rate, starting_report
from qlora_trainer.training.books import Books
from qlora_trainer.training.tracking import Tracking


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """A rank was asked to stop, and all ranks know it: each raises this at the same place."""


class StopHere(Exception):  # noqa: N818
    """This rank leaves where it is, because it or another one was asked to stop: there is nothing to agree on yet."""


@dataclass(frozen=True)
class ReducedScalars:
    """Numbers of all ranks, the same on each of them."""

    stop_requested: bool
    """A rank was asked to stop."""
    sums: dict[str, float]
    """By name, over all ranks."""
    per_rank: dict[str, list[float]]
    """By name, each rank's own number, in rank order."""


STUCK_FACTOR = 2
"""Limit of one collective, in units of progressDeadlineSeconds: of one that waits for nobody in particular. Dead and
stopped peers are the heartbeat's business, one that hangs finds out by itself, and one that is slow may be so."""


def collective_seconds(run: RunConfig) -> float:
    """How long a rank waits for the others in one collective, before it fails."""
    return max(STUCK_FACTOR * run.progress_deadline_seconds, run.distributed.timeout_seconds)


@dataclass
class RankContext:
    """One rank's job, its peers, and what it reports to."""

    run: RunConfig
    group: Group
    folder: JobFolder
    volumes: Mapping[str, Path] = field(default_factory=dict)
    """Claim -> directory with `qlora run`; empty in a pod, where claims are mounted."""
    isa: str = field(default_factory=probe_isa)
    """The best tier that this processor meets."""
    memory: MemorySampler = field(default_factory=MemorySampler)
    rate: Rate = field(default_factory=Rate)
    stop: threading.Event = field(default_factory=threading.Event)
    """Set on all ranks, within moments, by SIGTERM to any one. Once there is something to save, it is acted on through
    `all_reduce_scalars` alone, so that all ranks do at the same place."""
    tokens_trained: int = 0
    """By this rank, in this attempt."""
    mapped_bytes: int = 0
    """Of the base, if the ranks of this pod map it."""
    progress: Progress = field(init=False)
    """The live report; rank 0 serves it."""
    tracking: Tracking | None = None
    """Of rank 0, from its first step on."""
    books: Books = field(init=False)
    """What this attempt takes; rank 0 writes it."""

    def __post_init__(self) -> None:
        self.progress = Progress(starting_report(self.run))
        self.books = Books(self.folder)

    @property
    def world(self) -> World:
        """This rank's number among how many."""
        return self.group.world

    @property
    def is_rank_zero(self) -> bool:
        """Rank 0 alone writes files and reports."""
        return self.world.rank == 0

    def advance(self, amount: int) -> None:
        """Count what was just done by work that may be left at any moment. Raises StopHere when asked to stop."""
        self.progress.advance(amount)
        if self.stop.is_set():
            raise StopHere

    def rank_info(self) -> RankFacts:
        """Where this rank runs, for the live report."""
        cpus = os.sched_getaffinity(0)
        return RankFacts(
            rank=self.world.rank,
            host=socket.gethostname(),
            isa=self.isa,
            cpus=format_cpu_list(cpus),
            threads=torch.get_num_threads(),
            pod=self.world.pod,
            nodes=format_cpu_list(read_machine().nodes_of(cpus)),
        )

    def rank_stats(self) -> dict[str, Any]:
        """`rank_info`, and the tokens and peak memory (bytes) of this attempt, for training_report.json."""
        self.memory.sample()
        _, cgroup_peak = memory_current_and_peak()
        return {
            **self.rank_info().model_dump(by_alias=False),
            "tokens": self.tokens_trained,
            "peak_memory_bytes": self.memory.peak_total,
            "peak_anonymous_bytes": self.memory.peak_needed,
            "peak_above_imports_bytes": self.memory.peak_needed - self.memory.baseline.needed,
            "imports_bytes": self.memory.baseline.needed,
            "mapped_model_bytes": self.mapped_bytes,
            "cgroup_peak_bytes": cgroup_peak,
        }

    def all_reduce_scalars(
        self, sums: Mapping[str, float], local: Mapping[str, float] = MappingProxyType({})
    ) -> ReducedScalars:
        """Exchange a few numbers with all ranks, in one all-reduce in fp64: counts stay exact up to 2^53.

        Args:
            sums: numbers to add up over all ranks. Every rank has the same names in the same order.
            local: numbers of this rank's own, which all ranks learn. Names as of `sums`.
        """
        size = self.world.size
        own = 1 + len(sums)  # where the ranks' own numbers begin: all of a name, then of the next
        vector = torch.zeros(own + size * len(local), dtype=torch.float64)
        vector[0] = float(self.stop.is_set())
        vector[1:own] = torch.tensor(list(sums.values()), dtype=torch.float64)
        vector[own + self.world.rank :: size] = torch.tensor(list(local.values()), dtype=torch.float64)
        self.group.all_reduce_sum(vector)
        numbers: list[float] = vector.tolist()
        return ReducedScalars(
            stop_requested=numbers[0] > 0,
            sums=dict(zip(sums, numbers[1:own], strict=True)),
            per_rank={name: numbers[own + n * size : own + (n + 1) * size] for n, name in enumerate(local)},
        )
