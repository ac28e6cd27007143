"""A rank's own memory, sampled."""

import mmap
import threading
from pathlib import Path

from qlora_trainer.memory_watch import MemoryWatch

MIB = 2**20


def test_a_peak_stays_after_the_memory_is_given_back() -> None:
    """64 MiB that were used for a while are in the peak of what was needed, and not in the baseline."""
    watch = MemoryWatch()
    used = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, len(used), mmap.PAGESIZE):
        used[page] = 1
    watch.sample()
    used.close()
    watch.sample()

    assert watch.peak_needed - watch.baseline.needed >= 60 * MIB


def test_mapped_files_are_told_apart(tmp_path: Path) -> None:
    """Pages of a mapped file count in the total alone: the kernel can drop them."""
    (tmp_path / "file").write_bytes(b"\1" * (64 * MIB))
    watch = MemoryWatch()
    with (tmp_path / "file").open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        read = sum(mapped[page] for page in range(0, len(mapped), mmap.PAGESIZE))
        watch.sample()
        mapped.close()

    assert read == 64 * MIB // mmap.PAGESIZE
    assert watch.peak_total - (watch.baseline.needed + watch.baseline.file) >= 60 * MIB
    assert watch.peak_needed - watch.baseline.needed < 32 * MIB


def test_the_watch_keeps_no_process_alive() -> None:
    """Its thread is a daemon: a rank that ends does not wait for it."""
    MemoryWatch()

    assert all(t.daemon for t in threading.enumerate() if t.name == "memory-watch")


def test_it_samples_by_itself() -> None:
    """A peak between two calls of ours is seen."""
    watch = MemoryWatch()
    seen = threading.Event()
    sample = watch.sample

    def seeing() -> None:
        sample()
        seen.set()

    watch.sample = seeing  # type: ignore[method-assign]

    assert seen.wait(60)
