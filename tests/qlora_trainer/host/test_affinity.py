"""Service CPUs, and where the threads of real ranks are, as the kernel says."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from builders import OMIT, a_run
from qlora_contract import env, supervision
from qlora_contract.cpus import format_cpu_list, parse_cpu_list
from qlora_operator.cli.processes import free_port
from qlora_trainer.host.affinity import SERVICE_CPUS_ENV, on_service_cpus
from qlora_trainer.host.numa import read_machine
from qlora_trainer.launch import supervisor
from qlora_trainer.launch.cpu_layout import AvailableCpus, CpuAssignment, CpuRequest, compute_layout
from qlora_trainer.launch.environment import thread_settings

CPUS = sorted(os.sched_getaffinity(0))

pytestmark = pytest.mark.process

two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")


def started() -> set[int]:
    """The affinity of a thread started now."""
    found: list[set[int]] = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    return found[0]


def test_threads_started_inside_stay_on_the_service_cpus() -> None:
    """The thread that starts them comes back afterwards."""
    own = os.sched_getaffinity(0)
    one = max(own)
    with on_service_cpus({SERVICE_CPUS_ENV: str(one)}):
        assert started() == {one}

    assert started() == own


def test_an_error_inside_leaves_no_trace() -> None:
    """The thread comes back to its own CPUs."""
    own = os.sched_getaffinity(0)
    with suppress(KeyError), on_service_cpus({SERVICE_CPUS_ENV: str(max(own))}):
        raise KeyError

    assert os.sched_getaffinity(0) == own


def test_without_service_cpus_nothing_moves() -> None:
    """Threads share the rank's CPUs."""
    with on_service_cpus({}):
        assert started() == os.sched_getaffinity(0)


def threads_of(pid: int) -> dict[int, tuple[str, set[int], int]]:
    """Thread id -> name, CPUs that it may use, CPU that it ran on last (proc_pid_stat(5), field 39)."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
            status = (task / "status").read_text()
            last = int((task / "stat").read_text().rpartition(")")[2].split()[36])
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        allowed = next(line for line in status.splitlines() if line.startswith("Cpus_allowed_list:"))
        found[int(task.name)] = (name, set(parse_cpu_list(allowed.partition(":")[2])), last)
    return found


# --- service and compute threads of torch


RANK = textwrap.dedent("""
    import json, os, threading
    from pathlib import Path
    from qlora_trainer.host.affinity import on_service_cpus

    def tasks():
        return sorted(map(int, os.listdir("/proc/self/task")))

    start = tasks()
    with on_service_cpus():
        import torch
        from qlora_trainer.distributed import Group, World
        before = tasks()
        group = Group.open(World.from_environ(os.environ), "gloo", 60, 60)
        group.barrier()
        service = sorted(set(tasks()) - set(before))
    a = torch.ones(1024, 1024)
    for _ in range(3):
        a = torch.softmax(a @ a, 0)
    group.barrier()
    told = {"service": service, "computing": sorted(set(tasks()) - set(before) - set(service))}
    Path(os.environ["SAID"]).write_text(json.dumps(told) + "\\n")
    threading.Event().wait()
