"""The library's own threads."""

import ctypes
import os
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from kernel_tiers import library_of
from qlora_trainer.kernels.library import Library

pytestmark = pytest.mark.process


@pytest.fixture
def library() -> Library:
    """The library; which tier does not matter."""
    return library_of("avx2")


def ranges(library: Library, threads: int, count: int) -> list[int]:
    """For each index the start of the range that it was in, plus one; indices run twice would have more."""
    starts = (ctypes.c_int64 * count)()
    library.function("ranges", ctypes.c_void_p, ctypes.c_int64)(threads, ctypes.addressof(starts), count)
    return list(starts)


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 1000])
def test_every_index_runs_once(library: Library, threads: int, count: int) -> None:
    """In ranges that depend on the two numbers alone, also with more threads than cores or than indices."""
    cut = max(1, min(threads, count))
    borders = [count * i // cut for i in range(cut + 1)]
    expected = [start + 1 for start, end in pairwise(borders) for _ in range(start, end)]

    for _ in range(20):
        assert ranges(library, threads, count) == expected


def test_a_forked_child_has_threads_of_its_own(library: Library) -> None:
    """The parent's do not exist there; the child starts others, and the parent keeps its own."""
    expected = ranges(library, 4, 1000)
    for _ in range(5):
        child = os.fork()
        if child == 0:
            os._exit(0 if ranges(library, 4, 1000) == expected else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert ranges(library, 4, 1000) == expected


def test_two_callers_at_once(library: Library) -> None:
    """Python's threads call at the same time, since a call does not hold the interpreter: each call is cut into its
    ranges, or is one range where another is under way."""
    allowed = [ranges(library, cut, 3000) for cut in (1, 3)]
    wrong = []

    def call() -> None:
        for _ in range(300):
            got = ranges(library, 3, 3000)
            if got not in allowed:
                wrong.append(got)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    assert wrong == []


def test_workers_sleep_between_calls(library: Library) -> None:
    """Threads that wait take no processor time from the ranks beside them."""
    ranges(library, 8, 1000)
    before = time.process_time()
    time.sleep(0.3)

    assert len(list(Path("/proc/self/task").iterdir())) >= 8
    assert time.process_time() - before < 0.1
