"""Polls rank 0 of every running attempt for its progress, a few at a time."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp

from qlora_contract.env import PROGRESS_PORT
from qlora_operator.api.names import Key
from qlora_operator.controller.api_client import ApiClient, ApiError
from qlora_operator.controller.job_facts import JobFacts
from qlora_operator.controller.progress_client import fetch_progress
from qlora_operator.status.observation import Pod, pod

log = logging.getLogger(__name__)

POLL_SECONDS = 15.0
FIRST_RETRY_SECONDS = 4.0
MAX_POLL_SECONDS = 240.0
"""The longest interval between polls of a rank 0 that does not answer."""
TICK_SECONDS = 0.5
"""Between two looks for attempts that are due."""
MAX_CONCURRENT = 32
"""Requests at a time, at most."""


@dataclass(slots=True)
class _Tracked:
    key: Key
    attempt: int
    job_uid: str
    """Uid of the attempt's batch/v1 Job."""
    address: str | None
    """Address of rank 0's pod; it stays the same for the whole attempt. None: not known yet."""
    due: float = 0.0
    delay: float = 0.0
    polling: bool = False
    """A request is under way."""


class ProgressPoller:
    """One timer for all running attempts, with a bound on concurrent requests."""

    def __init__(self, client: ApiClient, facts: JobFacts, changed: Callable[[Key], None]) -> None:
        """Prepare a poller; `start` starts its timer.

        Args:
            client: lists the pods of an attempt whose rank 0 has no known address.
            facts: gets the reports.
            changed: called with the key of each job that has reported.
        """
        self._client, self._facts, self._changed = client, facts, changed
        self._tracked: dict[str, _Tracked] = {}
        self._requests: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start polling; needs a running event loop."""
        self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)
        self._timer = asyncio.create_task(self._run())

    def track(self, key: Key, uid: str, attempt: int, job_uid: str, pods: Sequence[Pod]) -> None:
        """Poll this attempt from now on: its batch/v1 Job, and those of its pods that are known."""
        known = self._tracked.get(uid)
        if known is None or (known.attempt, known.job_uid) != (attempt, job_uid):
            known = self._tracked[uid] = _Tracked(key, attempt, job_uid, None)
        known.address = _address(pods, job_uid) or known.address

    def untrack(self, uid: str) -> None:
        """Stop polling a job."""
        self._tracked.pop(uid, None)

    async def close(self) -> None:
        """Stop polling, cancel requests and close the session."""
        self._tracked.clear()
        tasks = [self._timer, *self._requests]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    async def _run(self) -> None:
        while True:
            now = time.monotonic()
            due = [
                (target.due, uid)
                for uid, target in self._tracked.items()
                if target.due <= now and not target.polling
            ]
            # The longest overdue first.
            for _, uid in sorted(due)[: MAX_CONCURRENT - len(self._requests)]:
                tracked = self._tracked[uid]
                tracked.polling = True
                task = asyncio.create_task(self._poll(uid, tracked))
                self._requests.add(task)
                task.add_done_callback(self._requests.discard)
            await asyncio.sleep(TICK_SECONDS)

    async def _poll(self, uid: str, tracked: _Tracked) -> None:
        answered = False
        try:
            answered = await self._request(uid, tracked)
        finally:
            backoff = min(max(2 * tracked.delay, FIRST_RETRY_SECONDS), MAX_POLL_SECONDS)
            tracked.delay = POLL_SECONDS if answered else backoff
            tracked.due = time.monotonic() + tracked.delay
            tracked.polling = False

    async def _request(self, uid: str, tracked: _Tracked) -> bool:
        key, attempt = tracked.key, tracked.attempt
        if tracked.address is None:
            try:
                pods = [pod(raw) for raw in await self._client.pods(key[0], uid)]
            except ApiError as error:
                log.debug("the pods of %s/%s could not be listed: %s", *key, error)
                return False
            tracked.address = _address(pods, tracked.job_uid)
        if tracked.address is None:
            return False
        report = await fetch_progress(self._session, tracked.address, PROGRESS_PORT, uid=uid, attempt=attempt)
        if report is None or self._tracked.get(uid) is not tracked:
            return False
        self._facts.put_report(uid, report)
        self._changed(key)
        return True


def _address(pods: Sequence[Pod], job_uid: str) -> str | None:
    """Rank 0's, among the pods that the attempt's Job has made: others may carry its labels."""
    return next((pod.address for pod in pods if pod.index == 0 and pod.owner_uid == job_uid), None)
