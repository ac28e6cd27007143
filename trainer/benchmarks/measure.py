"""Run a command and measure the memory of all its processes, from its start to its end.

Memory is the proportional set size (PSS) of `/proc/<pid>/smaps_rollup`, summed
over the command and every process it started: a page that two processes share
counts once, half for each, which a sum of resident set sizes would count twice.
File-backed PSS is told apart, since it is page cache that the kernel can drop.

    python trainer/benchmarks/measure.py [--interval 0.05] [--timeout SECONDS] -- COMMAND [ARGUMENT ...]
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
DUTY = 0.05
"""Share of the time that sampling may take at most: reading smaps_rollup holds the process's memory map."""


class Process(NamedTuple):
    """A process that cannot be mistaken for a later one of the same id."""

    pid: int
    start: int
    """Clock ticks between boot and its start."""


@dataclass(frozen=True)
class Memory:
    """Proportional set size in bytes, and the kinds of pages it consists of."""

    pss: int = 0
    anon: int = 0
    file: int = 0
    shmem: int = 0

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(
            self.pss + other.pss, self.anon + other.anon, self.file + other.file, self.shmem + other.shmem
        )


@dataclass(frozen=True)
class Measurement:
    """What a command took."""

    exit_code: int
    """As subprocess gives it: negative for a death by signal."""
    wall_seconds: float
    peak: Memory
    """The sample with the largest sum of PSS."""
    peak_private: int
    """Bytes: the largest sum of anonymous and shared-memory PSS, which the kernel cannot drop."""
    samples: int
    timed_out: bool = False


def process_table() -> dict[Process, int]:
    """Every process there is, with its parent's id."""
    table = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The name in parentheses may contain anything; the fields after the last one are numbers.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                table[Process(int(entry.name), int(fields[19]))] = int(fields[1])
    return table


def grow(members: frozenset[Process], table: Mapping[Process, int]) -> frozenset[Process]:
    """The members still alive and all their descendants.

    A process once seen stays a member when its parent dies and it gets another.
    """
    alive = {process for process in members if process in table}
    while True:
        pids = {process.pid for process in alive}
        born = {process for process, parent in table.items() if parent in pids} - alive
        if not born:
            return frozenset(alive)
        alive |= born


def memory(pid: int) -> Memory:
    """One process's memory; zero when it has ended or may not be read."""
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return Memory()
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return Memory(
        sizes.get("Pss", 0), sizes.get("Pss_Anon", 0), sizes.get("Pss_File", 0), sizes.get("Pss_Shmem", 0)
    )


def measure(
    command: Sequence[str],
    *,
    interval: float = 0.05,
    timeout: float | None = None,
    environ: Mapping[str, str] | None = None,
    stdout: Path | None = None,
    stderr: Path | None = None,
) -> Measurement:
    """Run a command to its end and sample the memory of its process tree.

    Samples are `interval` seconds apart, or farther if they would take more
    than DUTY of the time. After `timeout` seconds every process of the tree is
    killed; the same happens to what outlives the command. Raises OSError when
    the command cannot be started.
    """
    with contextlib.ExitStack() as files:
        out = files.enter_context(stdout.open("wb")) if stdout else None
        err = files.enter_context(stderr.open("wb")) if stderr else None
        begin = time.monotonic()
        child = subprocess.Popen(command, stdout=out, stderr=err, env=environ)
        try:
            return _watch(child, begin, interval, timeout)
        except BaseException:
            child.kill()
            child.wait()
            raise


def _watch(
    child: subprocess.Popen[bytes], begin: float, interval: float, timeout: float | None
) -> Measurement:
    members = frozenset(process for process in process_table() if process.pid == child.pid)
    peak, peak_private, samples, timed_out = Memory(), 0, 0, False
    while child.poll() is None:
        started = time.monotonic()
        members = grow(members, process_table())
        now = sum((memory(process.pid) for process in members), Memory())
        peak = max(peak, now, key=lambda sample: sample.pss)
        peak_private = max(peak_private, now.anon + now.shmem)
        samples += 1
        if timeout is not None and started - begin > timeout:
            timed_out = True
            _kill(members)
        cost = time.monotonic() - started
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(interval - cost, cost / DUTY))
    wall = time.monotonic() - begin
    _kill(grow(members, process_table()))
    return Measurement(child.returncode, wall, peak, peak_private, samples, timed_out)


def _kill(members: frozenset[Process]) -> None:
    for process in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def main() -> int:
    """Run the command of the command line; a JSON line on standard error says what it took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between samples")
    parser.add_argument("--timeout", type=float, help="seconds after which the whole tree is killed")
    parser.add_argument("command", nargs="+", help="the command, after --")
    arguments = parser.parse_args()
    result = measure(arguments.command, interval=arguments.interval, timeout=arguments.timeout)
    print(json.dumps(asdict(result)), file=sys.stderr)
    return 128 - result.exit_code if result.exit_code < 0 else result.exit_code


if __name__ == "__main__":
    sys.exit(main())
