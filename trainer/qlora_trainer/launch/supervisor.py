"""The ranks of a pod while they run: their output passed on, their ends noticed, those that hang ended.

Nothing here imports torch: the launcher waits beside the ranks and should be small.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from qlora_contract.exit_codes import COLLATERAL_DELAY_SECONDS
from qlora_contract.run_config import RunConfig
from qlora_contract.supervision import Limits, next_action
from qlora_contract.units import now
from qlora_trainer.host.process import is_stopped
from qlora_trainer.launch.cpu_layout import CpuAssignment
from qlora_trainer.launch.fork_server import ForkedProcess, fork_ranks
from qlora_trainer.telemetry.stall_watch import STACKS_SIGNAL, Idleness, last_sign, turn_seconds
from qlora_trainer.telemetry.termination import REPORT_ENV

GRACE_MARGIN_SECONDS = 5.0
"""Part of the grace period that the launcher keeps to report and exit."""
PEER_LOSS_MARGIN_SECONDS = 30.0
"""How much longer than the ranks themselves need to leave survivors of a rank that has ended may take. Not the
heartbeat's timeout: a rank that has ended closes its connections, or was told by the others who is lost, so that all
hear of it at once."""
STACKS_SECONDS = 2.0
"""How long a rank that hangs has to write where, before it is killed."""
POLL_SECONDS = 0.1
DRAIN_SECONDS = 5.0
"""How long to wait for the last output of ranks that have exited."""
MAX_LINE_BYTES = 65_536
"""A longer line is passed on in parts."""


# --- starting them


@dataclass(eq=False)
class Rank:
    """One rank's process, and what became of it."""

    rank: int
    process: ForkedProcess
    report: Path
    """Where it leaves its TerminationReport."""
    output_threads: list[threading.Thread] = field(default_factory=list)
    last_error: str = ""
    """The last line it wrote to stderr that was not blank."""
    killed_by_launcher: bool = False
    """The launcher ended it because its time was over, so its end is not a cause."""
    hung_at: float | None = None
    """When its launcher found that it hangs, on the monotonic clock."""

    @property
    def is_alive(self) -> bool:
        """Whether it still runs. Keeps the exit code when it does not."""
        return self.process.poll() is None


def start_ranks(
    command: Sequence[str],
    environments: Sequence[dict[str, str]],
    assignments: Sequence[CpuAssignment],
    folder: Path,
    stopping: Callable[[], bool] = lambda: False,
) -> list[Rank]:
    """Start one process per environment on its CPUs, its output passed on line by line.

    Args:
        command: what a rank runs, as `python -m MODULE` or `python SCRIPT`.
        environments: the whole environment of each rank; RANK among it.
        assignments: the CPUs of each rank.
        folder: where ranks leave their reports.
        stopping: asked while they start; True: give up.

    Raises:
        SpawnError: no rank was started, or `stopping` became true before.
    """
    reports = [folder / f"rank-{local}.json" for local in range(len(assignments))]
    with_reports = [
        {**environment, REPORT_ENV: str(path)}
        for environment, path in zip(environments, reports, strict=True)
    ]
    processes = fork_ranks(command, with_reports, assignments, stopping)
    ranks = [
        Rank(int(environment["RANK"]), process, path)
        for environment, process, path in zip(with_reports, processes, reports, strict=True)
    ]
    for rank in ranks:
        for source, sink in (
            (rank.process.stdout, sys.stdout.buffer),
            (rank.process.stderr, sys.stderr.buffer),
        ):
            thread = threading.Thread(target=_pass_on, args=(rank, source, sink), daemon=True)
            thread.start()
            rank.output_threads.append(thread)
    return ranks


# --- their output, and our own

_output_lock = threading.Lock()


def log(text: str) -> None:
    """Write a line of the launcher's own to stderr."""
    _write(sys.stderr.buffer, f"launcher: {text}\n".encode(errors="replace"))


def _pass_on(rank: Rank, source: IO[bytes], sink: IO[bytes]) -> None:
    """Copy one stream of a rank, each line with the rank's number, until it is closed."""
    prefix = f"[rank {rank.rank}] ".encode()
    with source:
        for line in iter(lambda: source.readline(MAX_LINE_BYTES), b""):
            if source is rank.process.stderr and line.strip():
                rank.last_error = line.decode(errors="replace").strip()
            _write(sink, prefix + line if line.endswith(b"\n") else prefix + line + b"\n")


