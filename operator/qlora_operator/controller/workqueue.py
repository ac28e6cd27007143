"""A keyed work queue: at most one worker per key, delayed keys, and exponential backoff after failures."""

import asyncio
import contextlib
import heapq
import itertools
import logging
import time
from collections.abc import Awaitable, Callable

from qlora_operator.api.names import Key
from qlora_operator.controller.api_client import ApiError

log = logging.getLogger(__name__)

Work = Callable[[Key], Awaitable[float | None]]
"""Processes a key. Returns the seconds after which to requeue it; None: only an event brings it back."""

FIRST_RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 30.0
CANCEL_SECONDS = 0.5
"""How long a worker has to notice that it is cancelled."""
STARVATION_LIMIT_SECONDS = 60.0
"""How long delayed keys that are due yield to fresh events."""


class WorkQueue:
    """Keys to process. A key that is added while it is being processed is processed once more afterwards.

    Under load, fresh events go before delayed keys that are due: many a delayed look is no longer needed when its
    turn comes. Namespaces take turns, so that one with thousands of jobs holds up no other.
    """

    def __init__(self, work: Work, workers: int = 16, failed: Callable[[], None] = lambda: None) -> None:
        """Prepare a queue; `start` starts its workers.

        Args:
            work: processes one key.
            workers: keys processed at the same time, at most.
            failed: called after each failure of `work`.
        """
        self._work, self._workers, self._failed = work, workers, failed
        self._ready: dict[str, dict[Key, float]] = {}
        """Keys to process as soon as possible, by namespace, in the order in which they were added -> when that was.
        The namespace whose turn is next comes first."""
        self._delayed: dict[Key, float] = {}
        """Keys to process later -> when they are due; their order is the heap's."""
        self._heap: list[tuple[float, int, Key]] = []
        self._count = itertools.count()
        self._busy: dict[Key, float] = {}
        self._finished: float | None = None
        """Monotonic time at which a key was last processed, be it with an error, or of the start; None: before it."""
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    def __len__(self) -> int:
        return sum(map(len, self._ready.values())) + sum(
            due <= time.monotonic() for due in self._delayed.values()
        )

    @property
    def busy(self) -> int:
        """Keys being processed."""
        return len(self._busy)

    def idle(self) -> float:
        """Seconds for which nothing was finished although something was due; 0 when nothing is due.

        How long a key waits says nothing: in a burst it waits for thousands of others, and while the API server does
        not answer each try takes as long as a request may. Before the start nothing is due, whatever was added.
        """
        if self._finished is None:
            return 0.0
        now = time.monotonic()
        waiting = [
            *(since for keys in self._ready.values() for since in keys.values()),
            *(due for due in self._delayed.values() if due <= now),
            *self._busy.values(),
        ]
        return now - max(self._finished, min(waiting)) if waiting else 0.0

    def longest(self) -> float:
        """Seconds for which the longest of what is being processed has been."""
        now = time.monotonic()
        return now - min(self._busy.values(), default=now)

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Process a key after `delay` seconds, or earlier if it was already queued for an earlier time."""
        due = time.monotonic() + delay
        if self._stopping or key in self._ready.get(key[0], ()):
            return
        if delay and self._delayed.get(key, float("inf")) <= due:
            return
        if delay:
            self._delayed[key] = due
            heapq.heappush(self._heap, (due, next(self._count), key))
            # Heap entries of keys that were requeued earlier would stay until their old time, perhaps hours.
            if len(self._heap) > 2 * len(self._delayed) + self._workers:
                self._heap = [item for item in self._heap if self._delayed.get(item[2]) == item[0]]
                heapq.heapify(self._heap)
        else:
            self._ready.setdefault(key[0], {})[key] = min(due, self._delayed.pop(key, due))
        self._wake()

    def start(self) -> None:
        """Start the workers, with what was added so far."""
        self._finished = time.monotonic()
        self._tasks = [asyncio.create_task(self._worker()) for _ in range(self._workers)]

    async def stop(self, drain_timeout: float = 5.0) -> None:
        """Drop what is queued, give the workers `drain_timeout` seconds to finish, then cancel them."""
        deadline = time.monotonic() + drain_timeout
        self._stopping = True
        self._ready.clear()
        self._delayed.clear()
        while self._busy and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        # Again and again: a request that ends in the moment in which it is cancelled may swallow that.
        while pending := [task for task in self._tasks if not task.done()]:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=CANCEL_SECONDS)

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
                delay = await self._process(key)
                if delay is not None:
                    self.add(key, delay)
            finally:
                del self._busy[key]
                self._finished = time.monotonic()
                self._wake()

    async def _next(self) -> Key:
        async with self._changed:
            while True:
                key, wait = self._take()
                if key is not None:
                    # The worker that waited for the next due key may be the one that takes this one.
                    self._changed.notify()
                    return key
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), wait)

    def _take(self) -> tuple[Key | None, float | None]:
        """(a key that is due and not in progress, None), or (None, seconds until the next one is due)."""
        now = time.monotonic()
        key, wait = self._pop_due(now - STARVATION_LIMIT_SECONDS)
        key = key or self._next_ready()
        if key is None:
            key, wait = self._pop_due(now)
        if key is not None and key in (keys := self._ready.get(key[0], {})):
            # To the end with its namespace: the others have their turns first.
            del self._ready[key[0]]
            del keys[key]
            if keys:
                self._ready[key[0]] = keys
        return key, wait

    def _next_ready(self) -> Key | None:
        ready = (key for keys in self._ready.values() for key in keys if key not in self._busy)
        return next(ready, None)

    def _pop_due(self, now: float) -> tuple[Key | None, float | None]:
        """As `_take`, of the delayed keys that are due at `now`."""
        held, found, wait = [], None, None
        while self._heap:
            due, _, key = self._heap[0]
            if self._delayed.get(key) != due:  # requeued for an earlier time, or dropped
                heapq.heappop(self._heap)
            elif due > now:
                wait = due - now
                break
            elif key in self._busy:
                held.append(heapq.heappop(self._heap))
            else:
                heapq.heappop(self._heap)
                del self._delayed[key]
                found = key
                break
        for item in held:
            heapq.heappush(self._heap, item)
        return found, wait

    async def _process(self, key: Key) -> float | None:
        try:
            delay = await self._work(key)
        except ApiError as error:
            return self._retry(key, f"the API server refused: {error}", error.retry_after)
        except Exception:
            log.exception("an unexpected error")
            return self._retry(key, "reconciling failed", None)
        self._failures.pop(key, None)
        return delay

    def _retry(self, key: Key, why: str, after: float | None) -> float:
        """Seconds until the next try: what the server asks for, else doubled after each failure in a row."""
        self._failed()
        if after is not None:
            delay = after
        else:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            delay = min(FIRST_RETRY_SECONDS * 2.0 ** min(failures - 1, 10), MAX_RETRY_SECONDS)
        log.warning("%s/%s: %s; retrying in %.1f s", *key, why, delay)
        return delay
