"""Where the ranks of a pod are forked: python -m qlora_trainer.nursery (-m MODULE | SCRIPT).

MODULE.__main__ is imported once, here, and its `main` runs in every rank; a SCRIPT is read by each rank by itself.
The launcher's side, and why, is births.py.
"""

import ctypes
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

from qlora_trainer.births import Birth, Order
from qlora_trainer.supervise import die_with_parent
from qlora_trainer.topology import memory

SETTLING_SECONDS = 1.0
"""How long threads that imports started have to end; those of an allocator stay, and are made for a fork."""

_PR_SET_NAME = 15  # linux/prctl.h; what ps and top show, of at most 15 bytes


def main(arguments: list[str]) -> None:
    """Fork the ranks that stdin tells of, say their ids, and end; what returns from here is a rank."""
    order = read_order(sys.stdin.read())
    die_with_parent(signal.SIGKILL)
    if os.getppid() != order.launcher:  # it died before the line above
        os._exit(128 + signal.SIGKILL)
    # What is imported lies in memory near the ranks.
    os.sched_setaffinity(0, {cpu for birth in order.births for cpu in birth.cpus})
    run = program(arguments)
    # Collections would write to the header of every object, and shared pages would be copied for that.
    gc.collect()
    gc.freeze()
    pids = []
    for birth in order.births:
        pid = os.fork()
        if pid == 0:
            begin(order, birth)
            run()
            return
        pids.append(pid)
    say_and_end(pids)


def read_order(text: str) -> Order:
    """The launcher's JSON."""
    values = json.loads(text)
    return Order(values["launcher"], values["go"], [Birth(**birth) for birth in values["births"]])


def program(arguments: list[str]) -> Callable[[], object]:
    """What a rank runs; all that it imports is imported already."""
    if arguments[0] == "-m":
        run: Callable[[], object] = imported(f"{arguments[1]}.__main__").main
        return run
    return lambda: runpy.run_path(arguments[0], run_name="__main__")


def imported(name: str) -> ModuleType:
    """A module, imported by a thread of its own.

    If it computes in parallel meanwhile, OpenMP's threads belong to that thread and end with it. Those of the main
    thread would not be there after a fork, and every rank would wait for them.
    """
    threads = count_threads()
    with ThreadPoolExecutor(1) as apart:
        module = apart.submit(importlib.import_module, name).result()
    deadline = time.monotonic() + SETTLING_SECONDS
    while count_threads() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    return module


def count_threads() -> int:
    """Threads of this process, Python's and others'."""
    return len(list(Path("/proc/self/task").iterdir()))


def begin(order: Order, birth: Birth) -> None:
    """Make this process a rank: its output, its parent, its CPUs and its environment."""
    os.setsid()
    os.dup2(birth.stdout, 1)
    os.dup2(birth.stderr, 2)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    # A byte comes once the nursery is gone and the launcher is the parent.
    allowed = os.read(order.go, 1)
    ends = {end for other in order.births for end in (other.stdout, other.stderr)}
    for end in ends | {nothing, order.go}:
        os.close(end)
    die_with_parent(signal.SIGKILL)
    if not allowed or os.getppid() != order.launcher:
        os._exit(128 + signal.SIGKILL)
    os.sched_setaffinity(0, birth.cpus)
    if birth.memory_node is not None:
        memory.prefer(birth.memory_node)
    os.environ.clear()
    os.environ.update(birth.environment)
    name = f"qlora-rank-{birth.environment['RANK']}"
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def say_and_end(pids: list[int]) -> NoReturn:
    """Tell the launcher, and leave at once: an orderly end of all that was imported takes its time."""
    os.write(1, json.dumps(pids).encode())
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
