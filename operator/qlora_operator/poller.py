"""Asks rank 0 of every attempt that runs for its progress, a few at a time."""

import asyncio
import logging
from dataclasses import dataclass, field

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
MAX_POLL_SECONDS = 240.0
"""How rarely a rank 0 that does not answer is asked."""
AT_ONCE = 32


@dataclass
class _Followed:
    attempt: int
    address: str | None
    task: "asyncio.Task[None] | None" = field(default=None)


class Poller:
    """One task per running job, and a bound on how many ask at a time."""

    def __init__(self, cluster: Cluster, reconciler: Reconciler, queue: WorkQueue) -> None:
        self._cluster, self._reconciler, self._queue = cluster, reconciler, queue
        self._followed: dict[str, _Followed] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())

    def follow(self, key: Key, uid: str, attempt: int, pods: list[Pod]) -> None:
        """This attempt runs; its pods, as far as anybody looked."""
        known = self._followed.get(uid)
        if known is not None and known.attempt == attempt:
            known.address = _address(pods, attempt) or known.address
            return
        if known is not None and known.task is not None:
            known.task.cancel()
        followed = self._followed[uid] = _Followed(attempt, _address(pods, attempt))
        followed.task = asyncio.create_task(self._watch(key, uid, followed))

    def forget(self, uid: str) -> None:
        """The job does not run any more."""
        known = self._followed.pop(uid, None)
        if known is not None and known.task is not None:
            known.task.cancel()

    async def close(self) -> None:
        """End all."""
        for uid in list(self._followed):
            self.forget(uid)
        await self._session.close()

    async def _watch(self, key: Key, uid: str, followed: _Followed) -> None:
        delay = 0.0
        while True:
            await asyncio.sleep(delay)
            async with self._slots:
                answered = await self._ask(key, uid, followed)
            if answered:
                delay = POLL_SECONDS
            else:
                followed.address = None
                delay = min(max(2 * delay, POLL_SECONDS / 4), MAX_POLL_SECONDS)

    async def _ask(self, key: Key, uid: str, followed: _Followed) -> bool:
        try:
            if followed.address is None:
                pods = [pod(raw) for raw in await self._cluster.pods(key[0], uid)]
                followed.address = _address(pods, followed.attempt)
        except ApiError as error:
            log.debug("the pods of %s/%s could not be listed: %s", *key, error)
        if followed.address is None:
            return False
        report = await fetch(
            self._session, followed.address, PROGRESS_PORT, uid=uid, attempt=followed.attempt
        )
        if report is None:
            return False
        self._reconciler.reports[uid] = report
        self._queue.add(key)
        return True


def _address(pods: list[Pod], attempt: int) -> str | None:
    return next((each.address for each in pods if each.index == 0 and each.attempt == attempt), None)
