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
    ticks = int(_stat("self")[19])  # field 22, since the boot
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def processor_seconds(pid: int) -> float:
    """Processor time that a process has taken so far, in all its threads; 0 for one that is gone."""
    fields = _stat(pid)
    return sum(int(ticks) for ticks in fields[11:13]) / os.sysconf("SC_CLK_TCK")  # fields 14 and 15


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal (SIGSTOP) or a debugger; False for one that is gone."""
    return _stat(pid)[:1] in (["T"], ["t"])


def _stat(pid: int | str) -> list[str]:
    """/proc/PID/stat from the third field on, since the second may hold anything; empty for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
