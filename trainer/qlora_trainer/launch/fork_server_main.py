"""The fork server: python -m qlora_trainer.launch.fork_server_main (-m MODULE | SCRIPT).

MODULE.__main__ is imported once, here, and its `main` runs in every rank; a SCRIPT is read by each rank for itself.
The launcher's side, and why, is fork_server.py.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from qlora_trainer.host.hbm import prefer_memory_of
from qlora_trainer.host.process import die_with_parent, set_process_name
from qlora_trainer.launch.fork_server import ForkRequest, RankSpec

SETTLING_SECONDS = 1.0
"""How long threads that imports started have to end; those of an allocator stay, and survive a fork."""
ORPHANED = 128 + signal.SIGKILL
"""Exit code when the launcher has died: what its death would have given a moment later."""


def main(arguments: list[str]) -> None:
    """Fork the ranks that stdin asks for, answer with their process ids, and exit. What returns from here is a rank."""
    request = read_request(sys.stdin.read())
    if not die_with_parent(signal.SIGKILL, request.launcher):
        os._exit(ORPHANED)
    # Memory that imports touch should be near the ranks.
    os.sched_setaffinity(0, {cpu for rank in request.ranks for cpu in rank.cpus})
    run_rank = program(arguments)
    # A collection would write to the header of every object, and the pages would no longer be shared.
    gc.collect()
    gc.freeze()
    pids = []
    for rank in request.ranks:
        pid = os.fork()
        if pid == 0:
            become_rank(request, rank)
            run_rank()
            return
        pids.append(pid)
    report_pids_and_exit(pids)


def read_request(text: str) -> ForkRequest:
    """The launcher's JSON."""
    fields = json.loads(text)
    return ForkRequest(
        fields["launcher"], fields["start_pipe"], [RankSpec(**rank) for rank in fields["ranks"]]
    )


def program(arguments: list[str]) -> Callable[[], object]:
    """What a rank runs. A module is imported already when this returns, with all that it imports."""
    if arguments[0] == "-m":
        run: Callable[[], object] = import_in_thread(f"{arguments[1]}.__main__").main
        return run
    return lambda: runpy.run_path(arguments[0], run_name="__main__")


def import_in_thread(name: str) -> ModuleType:
    """A module, imported by a thread of its own.

    If it computes in parallel meanwhile, OpenMP's threads belong to that thread and end with it. Those of the main
    thread would not exist after a fork, and every rank would wait for them.
    """

    def count_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    threads = count_threads()
    with ThreadPoolExecutor(1) as executor:
        module = executor.submit(importlib.import_module, name).result()
    deadline = time.monotonic() + SETTLING_SECONDS
    while count_threads() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    return module


def become_rank(request: ForkRequest, rank: RankSpec) -> None:
    """Give this forked process its output, its parent, its CPUs and memory, its environment and its name."""
    os.setsid()
    os.dup2(rank.stdout, 1)
    os.dup2(rank.stderr, 2)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    # A byte comes once the fork server is gone and the launcher is the parent.
    may_start = os.read(request.start_pipe, 1)
    pipes = {fd for other in request.ranks for fd in (other.stdout, other.stderr)}
    for fd in pipes | {null, request.start_pipe}:
        os.close(fd)
    if not may_start or not die_with_parent(signal.SIGKILL, request.launcher):
        os._exit(ORPHANED)
    os.sched_setaffinity(0, rank.cpus)
    if rank.memory_node is not None:
        prefer_memory_of(rank.memory_node)
    os.environ.clear()
    os.environ.update(rank.environment)
    set_process_name(f"qlora-rank-{rank.environment['RANK']}")


def report_pids_and_exit(pids: list[int]) -> NoReturn:
    """Tell the launcher, and exit at once: an orderly exit of all that was imported takes its time."""
    os.write(1, json.dumps(pids).encode())
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
