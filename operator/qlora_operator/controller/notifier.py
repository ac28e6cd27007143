"""Delivers notices to the address in the administrator's settings, beside the reconciliations, which wait for nothing.

At least once: what has been delivered is written into the job's status by its next reconciliation, and whoever comes
after this operator delivers the rest. A receiver tells duplicates by their id. A copy that may not write, since another
may lead, does not send either: it could not note what it has sent.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

import aiohttp

from qlora_contract.units import parse_time
from qlora_operator.api.names import Key
from qlora_operator.controller.job_facts import JobFacts
from qlora_operator.controller.metrics import Metrics
from qlora_operator.status.notices import TRIED_FOR, Notice

log = logging.getLogger(__name__)

CONTENT_TYPE = "application/cloudevents+json; charset=UTF-8"
POST_SECONDS = 10.0
"""How long one delivery may take."""
FIRST_RETRY_SECONDS = 2.0
MAX_RETRY_SECONDS = 600.0
MAX_PENDING = 5_000
"""Notices that are under way at a time; others are offered again at the next resync."""
MAX_CONCURRENT = 8
"""Requests at a time, at most."""


class Notifier:
    """One task for each notice until it is delivered, or too old."""

    def __init__(
        self,
        facts: JobFacts,
        metrics: Metrics,
        changed: Callable[[Key], None],
        now: Callable[[], datetime],
        may_send: Callable[[], bool],
        first_retry_seconds: float = FIRST_RETRY_SECONDS,
    ) -> None:
        """Prepare a notifier; `start` opens its session.

        Args:
            facts: gets what was delivered.
            metrics: count deliveries.
            changed: called with the key of each job of which something was delivered.
            now: the API server's time.
            may_send: whether no other copy of the operator can lead.
            first_retry_seconds: between the first two tries; twice as long each time after that.
        """
        self._facts, self._metrics, self._changed, self._now = facts, metrics, changed, now
        self._may_send = may_send
        self._first_retry_seconds = first_retry_seconds
        self._pending: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Be ready to deliver; needs a running event loop."""
        self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)
        self._free = asyncio.Semaphore(MAX_CONCURRENT)

    def offer(self, key: Key, uid: str, url: str, notice: Notice, event: dict[str, Any]) -> None:
        """Deliver an event, unless that is under way.

        Args:
            key: the job's.
            uid: the job's.
            url: of the receiver.
            notice: what the event is about.
            event: the body.
        """
        identity = str(event["id"])
        if identity in self._pending or self._facts.was_delivered(uid, notice.key):
            return
        if len(self._pending) < MAX_PENDING:
            task = asyncio.create_task(self._deliver(key, uid, url, notice, event))
            self._pending[identity] = task
            task.add_done_callback(lambda _: self._pending.pop(identity, None))

    async def close(self) -> None:
        """Stop; what is not delivered is found again by its status."""
        tasks = list(self._pending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    async def _deliver(self, key: Key, uid: str, url: str, notice: Notice, event: dict[str, Any]) -> None:
        delay = self._first_retry_seconds
        while (why := await self._post(url, event)) is not None:
            self._metrics.notifications.labels("failed").inc()
            if self._now() - parse_time(notice.time) > TRIED_FOR:
                log.warning(
                    "%s/%s: that it %s was not delivered, and is given up: %s", *key, notice.what, why
                )
                return
            level = logging.WARNING if delay == self._first_retry_seconds else logging.DEBUG
            log.log(level, "%s/%s: that it %s is not delivered yet: %s", *key, notice.what, why)
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RETRY_SECONDS)
        self._metrics.notifications.labels("delivered").inc()
        self._facts.set_delivered(uid, notice.key)
        self._changed(key)

    async def _post(self, url: str, event: dict[str, Any]) -> str | None:
        """Send it once; why that failed, or None."""
        async with self._free:
            while not self._may_send():
                await asyncio.sleep(self._first_retry_seconds)
            try:
                timeout = aiohttp.ClientTimeout(total=POST_SECONDS)
                headers = {"Content-Type": CONTENT_TYPE}
                async with self._session.post(
                    url, json=event, headers=headers, timeout=timeout, allow_redirects=False
                ) as answer:
                    return None if 200 <= answer.status < 300 else f"HTTP {answer.status}"
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                return type(error).__name__
