"""A rank's peak memory, sampled: the kernel does not keep a peak of the proportional set size."""

import threading
import time
import weakref

from qlora_trainer.host.process_memory import process_memory, resident_needed

INTERVAL_SECONDS = 0.2
LARGEST_SHARE = 0.0005
"""Of the time, at most, that goes into proportional counts: the kernel walks all pages for them, 5 ms per GiB of small
ones, and meanwhile no thread of the process can map memory. Between them what a process has grown by is looked at,
which the kernel always knows."""


class MemorySampler:
    """Samples this process's memory in a daemon thread for as long as the sampler is referred to."""

    def __init__(self) -> None:
        self.baseline = self._counted = process_memory()
        """After the imports, before the model."""
        self._resident = resident_needed()
        """When pages were last counted."""
        self.peak_needed = self.baseline.needed
        """Bytes, anonymous and shared: what the kernel cannot drop."""
        self.peak_total = self.baseline.needed + self.baseline.file
        """Bytes, with this process's part of mapped files."""

        threading.Thread(
            target=_sample_often, args=(weakref.ref(self),), name="memory-sampler", daemon=True
        ).start()

    def sample(self) -> None:
        """Take one sample now."""
        self._counted, self._resident = process_memory(), resident_needed()
        self._keep(self._counted.needed)

    def glance(self) -> None:
        """Take one sample now, by how much the process has grown since the last count: pages that it got since are its
        own."""
        self._keep(self._counted.needed + resident_needed() - self._resident)

    def _keep(self, needed: int) -> None:
        self.peak_needed = max(self.peak_needed, needed)
        self.peak_total = max(self.peak_total, needed + self._counted.file)


def _sample_often(reference: "weakref.ref[MemorySampler]") -> None:
    due = 0.0
    while True:
        time.sleep(INTERVAL_SECONDS)
        sampler = reference()
        if sampler is None:
            return
        started = time.monotonic()
        if started < due:
            sampler.glance()
        else:
            sampler.sample()
            due = started + (time.monotonic() - started) / LARGEST_SHARE
        del sampler  # not referred to from here while it sleeps
