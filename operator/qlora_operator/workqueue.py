"""A keyed queue: one worker at a time for each key, with delays, and a growing one after failures."""

import asyncio
import contextlib
import heapq
import itertools
import logging
import time
from collections.abc import Awaitable, Callable

from qlora_operator.api.names import Key
from qlora_operator.cluster import ApiError

log = logging.getLogger(__name__)

Work = Callable[[Key], Awaitable[float | None]]
"""Does the work for a key; seconds until it is wanted again, None when only an event shall bring it back."""

FIRST_RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 30.0
PATIENT_SECONDS = 60.0
"""How long what is due by the clock lets what has just happened go first."""


class WorkQueue:
    """Keys to be worked on. A key that is added while it is worked on is worked on once more afterwards.

    In a rush, what has just happened goes before what is due by the clock: many a look is not needed any more
    when its turn comes.
    """

    def __init__(self, work: Work, workers: int = 16, failed: Callable[[], None] = lambda: None) -> None:
        self._work, self._workers, self._failed = work, workers, failed
        self._now: dict[Key, float] = {}
        """To be worked on as soon as possible, in the order of their coming; since when."""
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._count = itertools.count()
        self._busy: dict[Key, float] = {}
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    def __len__(self) -> int:
        return len(self._now) + sum(due <= time.monotonic() for due in self._due.values())

    @property
    def busy(self) -> int:
        """Workers at work."""
        return len(self._busy)

    def oldest(self) -> float:
        """Seconds for which the key that has waited, or been worked on, the longest is overdue."""
        now = time.monotonic()
        begun = [
            *self._busy.values(),
            *self._now.values(),
            *(due for due in self._due.values() if due <= now),
        ]
        return now - min(begun, default=now)

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Work on a key after so many seconds, or earlier where that was wanted before."""
        due = time.monotonic() + delay
        if self._stopping or key in self._now or (delay and self._due.get(key, float("inf")) <= due):
            return
        if delay:
            self._due[key] = due
            heapq.heappush(self._heap, (due, next(self._count), key))
            self._tidy()
        else:
            self._now[key] = min(due, self._due.pop(key, due))
        self._wake()

    def start(self) -> None:
        """Begin."""
        self._tasks = [asyncio.create_task(self._worker()) for _ in range(self._workers)]

    async def stop(self, patience: float = 10.0) -> None:
        """Let the workers finish what they are at, for so many seconds, and end them. Nothing is begun any
        more."""
        deadline = time.monotonic() + patience
        self._stopping = True
        self._now.clear()
        self._due.clear()
        while self._busy and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _wake(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify()

        self._waker = asyncio.ensure_future(notify())

    async def _worker(self) -> None:
        while True:
            key = await self._next()
            self._busy[key] = time.monotonic()
            try:
                self._again(key, await self._attempt(key))
            finally:
                del self._busy[key]
                self._wake()

    def _again(self, key: Key, delay: float | None) -> None:
        if delay is not None:
            self.add(key, delay)

    async def _next(self) -> Key:
        async with self._changed:
            while True:
                key, wait = self._ready()
                if key is not None:
                    # Whoever waited for the key that is due next may be the one that goes to work now.
                    self._changed.notify()
                    return key
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), wait)

    def _ready(self) -> tuple[Key | None, float | None]:
        """A key that is due and not being worked on; else how long to wait for the next."""
        now = time.monotonic()
        key, wait = self._timed(now - PATIENT_SECONDS)
        key = key or next((each for each in self._now if each not in self._busy), None)
        if key is None:
            key, wait = self._timed(now)
        if key is not None:
            self._now.pop(key, None)
        return key, wait

    def _tidy(self) -> None:
        """Of keys that came back before their time, the old times would stay until then: hours, it may be."""
        if len(self._heap) > 2 * len(self._due) + self._workers:
            self._heap = [item for item in self._heap if self._due.get(item[2]) == item[0]]
            heapq.heapify(self._heap)

    def _timed(self, now: float) -> tuple[Key | None, float | None]:
        """A key that is due by this time."""
        held, found, wait = [], None, None
        while self._heap:
            due, _, key = self._heap[0]
            if self._due.get(key) != due:  # added anew for an earlier time, or forgotten
                heapq.heappop(self._heap)
            elif due > now:
                wait = due - now
                break
            elif key in self._busy:
                held.append(heapq.heappop(self._heap))
            else:
                heapq.heappop(self._heap)
                del self._due[key]
                found = key
                break
        for item in held:
            heapq.heappush(self._heap, item)
        return found, wait

    async def _attempt(self, key: Key) -> float | None:
        try:
            delay = await self._work(key)
        except ApiError as error:
            return self._retry(key, f"the API server refused: {error}", error.retry_after)
        except Exception:
            log.exception("reconciling failed")
            return self._retry(key, "it will be tried again", None)
        self._failures.pop(key, None)
        return delay

    def _retry(self, key: Key, why: str, after: float | None) -> float:
        """Seconds until the next try: what the server asks for, else more after each failure in a row."""
        self._failed()
        if after is not None:
            delay = after
        else:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            delay = min(FIRST_RETRY_SECONDS * 2.0 ** min(failures - 1, 10), MAX_RETRY_SECONDS)
        log.warning("%s/%s: %s; again in %.1f s", *key, why, delay)
        return delay
