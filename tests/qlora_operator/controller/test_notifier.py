"""Notices on their way to a receiver that is down, slow, or elsewhere."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from qlora_contract.units import rfc3339
from qlora_operator.api.names import Key
from qlora_operator.controller.job_facts import JobFacts
from qlora_operator.controller.metrics import Metrics
from qlora_operator.controller.notifier import Notifier
from qlora_operator.status.notices import TRIED_FOR, Notice

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
KEY = ("team", "job")
STARTED = Notice("started", rfc3339(NOW))
EVENT = {"id": "u-started", "type": "dev.qlora.job.started"}


class Receiver:
    """A server that answers with these statuses, one after the other, then with 204."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.got: list[tuple[str, Any]] = []
        self.now = NOW
        self.leads = True
        self.changed: list[Key] = []
        self.facts = JobFacts()
        self.metrics = Metrics(CollectorRegistry(), "1")

    async def post(self, request: web.Request) -> web.Response:
        """One delivery."""
        self.got.append((request.headers["Content-Type"], json.loads(await request.read())))
        status = self.statuses.pop(0) if self.statuses else 204
        return web.Response(status=status, headers={"Location": "/elsewhere"} if status == 302 else {})

    def told(self, result: str) -> float:
        """What the metrics say."""
        return self.metrics.registry.get_sample_value("qlora_notifications_total", {"result": result}) or 0


Play = Callable[[Notifier, str], Awaitable[None]]


def run(receiver: Receiver, play: Play) -> None:
    """Play with a notifier and the receiver's address."""

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/", receiver.post)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        notifier = Notifier(
            receiver.facts,
            receiver.metrics,
            receiver.changed.append,
            lambda: receiver.now,
            lambda: receiver.leads,
            0.01,
        )
        notifier.start()
        try:
            await play(notifier, f"http://127.0.0.1:{port}/")
        finally:
            await notifier.close()
            await runner.cleanup()

    asyncio.run(asyncio.wait_for(main(), 30))


async def until(happened: Callable[[], Any]) -> None:
    """Return once it happened."""
    while not happened():
        await asyncio.sleep(0.005)


def test_a_notice_is_posted_as_a_cloud_event() -> None:
    """Once; who offers it again while it is under way, or after that, does not make it two."""
    receiver = Receiver()

    async def play(notifier: Notifier, url: str) -> None:
        for _ in range(2):
            notifier.offer(KEY, "u", url, STARTED, EVENT)
        await until(lambda: receiver.changed)
        notifier.offer(KEY, "u", url, STARTED, EVENT)
        await asyncio.sleep(0.05)

    run(receiver, play)

    assert receiver.got == [("application/cloudevents+json; charset=UTF-8", EVENT)]
    assert receiver.changed == [KEY]
    assert receiver.facts.delivered("u") == {STARTED.key}
    assert (receiver.told("delivered"), receiver.told("failed")) == (1, 0)


@pytest.mark.parametrize("status", [302, 404, 500, 503])
def test_what_is_refused_is_tried_again_with_the_same_id(status: int) -> None:
    """Whoever set the address may set it right. A redirection is followed nowhere."""
    receiver = Receiver(status, status)

    async def play(notifier: Notifier, url: str) -> None:
        notifier.offer(KEY, "u", url, STARTED, EVENT)
        await until(lambda: receiver.changed)

    run(receiver, play)

    assert [event for _, event in receiver.got] == [EVENT] * 3
    assert receiver.told("failed") == 2


def test_a_receiver_that_is_gone_is_given_up_and_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The offer returns at once; after some hours the log says that it was in vain."""
    receiver = Receiver()

    async def play(notifier: Notifier, _: str) -> None:
        notifier.offer(KEY, "u", "http://127.0.0.1:9/", STARTED, EVENT)
        await until(lambda: receiver.told("failed"))
        receiver.now = NOW + TRIED_FOR + timedelta(seconds=1)
        await until(lambda: "given up" in caplog.text)

    run(receiver, play)

    assert receiver.changed == []
    assert receiver.facts.delivered("u") == frozenset()


def test_an_operator_that_stops_leaves_what_is_not_delivered() -> None:
    """It is found again by the job's status."""
    receiver = Receiver(*[500] * 1000)

    async def play(notifier: Notifier, url: str) -> None:
        notifier.offer(KEY, "u", url, STARTED, EVENT)
        await until(lambda: receiver.got)

    run(receiver, play)

    assert receiver.facts.delivered("u") == frozenset()


def test_a_copy_that_may_no_longer_write_tells_nobody() -> None:
    """Another may lead by now, and tell; once this one is sure again to lead, it goes on."""
    receiver = Receiver(503)

    async def play(notifier: Notifier, url: str) -> None:
        notifier.offer(KEY, "u", url, STARTED, EVENT)
        await until(lambda: receiver.told("failed"))
        receiver.leads = False
        await asyncio.sleep(0.1)  # several times the pause between two tries
        assert len(receiver.got) == 1
        receiver.leads = True
        await until(lambda: receiver.changed)

    run(receiver, play)

    assert len(receiver.got) == 2