""")


@pytest.fixture
def two_ranks(tmp_path: Path) -> Iterator[tuple[CpuAssignment, list[tuple[int, dict[str, list[int]]]]]]:
    """Two ranks of two threads on one CPU, service threads on another; their process ids, and their threads."""
    assignment = CpuAssignment((CPUS[0],), 2, (CPUS[1],))
    port, log = free_port(), tmp_path / "said"
    (tmp_path / "rank.py").write_text(RANK)
    environments = [
        {
            **os.environ,
            **thread_settings(assignment, {}),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "SAID": f"{log}-{rank}",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(2)
    ]
    command = [sys.executable, str(tmp_path / "rank.py")]
    ranks = supervisor.start_ranks(command, environments, [assignment, assignment], tmp_path)
    try:
        said = []
        for rank in ranks:
            path = Path(f"{log}-{rank.rank}")
            while not (path.exists() and path.read_text().endswith("\n")):
                assert rank.is_alive, rank.last_error
                time.sleep(0.05)
            said.append((rank.process.pid, json.loads(path.read_text())))
        yield assignment, said
    finally:
        for rank in ranks:
            rank.process.send_signal(signal.SIGKILL)
        supervisor.watch(ranks, supervision.Limits(60, 60), supervisor.Stop())


@two_cpus
def test_communication_and_compute_threads_are_apart(
    two_ranks: tuple[CpuAssignment, list[tuple[int, dict[str, list[int]]]]],
) -> None:
    """gloo's threads are on the service CPU, torch's own and the main thread on the compute CPU."""
    assignment, ranks = two_ranks
    for pid, told in ranks:
        threads = threads_of(pid)

        assert told["service"]
        assert told["computing"]
        assert {thread: threads[thread][1] for thread in told["service"] if thread in threads} == {
            thread: set(assignment.service_cpus) for thread in told["service"] if thread in threads
        }
        assert [threads[thread][1] for thread in told["computing"]] == [set(assignment.cpus)] * len(
            told["computing"]
        )
        assert threads[pid][1:] == (set(assignment.cpus), assignment.cpus[0])


# --- a real job


@contextmanager
def job(folder: Path, model: Path, data: Path, each: int) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A launcher that trains with two ranks of so many CPUs; it and its progress port."""
    steps = {"epochs": OMIT, "maxSteps": 100_000, "globalBatchTokens": 512, "maxSequenceLength": 96}
    run = a_run(
        version=1,
        job={"name": "pinned"},
        workspace="pvc://work",
        model={"source": "pvc://model"},
        dataset={"source": f"pvc://data/{data.name}"},
        training=steps,
        layout={"ranksPerPod": 2, "cpusPerRank": each, "memoryPerRank": 8 << 30},
    )
    (folder / "run.json").write_text(run.to_json())
    (folder / "work").mkdir()
    volumes = {"work": str(folder / "work"), "model": str(model), "data": str(data.parent)}
    port = free_port()
    environ = {
        **os.environ,
        "TMPDIR": str(folder),  # what it leaves behind goes with the test
        env.RUN_CONFIG_ENV: str(folder / "run.json"),
        env.VOLUMES_ENV: json.dumps(volumes),
        env.PROGRESS_PORT_ENV: str(port),
        env.PARENT_DEATH_ENV: str(os.getpid()),
        env.CPUS_ENV: format_cpu_list(CPUS),
        "MASTER_PORT": str(free_port()),
    }
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-m", "qlora_trainer.launch"]
        launcher = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:
        yield launcher, port
    finally:
        launcher.kill()  # its ranks die with it
        launcher.wait()


def until_training(launcher: subprocess.Popen[bytes], port: int, folder: Path) -> list[dict[str, Any]]:
    """The ranks' facts, once a step is done."""
    while True:
        assert launcher.poll() is None, (folder / "log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=10) as answer:
                progress = json.load(answer)
        except OSError:
            progress = {"step": 0}
        if progress["step"] > 0:
            ranks: list[dict[str, Any]] = progress["ranks"]
            return ranks
        time.sleep(0.2)


@pytest.mark.slow
@two_cpus
def test_every_thread_of_a_job_is_where_the_layout_says(
    tmp_path: Path, small_model: Callable[..., Path], demo_data: Path
) -> None:
    """While it trains, each of a rank's threads may use, and used, only its rank's CPUs; the report says the same."""
    each = len(CPUS) // 2
    expected = compute_layout(
        read_machine(), AvailableCpus(tuple(CPUS), exclusive=True), CpuRequest(2, 2 * each)
    ).ranks
    with job(tmp_path, small_model(), demo_data / "train.jsonl", each) as (launcher, port):
        facts = until_training(launcher, port, tmp_path)
        ranks = {
            int(child.name().rpartition("-")[2]): child.pid
            for child in psutil.Process(launcher.pid).children()
        }
        threads = {rank: threads_of(pid) for rank, pid in ranks.items()}

    assert [(rank["cpus"], rank["threads"]) for rank in facts] == [
        (format_cpu_list(assignment.cpus), assignment.threads) for assignment in expected
    ]
    for rank, assignment in enumerate(expected):
        own = set(assignment.cpus) | set(assignment.service_cpus)
        assert len(threads[rank]) >= assignment.threads + 3, (
            "gloo's, the heartbeat's and torch's threads are there"
        )
        strays = [each for each in threads[rank].values() if not each[1] <= own or each[2] not in own]
        assert strays == []
