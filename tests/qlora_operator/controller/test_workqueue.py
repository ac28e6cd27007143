"""The queue: one worker at a time for each key, delays, and what it does about failures."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from qlora_operator.controller import workqueue
from qlora_operator.controller.api_client import ApiError
from qlora_operator.controller.workqueue import Key, WorkQueue

A, B = ("team", "a"), ("team", "b")


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine for five seconds at most."""
    asyncio.run(asyncio.wait_for(test(), 5))


async def until(check: Callable[[], bool]) -> None:
    """Wait until it is so."""
    while not check():
        await asyncio.sleep(0.001)


def test_one_worker_for_each_key() -> None:
    """A key that is added while it is worked on is worked on once more afterwards, and never twice at a time."""

    async def test() -> None:
        begun, go = [], asyncio.Event()

        async def work(key: Key) -> None:
            begun.append(key)
            assert queue.busy <= 2
            await go.wait()

        queue = WorkQueue(work)
        queue.start()
        for key in (A, A, B):
            queue.add(key)
        await until(lambda: len(begun) == 2)
        queue.add(A)
        queue.add(A)
        await asyncio.sleep(0.02)
        assert sorted(begun) == [A, B]
        go.set()
        await until(lambda: len(begun) == 3)
        await asyncio.sleep(0.02)
        assert sorted(begun) == [A, A, B]
        await queue.stop()

    run(test)


def test_earliest_time_counts() -> None:
    """A key that is wanted later, and then now, is worked on now, and not once more later."""

    async def test() -> None:
        done: list[Key] = []
        queue = WorkQueue(_note(done))
        queue.start()
        queue.add(A, 0.05)
        queue.add(A)
        queue.add(A, 0.02)
        await asyncio.sleep(0.1)
        assert done == [A]
        await queue.stop()

    run(test)


def test_events_go_first() -> None:
    """What has just happened goes before what was due by the clock, however long the queue of it."""

    async def test() -> None:
        done: list[Key] = []
        queue = WorkQueue(_note(done), workers=1)
        queue.add(A, 0.001)
        await asyncio.sleep(0.01)
        for number in range(3):
            queue.add(("team", str(number)))
        queue.start()
        await until(lambda: len(done) == 4)
        assert done[-1] == A
        await queue.stop()

    run(test)


def test_what_is_long_overdue_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events without end do not keep back what is due by the clock for longer than so many seconds."""
    monkeypatch.setattr(workqueue, "STARVATION_LIMIT_SECONDS", 0.05)

    async def test() -> None:
        done: list[Key] = []

        async def work(key: Key) -> float | None:
            done.append(key)
            await asyncio.sleep(0.001)
            return None if key == A else 0.0

        queue = WorkQueue(work, workers=1)
        queue.add(A, 0.001)
        queue.add(B)
        queue.start()
        await until(lambda: A in done)
        assert len(done) > 10
        await queue.stop()

    run(test)


def test_times_that_are_not_needed_any_more_are_forgotten() -> None:
    """A key that comes back a thousand times before its time takes no more room than one that does not."""

    async def test() -> None:
        queue = WorkQueue(_note([]))
        for _ in range(1000):
            queue.add(A, 3600)
            queue.add(A)
            assert queue._take()[0] == A
        assert len(queue._heap) < 50

    run(test)


def test_delayed_key_while_others_keep_the_workers_busy() -> None:
    """A key is worked on when it is due, although whoever waited for it went to work on another."""

    async def test() -> None:
        done: list[Key] = []

        async def work(key: Key) -> None:
            done.append(key)
            await asyncio.sleep(0 if key == A else 10)

        queue = WorkQueue(work, workers=3)
        queue.start()
        await asyncio.sleep(0.01)
        queue.add(A, 0.05)
        for name in ("b", "c"):
            await asyncio.sleep(0.01)
            queue.add(("team", name))
        await until(lambda: A in done)
        await queue.stop(drain_timeout=0)

    run(test)


def test_comes_back_when_it_asks_to() -> None:
    """The seconds that the work gives are when it is wanted again; None means not by itself."""

    async def test() -> None:
        delays: list[float | None] = [0.01, 0.0, None, 0.0]

        async def work(_: Key) -> float | None:
            return delays.pop(0)

        queue = WorkQueue(work)
        queue.start()
        queue.add(A)
        await until(lambda: len(delays) == 1)
        await asyncio.sleep(0.03)
        assert len(delays) == 1
        await queue.stop()

    run(test)


@pytest.mark.parametrize(
    ("error", "delays"),
    [
        pytest.param(
            ApiError(500, "InternalError", "no"), [0.5, 1.0, 2.0, 4.0], id="more after each failure"
        ),
        pytest.param(ApiError(429, "TooManyRequests", "no", 7.0), [7.0] * 4, id="what the server asks for"),
        pytest.param(ZeroDivisionError(), [0.5, 1.0, 2.0, 4.0], id="our own mistake"),
    ],
)
def test_failures(error: Exception, delays: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """What fails is tried again, and the log says when."""

    async def test() -> None:
        async def work(_: Key) -> None:
            raise error

        failures = []
        queue = WorkQueue(work, failed=lambda: failures.append(1))
        given = [await queue._process(A) for _ in delays]
        assert given == delays
        assert len(failures) == len(delays)

    run(test)
    assert (
        f"team/a: {'reconciling failed' if isinstance(error, ZeroDivisionError) else 'the API server refused: no'}"
        in caplog.text
    )


def test_longest_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delay after failures is bounded, and short again after a success."""
    outcomes: list[Exception | None] = [*[ApiError(500, "", "")] * 30, None, ApiError(500, "", "")]

    async def work(_: Key) -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    async def test() -> None:
        queue = WorkQueue(work)
        delays = [await queue._process(A) for _ in range(32)]
        assert delays[29:] == [workqueue.MAX_RETRY_SECONDS, None, workqueue.FIRST_RETRY_SECONDS]

    run(test)


