"""How long an all-reduce takes by each backend, from 1 KB to 400 MB.

Every size is measured by all backends in turn, round after round, in the same
processes, so that what else the machine does meets all of them alike; what is
printed is the median of the rounds, of the slowest rank each.

    python trainer/benchmarks/allreduce.py [--ranks 2 4] [--backends gloo ccl mpi] [--sizes 1e3 1e6 4e8]
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

BACKENDS = ("gloo", "ccl", "mpi")
SIZES = (1e3, 1e4, 1e5, 1e6, 1e7, 4e7, 1e8, 4e8)
"""Bytes, of fp32."""
ROUNDS = 7
SECONDS = 0.2
"""Of calls in one round of one backend, about."""

Times = dict[str, dict[str, float]]
"""Size -> backend -> milliseconds."""


def rank_main(backends: Sequence[str], sizes: Sequence[float]) -> None:
    """One rank; rank 0 prints the times as JSON."""
    import torch
    import torch.distributed as dist

    from qlora_trainer.distributed.backends import registry as known

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = {name: dist.new_group(backend=known.prepare(name)) for name in backends}

    def once(name: str, buffer: torch.Tensor, calls: int) -> float:
        """Milliseconds of one call, in the slowest rank."""
        dist.barrier(groups[name])
        start = time.perf_counter()
        for _ in range(calls):
            dist.all_reduce(buffer, group=groups[name])
        taken = torch.tensor([(time.perf_counter() - start) / calls * 1e3])
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return taken.item()

    medians: Times = {}
    for size in sizes:
        buffer = torch.zeros(max(1, int(size) // 4))
        calls = {name: max(1, min(200, int(SECONDS * 1e3 / once(name, buffer, 1)))) for name in backends}
        rounds = [{name: once(name, buffer, calls[name]) for name in backends} for _ in range(ROUNDS)]
        medians[f"{size:g}"] = {name: statistics.median(each[name] for each in rounds) for name in backends}
        if dist.get_rank() == 0:
            print(f"{size:g} bytes done", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        print(json.dumps(medians), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, backends: Sequence[str], sizes: Sequence[float]) -> Times:
    """Start the ranks and wait for what rank 0 says. Raises CalledProcessError."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    world = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, str(Path(__file__)), "--as-rank", "--backends", *backends]
    words += ["--sizes", *(str(size) for size in sizes)]
    started = [
        subprocess.Popen(
            words, env=os.environ | world | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process in started:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, words)
    times: Times = json.loads(outputs[0].splitlines()[-1])  # oneCCL says something before
    return times


def table(times: Times, backends: Sequence[str]) -> str:
    """The times as a table in Markdown, in milliseconds."""
    rows = [f"| bytes | {' | '.join(backends)} |", "|---" * (1 + len(backends)) + "|"]
    rows += [
        f"| {size} | {' | '.join(f'{of[name]:.3g}' for name in backends)} |" for size, of in times.items()
    ]
    return "\n".join(rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES), help="bytes")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.as_rank:
        rank_main(asked.backends, asked.sizes)
        return
    for ranks in asked.ranks:
        print(f"{ranks} ranks, milliseconds; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs\n")
        print(table(measure(ranks, asked.backends, asked.sizes), asked.backends) + "\n", flush=True)


if __name__ == "__main__":
    main()
