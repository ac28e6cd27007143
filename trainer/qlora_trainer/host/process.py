"""What a process can ask of the kernel about itself, its parent and its descendants (prctl(2))."""

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent(signal_number: int, parent: int) -> bool:
    """Have the kernel send this process a signal when the thread that started it ends.

    Args:
        signal_number: the signal.
        parent: process id of who started this process.

    Returns:
        False when the parent died before the kernel was asked: then no signal will come.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
    return os.getppid() == parent


def set_process_name(name: str) -> None:
    """What ps and top show for this process; the kernel keeps the first 15 bytes."""
    _LIBC.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


@contextlib.contextmanager
def child_subreaper() -> Iterator[None]:
    """Descendants that are orphaned inside become children of this process, which can wait for them."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def started_at() -> float:
    """When this process was started, on the monotonic clock, to a hundredth of a second."""
    ticks = int(
        Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    )  # field 22, since the boot
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def processor_seconds(pid: int) -> float:
    """Processor time that a process has taken so far, in all its threads; 0 for one that is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    user, system = stat.rpartition(")")[2].split()[11:13]  # fields 14 and 15; the second may hold anything
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
