"""Waiting for a cluster to come to a state."""

import time
from collections.abc import Callable
from typing import TypeVar

from testcluster.errors import ClusterError

T = TypeVar("T")


def wait_for(what: Callable[[], T | None], seconds: float = 30, *, or_else: str = "") -> T:
    """What the function gives as soon as it is true; ClusterError after `seconds`, with `or_else` to say of what."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > deadline:
            raise ClusterError(f"{or_else or 'what was waited for'} did not come within {seconds:g} s")
        time.sleep(0.02)
    return found