def test_stop() -> None:
    """Stopping waits for what is being done, and begins nothing, not even what that asks for."""

    async def test() -> None:
        begun, ended = [], []

        async def work(key: Key) -> float:
            begun.append(key)
            await asyncio.sleep(0.05)
            ended.append(key)
            return 0.0

        queue = WorkQueue(work, workers=1)
        queue.start()
        queue.add(A)
        queue.add(B)
        await until(lambda: bool(begun))
        await queue.stop()
        queue.add(B)
        await asyncio.sleep(0.1)
        assert (begun, ended) == ([A], [A])

    run(test)


def test_stop_has_limited_patience() -> None:
    """Work that does not end is ended."""

    async def test() -> None:
        queue = WorkQueue(lambda _: asyncio.sleep(100))
        queue.start()
        queue.add(A)
        await until(lambda: queue.busy == 1)
        await queue.stop(drain_timeout=0.05)
        assert queue.busy == 0

    run(test)


def test_stop_insists() -> None:
    """Work that swallows a cancellation is cancelled again."""

    async def test() -> None:
        swallowed = []

        async def work(key: Key) -> None:
            while True:
                try:
                    await asyncio.sleep(100)
                except asyncio.CancelledError:
                    if swallowed:
                        raise
                    swallowed.append(key)

        queue = WorkQueue(work)
        queue.start()
        queue.add(A)
        await until(lambda: queue.busy == 1)
        async with asyncio.timeout(5):
            await queue.stop(drain_timeout=0)
        assert (queue.busy, swallowed) == (0, [A])

    run(test)


def test_what_it_tells_of_itself() -> None:
    """Its length is what is due; it idles while something is due and nothing gets done. Not before it is started,
    which in a copy of the operator that does not lead may be days later."""

    async def test() -> None:
        queue = WorkQueue(_note([]), workers=0)
        assert (len(queue), queue.idle()) == (0, 0.0)
        queue.add(A, 60)
        assert (len(queue), queue.idle()) == (0, 0.0)
        queue.add(B)
        await asyncio.sleep(0.02)
        assert (len(queue), queue.idle()) == (1, 0.0)
        queue.start()
        await asyncio.sleep(0.02)
        assert len(queue) == 1
        assert queue.idle() >= 0.02

    run(test)


def test_a_long_queue_is_not_an_idle_one() -> None:
    """However long the last key waits in a burst, or while each try fails slowly: what counts is that some end."""

    async def test() -> None:
        async def work(key: Key) -> None:
            await asyncio.sleep(0.02)
            if key == A:
                raise ApiError(0, "NoAnswer", "no answer")

        queue = WorkQueue(work, workers=1)
        for number in range(20):
            queue.add(("team", str(number)))
        queue.add(A)
        queue.start()
        idle = []
        while len(queue):
            idle.append(queue.idle())
            await asyncio.sleep(0.005)
        assert max(idle) < 0.2, "less than the whole queue takes"
        await queue.stop(drain_timeout=0)

    run(test)


def test_what_never_ends_is_noticed() -> None:
    """One reconciliation that hangs shows, although others go on."""

    async def test() -> None:
        async def work(key: Key) -> None:
            await asyncio.sleep(60 if key == A else 0)

        queue = WorkQueue(work)
        queue.start()
        queue.add(A)
        for number in range(5):
            queue.add(("team", str(number)))
            await asyncio.sleep(0.01)
        assert queue.longest() >= 0.04
        await queue.stop(drain_timeout=0)

    run(test)


def test_namespaces_take_turns() -> None:
    """A burst in one namespace does not make the others wait for its end."""

    async def test() -> None:
        done: list[Key] = []
        queue = WorkQueue(_note(done), workers=1)
        for number in range(100):
            queue.add(("burst", str(number)))
        queue.add(("quiet", "a"))
        queue.add(("quiet", "b"))
        queue.start()
        await until(lambda: len(done) == 102)
        assert [key for key in done[:4] if key[0] == "quiet"] == [("quiet", "a"), ("quiet", "b")]
        assert [key[1] for key in done if key[0] == "burst"] == [str(number) for number in range(100)]
        await queue.stop()

    run(test)


def _note(done: list[Key]) -> Callable[[Key], Awaitable[float | None]]:
    async def work(key: Key) -> None:
        done.append(key)

    return work
