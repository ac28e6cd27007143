"""Asks rank 0 of every attempt that runs for its progress, a few at a time."""

import asyncio
import logging
import time
from dataclasses import dataclass

import aiohttp

from qlora_contract.places import PROGRESS_PORT
from qlora_operator.api.names import Key
from qlora_operator.cluster import ApiError, Cluster
from qlora_operator.progress import fetch
from qlora_operator.reconcile import Reconciler
from qlora_operator.status.observation import Pod, pod
from qlora_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

POLL_SECONDS = 15.0
FIRST_RETRY_SECONDS = 4.0
MAX_POLL_SECONDS = 240.0
"""How rarely a rank 0 that does not answer is asked."""
TICK_SECONDS = 0.5
"""How often it is looked who is to be asked."""
AT_ONCE = 32


@dataclass(slots=True)
class _Followed:
    key: Key
    attempt: int
    address: str | None
    """Of rank 0's pod, which keeps it for as long as it lives, and so as long as the attempt."""
    due: float = 0.0
    delay: float = 0.0
    asked: bool = False
    """Right now."""


class Poller:
    """One timer for all running jobs, and a bound on how many are asked at a time."""

    def __init__(self, cluster: Cluster, reconciler: Reconciler, queue: WorkQueue) -> None:
        self._cluster, self._reconciler, self._queue = cluster, reconciler, queue
        self._followed: dict[str, _Followed] = {}
        self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        self._asking: set[asyncio.Task[None]] = set()
        self._timer = asyncio.create_task(self._ticks())

    def follow(self, key: Key, uid: str, attempt: int, pods: list[Pod]) -> None:
        """This attempt runs; its pods, as far as anybody looked."""
        known = self._followed.get(uid)
        if known is None or known.attempt != attempt:
            known = self._followed[uid] = _Followed(key, attempt, None)
        known.address = _address(pods, attempt) or known.address

    def forget(self, uid: str) -> None:
        """The job does not run any more."""
        self._followed.pop(uid, None)

    async def close(self) -> None:
        """End all."""
        self._followed.clear()
        tasks = [self._timer, *self._asking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    async def _ticks(self) -> None:
        while True:
            self._tick(time.monotonic())
            await asyncio.sleep(TICK_SECONDS)

    def _tick(self, now: float) -> None:
        """Ask those who are due, the longest overdue first."""
        due = [(each.due, uid) for uid, each in self._followed.items() if each.due <= now and not each.asked]
        for _, uid in sorted(due)[: AT_ONCE - len(self._asking)]:
            followed = self._followed[uid]
            followed.asked = True
            task = asyncio.create_task(self._turn(uid, followed))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _turn(self, uid: str, followed: _Followed) -> None:
        answered = False
        try:
            answered = await self._ask(uid, followed)
        finally:
            silence = min(max(2 * followed.delay, FIRST_RETRY_SECONDS), MAX_POLL_SECONDS)
            followed.delay = POLL_SECONDS if answered else silence
            followed.due = time.monotonic() + followed.delay
            followed.asked = False

    async def _ask(self, uid: str, followed: _Followed) -> bool:
        key, attempt = followed.key, followed.attempt
        if followed.address is None:
            try:
                pods = [pod(raw) for raw in await self._cluster.pods(key[0], uid)]
            except ApiError as error:
                log.debug("the pods of %s/%s could not be listed: %s", *key, error)
                return False
            followed.address = _address(pods, attempt)
        if followed.address is None:
            return False
        report = await fetch(self._session, followed.address, PROGRESS_PORT, uid=uid, attempt=attempt)
        if report is None or self._followed.get(uid) is not followed:
            return False
        self._reconciler.reports[uid] = report
        self._queue.add(key)
        return True


def _address(pods: list[Pod], attempt: int) -> str | None:
    return next((each.address for each in pods if each.index == 0 and each.attempt == attempt), None)
