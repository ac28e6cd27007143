"""A value that many ask for and few need to fetch."""

import asyncio
from typing import Any

import pytest

from qlora_operator.controller.ttl_cache import TtlCache


def test_a_value_is_kept_for_a_while() -> None:
    """Many who ask at once, and soon after, cause one question; the next one is asked when it has grown old."""
    asked = []

    async def ask() -> int:
        asked.append(1)
        await asyncio.sleep(0.01)
        return len(asked)

    async def test() -> None:
        kept: TtlCache[int] = TtlCache(ask, seconds=0.1)
        assert await asyncio.gather(*(kept.get() for _ in range(5))) == [1] * 5
        assert await kept.get() == 1
        await asyncio.sleep(0.15)
        assert await kept.get() == 2

    asyncio.run(test())


def test_a_fetch_that_failed_is_tried_again() -> None:
    """An error is nobody's answer but that of who asked."""
    outcomes: list[Any] = [ZeroDivisionError(), 7]

    async def ask() -> int:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return int(outcome)

    async def test() -> None:
        kept: TtlCache[int] = TtlCache(ask, seconds=10)
        with pytest.raises(ZeroDivisionError):
            await kept.get()
        assert await kept.get() == 7

    asyncio.run(test())


def test_a_value_may_be_kept_longer_or_shorter() -> None:
    """Who knows better how long an answer is good says so; with no time at all, the next one asks anew."""
    asked = []

    async def ask() -> int:
        asked.append(1)
        kept.keep(60)
        return len(asked)

    async def test() -> None:
        await kept.get()
        await asyncio.sleep(0.02)
        assert await kept.get() == 1
        kept.keep(0)
        assert await kept.get() == 2

    kept: TtlCache[int] = TtlCache(ask, seconds=0.01)
    asyncio.run(test())
