"""Keeps a rank's service threads (communication, heartbeat, progress) off the CPUs that compute."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from qlora_contract.cpus import parse_cpu_list

SERVICE_CPUS_ENV = "QLORA_HELPER_CPUS"
"""CPU list for a rank's service threads, set by its launcher. Unset: they share the rank's CPUs."""


@contextmanager
def on_service_cpus(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Threads that are started inside stay on the rank's service CPUs, where it has some.

    A thread inherits the affinity of the one that starts it, so the calling thread moves there meanwhile. Nothing that
    computes in parallel may run inside for the first time: it would start its threads there.
    """
    cpu_list = environ.get(SERVICE_CPUS_ENV)
    if not cpu_list:
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, parse_cpu_list(cpu_list))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
