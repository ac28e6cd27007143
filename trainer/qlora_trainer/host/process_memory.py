"""This process's memory: how much it uses, by what is behind it, and how to return what it has freed."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.host.kernel_files import parse_fields


class UnsupportedKernelError(RuntimeError):
    """The kernel is older than what we need; the message names the version that is new enough."""


@dataclass(frozen=True)
class ProcessMemory:
    """Proportional set size of a process in bytes, by what is behind it."""

    anonymous: int
    shared: int
    """Shared memory (tmpfs, memfd), this process's part."""
    file: int
    """Mapped files, this process's part: the kernel can drop and reread them."""

    @property
    def needed(self) -> int:
        """What the kernel cannot drop: anonymous and shared memory."""
        return self.anonymous + self.shared


def parse_smaps_rollup(text: str) -> ProcessMemory:
    """ProcessMemory from the text of smaps_rollup. Raises UnsupportedKernelError before Linux 5.4."""
    sizes = {key: 1024 * int(value.split()[0]) for key, value in parse_fields(text) if value.endswith(" kB")}
    if "Pss_Anon" not in sizes:
        raise UnsupportedKernelError(
            "/proc/self/smaps_rollup does not contain Pss_Anon: Linux 5.4 or newer is needed"
        )
    return ProcessMemory(sizes["Pss_Anon"], sizes["Pss_Shmem"], sizes["Pss_File"])


def resident_needed() -> int:
    """Bytes of anonymous and shared memory that this process has, pages of others too. Costs nothing: the kernel keeps
    these counts, while for the proportional ones it walks all pages."""
    fields = parse_fields(Path("/proc/self/status").read_text())
    return 1024 * sum(int(value.split()[0]) for key, value in fields if key in ("RssAnon", "RssShmem"))


def process_memory() -> ProcessMemory:
    """What this process uses now. Raises UnsupportedKernelError before Linux 5.4."""
    return parse_smaps_rollup(Path("/proc/self/smaps_rollup").read_text())


def malloc_trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    An evaluation or a loader leaves holes that training, whose tensors have other sizes, would not fill.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
