"""A value that many ask for and few need to fetch."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class TtlCache(Generic[T]):
    """A cached value with a time to live and a single refresher: who asks meanwhile waits for its answer.

    An error is raised to the one who refreshed; the next one to ask tries again.
    """

    def __init__(self, fetch: Callable[[], Awaitable[T]], seconds: float) -> None:
        self._fetch, self._seconds = fetch, seconds
        self._expires = 0.0
        self._lock = asyncio.Lock()
        self._value: T

    async def get(self) -> T:
        """The value, no older than its time to live."""
        async with self._lock:
            if time.monotonic() >= self._expires:
                self._expires = 0.0
                self._value = await self._fetch()
                self._expires = max(self._expires, time.monotonic() + self._seconds)
            return self._value

    def keep(self, seconds: float) -> None:
        """The value is good for so many seconds from now, longer or shorter than usual; with 0 it is fetched anew.
        The fetching function may call this about what it is going to return."""
        self._expires = time.monotonic() + seconds
