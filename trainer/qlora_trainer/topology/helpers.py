"""Threads of a rank that do not compute, kept off the CPUs of those that do."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from qlora_trainer.cpu import parse_cpu_list
from qlora_trainer.topology.environment import HELPERS_ENV


@contextmanager
def on_helpers(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Threads that are started inside stay on the CPUs for helpers, if this rank has some.

    A thread inherits the affinity of the one that starts it, so that one moves over for the time. Nothing that
    computes in parallel may run inside for the first time: it would start its threads there.
    """
    named = environ.get(HELPERS_ENV)
    if not named:
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, parse_cpu_list(named))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
