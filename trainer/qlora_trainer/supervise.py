"""The ranks of a pod: started with their CPUs, watched over, ended when their time is over.

Nothing here imports torch: a process that waits shall be small.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from qlora_contract.exit_codes import COLLATERAL_DELAY_SECONDS
from qlora_contract.run import RunConfig
from qlora_trainer import births, report
from qlora_trainer.births import Process
from qlora_trainer.topology.layout import RankPlace

GRACE_MARGIN_SECONDS = 5.0
"""Kept of the grace period for the launcher's own end."""
PATIENCE_MARGIN_SECONDS = 30.0
"""What ranks get beyond their own heartbeat's time-out to notice that a rank here has died."""
KILL_DELAY_SECONDS = 10.0
"""From SIGTERM to SIGKILL for ranks that outlived the patience: without peers they can save nothing."""
POLL_SECONDS = 0.1
DRAIN_SECONDS = 5.0
"""How long to wait for the last output of ranks that have ended."""
LONGEST_LINE = 65_536
"""Bytes; a longer line is passed on in parts."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


# --- starting them


@dataclass(eq=False)
class Rank:
    """One rank's process and what became of it."""

    rank: int
    process: Process
    report: Path
    pumps: list[threading.Thread] = field(default_factory=list)
    last_error: str = ""
    """The last line it wrote to stderr that was not blank."""
    forced: bool = False
    """The launcher ended it because its time was over, so its end is no cause."""

    @property
    def lives(self) -> bool:
        """Whether it still runs; keeps its exit code when it does not."""
        return self.process.poll() is None


def start_ranks(
    command: Sequence[str],
    environments: Sequence[dict[str, str]],
    places: Sequence[RankPlace],
    folder: Path,
    stop: "Stop | None" = None,
) -> list[Rank]:
    """Start one process per environment, bound to its place, its output passed on line by line.

    Raises:
        births.BirthError: there is no process; when `stop` came first, too.
    """
    reports = [folder / f"rank-{local}.json" for local in range(len(places))]
    told = [
        {**environment, report.REPORT_ENV: str(path)}
        for environment, path in zip(environments, reports, strict=True)
    ]
    processes = births.fork(command, told, places, lambda: stop is not None and stop.at is not None)
    ranks = [
        Rank(int(environment["RANK"]), process, path)
        for environment, process, path in zip(told, processes, reports, strict=True)
    ]
    for rank in ranks:
        _pump(rank)
    return ranks


def die_with_parent(signal_number: int) -> None:
    """The kernel sends this process the signal when the thread that started it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)


_output = threading.Lock()


def _pump(rank: Rank) -> None:
    """Pass a rank's output on, each line with its prefix, by a thread per stream."""
    streams = ((rank.process.stdout, sys.stdout.buffer), (rank.process.stderr, sys.stderr.buffer))
    for source, sink in streams:
        remember = source is rank.process.stderr
        thread = threading.Thread(target=_pass_on, args=(rank, source, sink, remember), daemon=True)
        thread.start()
        rank.pumps.append(thread)


def _pass_on(rank: Rank, source: IO[bytes], sink: IO[bytes], remember: bool) -> None:
    prefix = f"[rank {rank.rank}] ".encode()
    with source:
        for line in iter(lambda: source.readline(LONGEST_LINE), b""):
            if remember and line.strip():
                rank.last_error = line.decode(errors="replace").strip()
            _write(sink, prefix + line if line.endswith(b"\n") else prefix + line + b"\n")


def _write(sink: IO[bytes], line: bytes) -> None:
    try:
        with _output:
            sink.write(line)
            sink.flush()
    except (OSError, ValueError):
        pass  # nobody reads any more; go on reading, or the rank would block


# --- watching over them


@dataclass(frozen=True)
class Limits:
    """Seconds that ranks may go on for."""

    grace: float
    """After the launcher was told to stop."""
    patience: float
    """After the first rank of this pod died; peers have a heartbeat of their own, which comes first."""
    kill_delay: float = KILL_DELAY_SECONDS
    """After the patience ended and they were told to stop."""


def limits_of(run: RunConfig) -> Limits:
    """The limits of a run."""
    period = float(run.termination_grace_period_seconds)
    return Limits(
        grace=max(period - GRACE_MARGIN_SECONDS, period / 2),
        patience=COLLATERAL_DELAY_SECONDS + run.distributed.timeout_seconds + PATIENCE_MARGIN_SECONDS,
    )


@dataclass
class Stop:
    """Whether, and when, the launcher was told to stop. Further signals change nothing."""

    at: float | None = None

    def __call__(self, *_: object) -> None:
        """A signal handler; also called when there is another reason to stop."""
        self.at = time.monotonic() if self.at is None else self.at


def action(
    now: float, stopped_at: float | None, died_at: float | None, limits: Limits
) -> Literal["wait", "terminate", "kill"]:
    """What the living ranks are due. Times are of one monotonic clock, in seconds; None: not yet."""
    patient_until = None if died_at is None else died_at + limits.patience
    if stopped_at is not None and now >= stopped_at + limits.grace:
        return "kill"
    if patient_until is not None and now >= patient_until + limits.kill_delay:
        return "kill"
    if stopped_at is not None or (patient_until is not None and now >= patient_until):
        return "terminate"
    return "wait"


def watch(ranks: list[Rank], limits: Limits, stop: Stop) -> list[Rank]:
    """Wait until every rank has ended, and see to it that it comes to that.

    Returns the ranks in the order in which they ended.
    """
    ended: list[Rank] = []
    died_at: float | None = None
    told = False
    while True:
        ended += [rank for rank in ranks if rank not in ended and not rank.lives]
        living = [rank for rank in ranks if rank not in ended]
        if not living:
            break
        if died_at is None and any(rank.process.returncode for rank in ended):
            died_at = time.monotonic()
            say(f"a rank has died; the others have {limits.patience:.0f} s to notice and end")
        due = action(time.monotonic(), stop.at, died_at, limits)
        if due == "terminate" and not told:
            told = True
            _tell(living, forced=stop.at is None)
        if due == "kill":
            for rank in living:
                _kill(rank)
        time.sleep(POLL_SECONDS)
    _drain(ranks)
    return ended


def _tell(ranks: list[Rank], *, forced: bool) -> None:
    say("sends SIGTERM to the ranks that still run")
    for rank in ranks:
        rank.forced = forced
        rank.process.send_signal(signal.SIGTERM)


def _drain(ranks: list[Rank]) -> None:
    """Let the last output through; something that a rank started may hold its pipe open."""
    deadline = time.monotonic() + DRAIN_SECONDS
    for rank in ranks:
        for thread in rank.pumps:
            thread.join(max(0.0, deadline - time.monotonic()))


def _kill(rank: Rank) -> None:
    """SIGKILL to a rank and to whatever it started."""
    if rank.lives:
        rank.forced = True
        os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.wait()


def say(text: str) -> None:
    """A line of the launcher's own in the log."""
    _write(sys.stderr.buffer, f"launcher: {text}\n".encode(errors="replace"))
