"""How much of the machine do two ranks use, pinned as planned, and not pinned?

What two ranks could do at best is what two jobs of one rank do side by side, each on its half of the CPUs: they share
memory and power, and never wait for each other. All runs have the same tokens per rank and step, and take turns.

    python trainer/benchmarks/pinning.py [FOLDER] [--rounds 3] [--steps 12] [--tokens 512]

FOLDER has what demo/model.py and demo/data.py write, in model/ and data/ (`make demo-data`). Run it on a machine that
does nothing else; results worth keeping are in LOG.md.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_contract import env, job_folder
from qlora_contract.cpus import format_cpu_list
from qlora_contract.run_config import RunConfig
from qlora_trainer.artifacts.metrics_log import read_metrics
from qlora_trainer.host.cgroups import available_cpus
from qlora_trainer.host.isa import probe_isa
from qlora_trainer.host.numa import read_machine
from qlora_trainer.launch.cpu_layout import AvailableCpus, CpuRequest, compute_layout

FOLDER = Path(__file__).parents[2] / ".cache" / "demo"
WARM_UP = 2
"""First steps that do not count."""
GOAL = 0.97
UNBOUND = "import os, runpy; os.sched_setaffinity(0, {cpus}); runpy.run_module('qlora_trainer', run_name='__main__')"
"""A rank that gives up the CPUs that it was bound to."""


@dataclass(frozen=True)
class Case:
    """What is the same in all runs."""

    demo: Path
    output: Path
    steps: int
    tokens: int
    """Of each rank and step, at most."""
    halves: tuple[tuple[int, ...], tuple[int, ...]]
    """The CPUs of each of two ranks, as planned."""

    @property
    def cpus(self) -> list[int]:
        """Of both ranks."""
        return sorted(self.halves[0] + self.halves[1])


def run_config(case: Case, name: str, ranks: int) -> RunConfig:
    """A job of so many ranks in one pod."""
    return RunConfig.model_validate(
        {
            "version": 1,
            "job": {"name": name, "uid": name, "attempt": 0},
            "workspace": "pvc://output",
            "model": {"source": "pvc://demo/model"},
            "dataset": {"source": "pvc://demo/data/train.jsonl", "evalFraction": 0.0},
            "training": {
                "maxSteps": case.steps,
                "globalBatchTokens": ranks * case.tokens,
                "maxSequenceLength": min(256, case.tokens),
            },
            "evaluation": {"requireImprovement": False},
            "layout": {
                "ranksPerPod": ranks,
                "cpusPerRank": len(case.halves[0]),
                "memoryPerRank": 16 << 30,
            },
            "isa": probe_isa(),
        }
    )


def start(case: Case, run: RunConfig, cpus: list[int], *, bound: bool = True) -> subprocess.Popen[bytes]:
    """A launcher that may use these CPUs."""
    folder = case.output / run.job.name
    folder.mkdir()
    (folder / "run.json").write_text(run.to_json())
    rank = [sys.executable, "-m", "qlora_trainer"]
    if not bound:
        (folder / "rank.py").write_text(UNBOUND.format(cpus=cpus))
        rank = [sys.executable, str(folder / "rank.py")]
    command = [
        sys.executable,
        "-c",
        f"import os; from qlora_trainer.launch.__main__ import main; os._exit(main({rank!r}))",
    ]
    environ = {
        env.RUN_CONFIG_ENV: str(folder / "run.json"),
        env.VOLUMES_ENV: json.dumps({"demo": str(case.demo), "output": str(case.output)}),
        env.PROGRESS_PORT_ENV: str(free_port()),
        env.CPUS_ENV: format_cpu_list(cpus),
        env.PARENT_DEATH_ENV: str(os.getpid()),
        "MASTER_PORT": str(free_port()),
    }
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, env={**os.environ, **environ}, stdout=log, stderr=log)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def finish(case: Case, name: str, process: subprocess.Popen[bytes]) -> float:
    """Tokens per second of a job's steps after the first, once it has ended."""
    if code := process.wait():
        sys.exit(f"{name} ended with {code}:\n{(case.output / name / 'log').read_text()}")
    lines = read_metrics(case.output / "jobs" / name / job_folder.METRICS)
    steps = [line for line in lines if line["loss"] is not None][WARM_UP:]
    return float(sum(line["tokens"] for line in steps) / sum(line["seconds"] for line in steps))


# --- what is compared


def one_alone(case: Case, tag: str) -> float:
    """One rank on the first half, nothing on the other."""
    name = f"one-{tag}"
    return finish(case, name, start(case, run_config(case, name, 1), list(case.halves[0])))


def two_apart(case: Case, tag: str) -> float:
    """Two jobs of one rank, each on its half: the ceiling."""
    names = [f"apart-{number}-{tag}" for number in range(2)]
    started = [
        start(case, run_config(case, name, 1), list(half))
        for name, half in zip(names, case.halves, strict=True)
    ]
    return sum(finish(case, name, process) for name, process in zip(names, started, strict=True))


def two_pinned(case: Case, tag: str) -> float:
    """One job of two ranks, laid out as always."""
    name = f"pinned-{tag}"
    return finish(case, name, start(case, run_config(case, name, 2), case.cpus))


def two_unpinned(case: Case, tag: str) -> float:
    """The same, each rank on all the CPUs."""
    name = f"unpinned-{tag}"
    return finish(case, name, start(case, run_config(case, name, 2), case.cpus, bound=False))


RUNS: dict[str, Callable[[Case, str], float]] = {
    "one rank alone": one_alone,
    "two jobs of one rank": two_apart,
    "two ranks, pinned": two_pinned,
    "two ranks, not pinned": two_unpinned,
}
CEILING = "two jobs of one rank"


def halves() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The CPUs of two ranks on all of this machine's cores."""
    cpus, quota = available_cpus()
    machine = read_machine()
    cores = len(machine.cores_of(cpus))
    found = compute_layout(
        machine, AvailableCpus(tuple(cpus), quota, exclusive=True), CpuRequest(2, cores // 2 * 2)
    )
    return found.ranks[0].cpus, found.ranks[1].cpus


def show(results: dict[str, list[float]]) -> None:
    """A table of medians, each as a share of the same round's ceiling."""
    print("| | tokens/s | of the ceiling, median (each round) |\n|---|---:|---:|")
    for name, rates in results.items():
        shares = [rate / ceiling for rate, ceiling in zip(rates, results[CEILING], strict=True)]
        each = ", ".join(f"{share:.3f}" for share in shares)
        print(f"| {name} | {statistics.median(rates):.1f} | {statistics.median(shares):.3f} ({each}) |")


def main() -> int:
    """Measure and print. Returns 1 when pinned ranks stay below the goal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    results: dict[str, list[float]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as output:
        case = Case(arguments.folder.resolve(), Path(output), arguments.steps, arguments.tokens, halves())
        print(f"CPUs {' and '.join(map(format_cpu_list, case.halves))}, {probe_isa()}")
        for number in range(arguments.rounds):
            for name, run in RUNS.items():
                results[name].append(run(case, str(number)))
    show(results)
    reached = statistics.median(
        pinned / ceiling
        for pinned, ceiling in zip(results["two ranks, pinned"], results[CEILING], strict=True)
    )
    print(f"goal: two pinned ranks at {GOAL} of the ceiling or more; reached {reached:.3f}")
    return 0 if reached >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
