"""The three standard descriptors of a process, which whoever started it may have closed."""

import os
import sys


def open_standard_descriptors() -> None:
    """Open those of the first three descriptors that are closed, on nothing.

    Else the next files that are opened, a lock or run.json, get their numbers, and what writes to standard error writes
    into them.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
