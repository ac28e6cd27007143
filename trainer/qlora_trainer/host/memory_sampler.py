"""A rank's peak memory, sampled: the kernel does not keep a peak of the proportional set size."""

import threading
import time
import weakref

from qlora_trainer.host.process_memory import process_memory

INTERVAL_SECONDS = 0.2
LARGEST_SHARE = 0.02
"""Of the time, at most, that goes into sampling: the kernel walks all pages for a sample, 5 ms per GiB of small ones,
and meanwhile no thread of the process can map memory."""


class MemorySampler:
    """Samples this process's memory in a daemon thread for as long as the sampler is referred to."""

    def __init__(self) -> None:
        self.baseline = process_memory()
        """After the imports, before the model."""
        self.peak_needed = self.baseline.needed
        """Bytes, anonymous and shared: what the kernel cannot drop."""
        self.peak_total = self.baseline.needed + self.baseline.file
        """Bytes, with this process's part of mapped files."""

        threading.Thread(
            target=_sample_often, args=(weakref.ref(self),), name="memory-sampler", daemon=True
        ).start()

    def sample(self) -> None:
        """Take one sample now."""
        memory = process_memory()
        self.peak_needed = max(self.peak_needed, memory.needed)
        self.peak_total = max(self.peak_total, memory.needed + memory.file)


def _sample_often(reference: "weakref.ref[MemorySampler]") -> None:
    pause = INTERVAL_SECONDS
    while True:
        time.sleep(pause)
        sampler = reference()
        if sampler is None:
            return
        started = time.perf_counter()
        sampler.sample()
        pause = max(INTERVAL_SECONDS, (time.perf_counter() - started) / LARGEST_SHARE)
        del sampler  # not referred to from here while it sleeps
