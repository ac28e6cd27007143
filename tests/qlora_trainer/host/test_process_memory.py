"""Memory of this process."""

import platform

import pytest

from qlora_trainer.host import process_memory

ROLLUP = """56288311e000-7ffc3081f000 ---p 00000000 00:00 0                          [rollup]
Rss:                1736 kB
Pss:                 306 kB
Pss_Anon:            112 kB
Pss_File:            194 kB
Pss_Shmem:             8 kB
"""


def test_memory_is_told_apart_by_what_is_behind_it() -> None:
    """Anonymous, shared and file-backed memory are separate, in bytes; only the first two are needed."""
    memory = process_memory.parse_smaps_rollup(ROLLUP)

    assert (memory.anonymous, memory.shared, memory.file) == (112 * 1024, 8 * 1024, 194 * 1024)
    assert memory.needed == 120 * 1024


def test_an_old_kernel_is_refused() -> None:
    """Without Pss_Anon the message says which kernel is needed."""
    with pytest.raises(process_memory.UnsupportedKernelError, match=r"Linux 5\.4"):
        process_memory.parse_smaps_rollup("Rss: 1 kB\nPss: 1 kB\n")


def test_allocated_memory_is_seen() -> None:
    """Memory that this process writes to shows up as anonymous."""
    before = process_memory.process_memory().anonymous
    block = bytearray(b"x" * (64 << 20))

    assert process_memory.process_memory().anonymous - before >= (60 << 20)
    assert len(block) == 64 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_freed_memory_is_returned() -> None:
    """Pages between blocks that stay are given back, which glibc does not do by itself."""
    blocks = [bytearray(1000) for _ in range(100_000)]
    kept = blocks[::64]
    del blocks
    before = process_memory.process_memory().anonymous
    process_memory.malloc_trim()

    assert before - process_memory.process_memory().anonymous > 50 << 20
    assert len(kept) == 1563