def _write(sink: IO[bytes], line: bytes) -> None:
    """Write a line with the time. A log is read long after, beside those of other pods."""
    try:
        with _output_lock:
            sink.write(f"{now()} ".encode() + line)
            sink.flush()
    except (OSError, ValueError):
        pass  # the reader is gone; keep reading, or the rank would block


# --- watching over them


def limits_of(run: RunConfig) -> Limits:
    """How long the ranks of a run may continue after a stop or a death."""
    period = float(run.termination_grace_period_seconds)
    return Limits(
        grace=max(period - GRACE_MARGIN_SECONDS, period / 2),
        peer_loss=COLLATERAL_DELAY_SECONDS + PEER_LOSS_MARGIN_SECONDS,
    )


@dataclass
class Stop:
    """Whether, and when, the launcher was asked to stop. A signal handler; further signals change nothing."""

    requested_at: float | None = None
    """On the monotonic clock."""

    def __call__(self, *_: object) -> None:
        """Request the stop."""
        self.requested_at = time.monotonic() if self.requested_at is None else self.requested_at

    @property
    def is_requested(self) -> bool:
        """Whether to stop."""
        return self.requested_at is not None


class HangWatch:
    """Ends ranks that hang and keep their interpreter's lock, so that their own watch stands still, too."""

    def __init__(self, ranks: Sequence[Rank], limit: float) -> None:
        """`limit`: for how many seconds a rank may show no life, once it has begun to."""
        self._limit, self._next = limit, 0.0
        self._idle = {rank: Idleness(limit, time.monotonic()) for rank in ranks}

    def end_hung(self, alive: Sequence[Rank]) -> None:
        """Have those of these that hang write where, then kill them. To be called often."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + turn_seconds(self._limit)
            for rank in alive:
                if self._hangs(rank) and rank.hung_at is None:
                    log(
                        f"rank {rank.rank} hangs; it has {STACKS_SECONDS:.0f} s to write where, and is killed then"
                    )
                    rank.hung_at = now
                    rank.process.send_signal(STACKS_SIGNAL)
        for rank in alive:
            if rank.hung_at is not None and now > rank.hung_at + STACKS_SECONDS:
                _kill(rank)

    def _hangs(self, rank: Rank) -> bool:
        sign = last_sign(rank.report)
        excused = sign is None or is_stopped(rank.process.pid)
        return self._idle[rank].stalled(time.monotonic(), sign or 0, excused)


def watch(ranks: Sequence[Rank], limits: Limits, stop: Stop, stall_limit: float = math.inf) -> list[Rank]:
    """Wait until every rank has exited; end those that outlive the limits, and those that hang.

    Args:
        ranks: that have been started.
        limits: how long they may go on after a stop or a death.
        stop: set when the launcher is asked to stop.
        stall_limit: for how many seconds a rank may show no life.

    Returns:
        The ranks in the order in which they exited.
    """
    exited: list[Rank] = []
    hangs = HangWatch(ranks, stall_limit)
    first_failure_at: float | None = None
    terminated = False
    while True:
        exited += [rank for rank in ranks if rank not in exited and not rank.is_alive]
        alive = [rank for rank in ranks if rank not in exited]
        if not alive:
            break
        if first_failure_at is None and any(rank.process.returncode for rank in exited):
            first_failure_at = time.monotonic()
            log(f"a rank has died; the others have {limits.peer_loss:.0f} s to notice and exit")
        hangs.end_hung(alive)
        action = next_action(time.monotonic(), stop.requested_at, first_failure_at, limits)
        if action == "terminate" and not terminated:
            terminated = True
            log("sends SIGTERM to the ranks that are still running")
            for rank in alive:
                rank.killed_by_launcher = not stop.is_requested
                rank.process.send_signal(signal.SIGTERM)
        if action == "kill":
            for rank in (rank for rank in alive if rank.is_alive):
                rank.killed_by_launcher = rank.hung_at is None
                _kill(rank)
        time.sleep(POLL_SECONDS)
    # Something that a rank started may hold its pipe open for longer.
    drained_by = time.monotonic() + DRAIN_SECONDS
    for rank in ranks:
        for thread in rank.output_threads:
            thread.join(max(0.0, drained_by - time.monotonic()))
    return exited


def _kill(rank: Rank) -> None:
    """Kill a rank, with whatever it started."""
    if rank.is_alive:
        os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.wait()
