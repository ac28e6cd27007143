"""Our trainer against TRL with peft and bitsandbytes: speed and memory on this machine, taken in turns.

    python trainer/benchmarks/against_trl.py [FOLDER] [--rounds 3] [--steps 20] [--dtype fp32 bf16]

FOLDER has what demo/model.py and demo/data.py write, in model/ and data/ (`make
demo-data`). Both sides train the demo's adapter (manifests/samples/demo.yaml)
for as many steps of 1,024 tokens: ours with `qlora run` and its ranks, the peer
as peer_trl.py tunes it, as one process with all cores and as two that share
them. Both rates leave the first step out. Memory is the peak of the summed
proportional set sizes of all processes of a side, from the command's start to
its end, imports included.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from measure import Measurement, measure

from qlora_contract.job_folder import METRICS, TRAINING_REPORT
from qlora_contract.progress import FIRST_STEP

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "manifests" / "samples" / "demo.yaml"
FOLDER = HERE.parents[1] / ".cache" / "demo"
BUSY = 0.25
"""Load per core from which on numbers say little: threads that wait for one without a core spin."""
GIB = 2**30


class BenchmarkError(Exception):
    """A side did not come to its end."""


@dataclass(frozen=True)
class Run:
    """What one run of one side did."""

    supervised_tokens_per_second: float
    tokens_per_second: float
    startup_seconds: float
    """From the start to the first step's: of the peer's script, and of our ranks, without `qlora run`'s own second."""
    wall_seconds: float
    peak_bytes: int
    """Summed proportional set size."""
    peak_private_bytes: int
    """The part of it that the kernel cannot drop."""


FIELDS: dict[str, tuple[str, Callable[[Run], float]]] = {
    "supervised tokens/s": ("{:.1f}", lambda run: run.supervised_tokens_per_second),
    "tokens/s": ("{:.1f}", lambda run: run.tokens_per_second),
    "start-up s": ("{:.1f}", lambda run: run.startup_seconds),
    "whole command s": ("{:.1f}", lambda run: run.wall_seconds),
    "peak memory GiB": ("{:.2f}", lambda run: run.peak_bytes / GIB),
    "of it private GiB": ("{:.2f}", lambda run: run.peak_private_bytes / GIB),
}


def ours(folder: Path, scratch: Path, steps: int, dtype: str) -> Run:
    """Run the demo's job in a new workspace."""
    job = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    job["spec"]["workspace"] = "pvc://scratch"
    job["spec"]["training"] |= {"maxSteps": steps + 1, "computeDtype": dtype, "learningRate": 1e-3}
    job["spec"]["evaluation"] = {"requireImprovement": False}  # a few steps in, it may not have come yet
    file = scratch / "job.yaml"
    file.write_text(yaml.safe_dump(job), encoding="utf-8")
    qlora = str(Path(sys.executable).with_name("qlora"))
    volumes = ["--volume", f"demo={folder}", "--volume", f"scratch={scratch}"]
    result = finished([qlora, "run", str(file), *volumes], scratch)
    folder_of_job = scratch / "jobs" / job["metadata"]["name"]
    lines = (folder_of_job / METRICS).read_text(encoding="utf-8").splitlines()
    timeline = json.loads((folder_of_job / TRAINING_REPORT).read_text(encoding="utf-8"))["timeline"]
    stages = list(timeline)
    startup = sum(timeline[stage] for stage in stages[: stages.index(FIRST_STEP)])
    return our_run([json.loads(line) for line in lines], result, startup)


def our_run(lines: Sequence[dict[str, Any]], result: Measurement, startup: float) -> Run:
    """From the lines of metrics.jsonl; the first step is left out."""
    steps = [line for line in lines if line["step"] > 1 and "seconds" in line]
    seconds = sum(line["seconds"] for line in steps)
    return Run(
        sum(line["supervised_tokens"] for line in steps) / seconds,
        sum(line["tokens"] for line in steps) / seconds,
        startup,
        result.wall_seconds,
        result.peak.pss,
        result.peak_private,
    )


