"""Waiting for a cluster to come to a state."""

import time
from collections.abc import Callable
from typing import TypeVar

from testcluster.errors import ClusterError

T = TypeVar("T")


def wait_for(
    what: Callable[[], T | None],
    seconds: float = 30,
    *,
    or_else: str | Callable[[], str] = "",
    every: float = 0.02,
) -> T:
    """What the function gives as soon as it is true; ClusterError after `seconds`. `or_else` names what was waited
    for, or is asked how things stood instead."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > deadline:
            named = or_else if isinstance(or_else, str) and or_else else "what was waited for"
            stood = f": {or_else()}" if callable(or_else) else ""
            raise ClusterError(f"{named} did not come within {seconds:g} s{stood}")
        time.sleep(every)
    return found
