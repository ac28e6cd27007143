"""A rank's peak memory, sampled: the kernel keeps no peak of proportional set size."""

import ctypes
import threading

from qlora_trainer import cpu

INTERVAL_SECONDS = 0.2


class MemoryWatch:
    """Samples this process's memory in a thread of its own until the process ends."""

    def __init__(self) -> None:
        self.baseline = cpu.process_memory()
        """After the imports, before the model."""
        self.peak_needed = self.baseline.needed
        """Bytes, anonymous and shared: what cannot be dropped."""
        self.peak_total = self.baseline.needed + self.baseline.file
        """Bytes, with this process's part of mapped files."""
        threading.Thread(target=self._run, name="memory-watch", daemon=True).start()

    def sample(self) -> None:
        """Take one sample now."""
        memory = cpu.process_memory()
        self.peak_needed = max(self.peak_needed, memory.needed)
        self.peak_total = max(self.peak_total, memory.needed + memory.file)

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(INTERVAL_SECONDS):
            self.sample()


def return_freed() -> None:
    """Give freed memory back to the system, where the C library can (glibc's malloc_trim).

    An evaluation or a loader leaves holes that training, whose tensors have other sizes, would not fill.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
