"""A rank's peak memory, sampled: the kernel does not keep a peak of the proportional set size."""

import threading

from qlora_trainer.host.process_memory import process_memory

INTERVAL_SECONDS = 0.2


class MemorySampler:
    """Samples this process's memory in a daemon thread until the process ends."""

    def __init__(self) -> None:
        self.baseline = process_memory()
        """After the imports, before the model."""
        self.peak_needed = self.baseline.needed
        """Bytes, anonymous and shared: what the kernel cannot drop."""
        self.peak_total = self.baseline.needed + self.baseline.file
        """Bytes, with this process's part of mapped files."""

        def run() -> None:
            pause = threading.Event()
            while not pause.wait(INTERVAL_SECONDS):
                self.sample()

        threading.Thread(target=run, name="memory-sampler", daemon=True).start()

    def sample(self) -> None:
        """Take one sample now."""
        memory = process_memory()
        self.peak_needed = max(self.peak_needed, memory.needed)
        self.peak_total = max(self.peak_total, memory.needed + memory.file)
