"""A rank's own memory, sampled."""

import gc
import mmap
import threading
import time
from pathlib import Path

import pytest

from qlora_trainer.host import memory_sampler
from qlora_trainer.host.memory_sampler import MemorySampler
from qlora_trainer.host.process_memory import ProcessMemory

MIB = 2**20


def test_a_peak_stays_after_the_memory_is_given_back() -> None:
    """64 MiB that were used for a while are in the peak of what was needed, and not in the baseline."""
    sampler = MemorySampler()
    used = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, len(used), mmap.PAGESIZE):
        used[page] = 1
    sampler.sample()
    used.close()
    sampler.sample()

    assert sampler.peak_needed - sampler.baseline.needed >= 60 * MIB


def test_large_memory_is_counted_rarely_and_its_peaks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes to walk all pages, that is a thousandth of the time; a peak meanwhile is kept."""
    monkeypatch.setattr(memory_sampler, "INTERVAL_SECONDS", 0.01)
    count, counted = memory_sampler.process_memory, threading.Semaphore(0)

    def slowly() -> ProcessMemory:
        time.sleep(0.1)
        counted.release()
        return count()

    monkeypatch.setattr(memory_sampler, "process_memory", slowly)
    sampler = MemorySampler()
    assert counted.acquire(timeout=60)  # the baseline
    assert counted.acquire(timeout=60)  # the first of its own; the next is due in a hundred seconds
    while sampler._counted is sampler.baseline:
        time.sleep(0.01)
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as used:
        for page in range(0, len(used), mmap.PAGESIZE):
            used[page] = 1
        deadline = time.monotonic() + 30
        while sampler.peak_needed - sampler.baseline.needed < 60 * MIB and time.monotonic() < deadline:
            time.sleep(0.01)

    assert sampler.peak_needed - sampler.baseline.needed >= 60 * MIB
    assert not counted.acquire(blocking=False)


def test_mapped_files_are_told_apart(tmp_path: Path) -> None:
    """Pages of a mapped file count in the total alone: the kernel can drop them."""
    (tmp_path / "file").write_bytes(b"\1" * (64 * MIB))
    sampler = MemorySampler()
    with (tmp_path / "file").open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        read = sum(mapped[page] for page in range(0, len(mapped), mmap.PAGESIZE))
        sampler.sample()
        mapped.close()

    assert read == 64 * MIB // mmap.PAGESIZE
    assert sampler.peak_total - (sampler.baseline.needed + sampler.baseline.file) >= 60 * MIB
    assert sampler.peak_needed - sampler.baseline.needed < 32 * MIB


def test_the_sampler_keeps_no_process_alive() -> None:
    """Its thread is a daemon: a rank that ends does not wait for it."""
    MemorySampler()

    assert all(t.daemon for t in threading.enumerate() if t.name == "memory-sampler")


def test_its_thread_ends_when_nobody_has_the_sampler_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that runs one job after another does not gather threads."""
    monkeypatch.setattr(memory_sampler, "INTERVAL_SECONDS", 0.01)
    before = set(threading.enumerate())
    sampler = MemorySampler()
    (thread,) = set(threading.enumerate()) - before
    assert thread.is_alive()

    del sampler
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_it_samples_by_itself() -> None:
    """A peak between two calls of ours is seen."""
    sampler = MemorySampler()
    seen = threading.Event()
    sample = sampler.sample

    def seeing() -> None:
        sample()
        seen.set()

    sampler.sample = seeing  # type: ignore[method-assign]

    assert seen.wait(60)