def peer(folder: Path, scratch: Path, steps: int, dtype: str, extra: Sequence[str] = ()) -> Run:
    """Run the peer's script."""
    script = str(HERE / "peer_trl.py")
    command = [sys.executable, script, str(folder / "model"), str(folder / "data")]
    options = ["--steps", str(steps), "--dtype", dtype, *extra]
    result = finished(command + options, scratch)
    report = json.loads((scratch / "stdout").read_text(encoding="utf-8").splitlines()[-1])
    return Run(
        report["supervised_tokens_per_second"],
        report["tokens_per_second"],
        report["startup_seconds"],
        result.wall_seconds,
        result.peak.pss,
        result.peak_private,
    )


def finished(command: Sequence[str], scratch: Path) -> Measurement:
    """Run a command with its output in `scratch`. Raises BenchmarkError with the end of it when it fails."""
    # What this machine's owner set for threads and allocators is not what either side chose.
    kept = ("OMP_", "MKL_", "MALLOC_", "KMP_", "LD_PRELOAD")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(kept)}
    result = measure(
        command, environ=environ, stdout=scratch / "stdout", stderr=scratch / "stderr", interval=0.1
    )
    if result.exit_code:
        tail = "".join((scratch / name).read_text(errors="replace")[-2000:] for name in ("stdout", "stderr"))
        raise BenchmarkError(f"{' '.join(command)} ended with code {result.exit_code}:\n{tail}")
    return result


def table(runs: dict[str, list[Run]]) -> str:
    """Medians of each side, and ours by the peer's, for each peer."""
    names = list(runs)
    lines = ["| median | " + " | ".join(names) + " | " + " | ".join(f"ours / {n}" for n in names[1:]) + " |"]
    lines.append("| --- |" + " ---: |" * (2 * len(names) - 1))
    for title, (layout, value) in FIELDS.items():
        medians = [statistics.median(map(value, runs[name])) for name in names]
        cells = [layout.format(median) for median in medians]
        cells += [f"{medians[0] / median:.2f}" for median in medians[1:]]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    spread = (f"{name} {min(rates):.1f}-{max(rates):.1f}" for name, rates in _rates(runs))
    return "\n".join([*lines, "", "supervised tokens/s of all rounds: " + ", ".join(spread)])


def _rates(runs: dict[str, list[Run]]) -> list[tuple[str, list[float]]]:
    return [(name, [run.supervised_tokens_per_second for run in taken]) for name, taken in runs.items()]


def machine() -> str:
    """What the numbers depend on."""
    import torch

    from qlora_trainer.host import isa

    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return (
        f"{_model_name()}, {cores} cores, ISA {isa.probe_isa()}, torch sees {torch.backends.cpu.get_cpu_capability()}; "
        f"load before the start {load:.1f}; Python {platform.python_version()}, " + versions
    )


def _model_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"default: {FOLDER}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="that count; one more is the warm-up")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--plain", action="store_true", help="also take the peer with settings alone")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    if os.getloadavg()[0] > BUSY * len(os.sched_getaffinity(0)):
        print("warning: other work runs on this machine; what follows says little", flush=True)
    for dtype in arguments.dtype:
        runs = take_turns(arguments, dtype)
        print(f"\n{dtype}, {arguments.steps} steps, {arguments.rounds} rounds\n\n{table(runs)}", flush=True)
    return 0


def take_turns(arguments: argparse.Namespace, dtype: str) -> dict[str, list[Run]]:
    """Each side once a round, one after the other, so that what else the machine does meets all of them."""
    folder = arguments.folder.resolve()
    sides: dict[str, Callable[[Path], Run]] = {
        "ours": lambda scratch: ours(folder, scratch, arguments.steps, dtype),
        "TRL": lambda scratch: peer(folder, scratch, arguments.steps, dtype),
        "TRL, 2 ranks": lambda scratch: peer(folder, scratch, arguments.steps, dtype, ["--ranks", "2"]),
    }
    if arguments.plain:
        sides["TRL, plain"] = lambda scratch: peer(folder, scratch, arguments.steps, dtype, ["--plain"])
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name, side in sides.items():
            scratch = Path(tempfile.mkdtemp(prefix="against-"))
            try:
                runs[name].append(side(scratch))
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            print(f"round {number + 1}, {dtype}, {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    return runs


if __name__ == "__main__":
    sys.exit(main())
