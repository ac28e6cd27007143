"""Asking rank 0s for their progress."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from builders import pod
from qlora_operator.controller import progress_poller
from qlora_operator.controller.api_client import ApiError
from qlora_operator.controller.progress_poller import ProgressPoller
from qlora_operator.status.observation import Pod
from testcluster.rank_zero import RankZero, rank_zero

KEY = ("team", "job")


class Pods:
    """The API server, as far as the poller asks it: which pods a job has."""

    def __init__(self, address: str | None = None) -> None:
        self.address = address
        self.lists = 0
        self.broken = False

    async def pods(self, namespace: str, uid: str) -> list[dict[str, Any]]:
        """Rank 0's pod."""
        self.lists += 1
        if self.broken:
            raise ApiError(500, "InternalError", "down")
        return [pod(status={"podIP": self.address})]


class Polled:
    """A poller at work, and what it has told."""

    def __init__(self, pods: Pods) -> None:
        self.pods = pods
        self.reports: dict[str, Any] = {}
        self.woken: list[tuple[str, str]] = []
        facts = SimpleNamespace(put_report=self.reports.__setitem__)
        self.poller = ProgressPoller(cast(Any, pods), cast(Any, facts), self.woken.append)
        self.poller.start()


@asynccontextmanager
async def polling(pods: Pods) -> AsyncIterator[Polled]:
    """A poller, until the end of the block."""
    polled = Polled(pods)
    yield polled
    await polled.poller.close()


async def until(check: Callable[[], Any]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(10):
        while not check():
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundred times as fast."""
    for name in ("POLL_SECONDS", "FIRST_RETRY_SECONDS", "MAX_POLL_SECONDS", "TICK_SECONDS"):
        monkeypatch.setattr(progress_poller, name, getattr(progress_poller, name) / 100)


def with_rank_zero(test: Callable[[RankZero], Awaitable[None]]) -> None:
    """Run a test with a progress server."""
    with rank_zero() as rank:
        asyncio.run(cast(Any, test(rank)))


def here(rank: RankZero) -> Pod:
    """Rank 0's pod."""
    return Pod(
        name="p", uid="p", phase="Running", attempt=0, index=0, owner_uid="job-uid-0", address=rank.address
    )


def test_an_answer_is_handed_on_and_the_next_asked_for() -> None:
    """A report wakes the job's reconciliation, and rank 0 is asked again and again, without a list of pods."""

    async def test(rank: RankZero) -> None:
        rank.tell("uid", step=3)
        async with polling(Pods()) as polled:
            polled.poller.track(KEY, "uid", 0, "job-uid-0", [here(rank)])
            await until(lambda: len(polled.woken) > 2)
            assert polled.reports["uid"].step == 3
            assert polled.pods.lists == 0

    with_rank_zero(test)


def test_the_address_is_looked_up_once() -> None:
    """Where nobody knows rank 0's address, its pod is looked up; not again when rank 0 then does not answer."""

    async def test(rank: RankZero) -> None:
        async with polling(Pods(rank.address)) as polled:
            polled.poller.track(KEY, "uid", 0, "job-uid-0", [])
            await until(lambda: rank.asked > 2)
            assert (polled.pods.lists, polled.woken) == (1, [])

    with_rank_zero(test)


def test_an_api_server_that_is_down_is_asked_again() -> None:
    """A lookup that fails is made again later."""

    async def test(rank: RankZero) -> None:
        rank.tell("uid")
        pods = Pods(rank.address)
        pods.broken = True
        async with polling(pods) as polled:
            polled.poller.track(KEY, "uid", 0, "job-uid-0", [])
            await until(lambda: pods.lists > 1)
            pods.broken = False
            await until(lambda: polled.woken)

    with_rank_zero(test)


def test_who_is_forgotten_is_not_asked() -> None:
    """A job that does not run any more is asked no more."""

    async def test(rank: RankZero) -> None:
        rank.tell("uid")
        async with polling(Pods()) as polled:
            polled.poller.track(KEY, "uid", 0, "job-uid-0", [here(rank)])
            await until(lambda: polled.woken)
            polled.poller.untrack("uid")
            await asyncio.sleep(0.1)
            asked = rank.asked
            await asyncio.sleep(0.4)
            assert rank.asked == asked

    with_rank_zero(test)


def test_another_attempt_has_another_rank_zero() -> None:
    """A new attempt is asked where its own pod is, and only its own answer counts."""

    async def test(rank: RankZero) -> None:
        rank.tell("uid", attempt=0)
        async with polling(Pods()) as polled:
            polled.poller.track(KEY, "uid", 0, "job-uid-0", [here(rank)])
            await until(lambda: polled.woken)
            polled.poller.track(KEY, "uid", 1, "job-uid-1", [])
            polled.woken.clear()
            await until(lambda: polled.pods.lists > 1)
            assert polled.woken == []

    with_rank_zero(test)


def test_pods_that_the_attempts_job_has_not_made_are_not_asked() -> None:
    """Whoever may create pods may give them a job's labels, and would tell of another's progress."""

    async def test(rank: RankZero) -> None:
        rank.tell("uid")
        async with polling(Pods(rank.address)) as polled:
            polled.poller.track(KEY, "uid", 0, "another-job-uid", [here(rank)])
            await until(lambda: polled.pods.lists > 1)
            assert (rank.asked, polled.woken) == (0, [])

    with_rank_zero(test)


def test_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many jobs run, only so many are asked at once, and in the end all of them."""
    monkeypatch.setattr(progress_poller, "MAX_CONCURRENT", 2)

    async def test(rank: RankZero) -> None:
        async with polling(Pods()) as polled:
            for number in range(7):
                polled.poller.track(("team", str(number)), str(number), 0, "job-uid-0", [here(rank)])
            most = 0
            while rank.asked < 7:
                most = max(most, len(polled.poller._requests))
                await asyncio.sleep(0.001)
            assert most <= 2

    with_rank_zero(test)
