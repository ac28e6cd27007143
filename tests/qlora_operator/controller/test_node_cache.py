"""The cluster's nodes, listed rarely for all jobs together."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from qlora_operator.api.names import TIER_LABELS
from qlora_operator.controller import node_cache
from qlora_operator.controller.api_client import ApiError
from qlora_operator.controller.node_cache import NodeCache, NodeSnapshot
from qlora_operator.placement.nodes import Demand, node

NODE = dict.fromkeys(TIER_LABELS["avx512"], "true")


def raw_node(name: str, *, ready: bool = True) -> dict[str, Any]:
    """A node that has room for two pods, from the API."""
    return {
        "metadata": {"name": name, "labels": NODE},
        "status": {
            "allocatable": {"cpu": "2", "memory": "8Gi", "pods": "10"},
            "conditions": [{"type": "Ready", "status": str(ready)}],
        },
    }


def a_demand(pods: int) -> Demand:
    """So many pods of one CPU."""
    return Demand(pods, 1, 2**30, {}, (), ("avx512",))


class Lists:
    """An API server that lists these nodes, one list after the other."""

    def __init__(self, *answers: list[str] | ApiError) -> None:
        self.answers = list(answers)

    async def nodes(self) -> AsyncIterator[dict[str, Any]]:
        """The next list."""
        answer = self.answers.pop(0)
        if isinstance(answer, ApiError):
            raise answer
        for name in answer:
            yield raw_node(name)

    def cache(self) -> NodeCache:
        """A cache of its nodes."""
        return NodeCache(cast(Any, self))


def test_room_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that ask for the same get the same answer without another look; any difference gets its own."""
    nodes, looked = NodeSnapshot([node(raw_node("a")), node(raw_node("b"))]), []
    real = node_cache.placement.feasible
    monkeypatch.setattr(
        node_cache.placement, "feasible", lambda *args, **kw: looked.append(args) or real(*args, **kw)
    )

    for _ in range(3):
        assert nodes.feasible(a_demand(4), frozenset(), native_bf16_only=False).tiers == ("avx512",)
    assert nodes.feasible(a_demand(4), frozenset({"b"}), native_bf16_only=False).tiers == ()
    assert nodes.feasible(a_demand(5), frozenset(), native_bf16_only=False).tiers == ()
    assert nodes.feasible(a_demand(4), frozenset(), native_bf16_only=True).tiers == ()
    assert len(looked) == 4


def test_nodes_that_are_ready_are_known_apart() -> None:
    """All are known by name, and those apart that are ready."""
    nodes = NodeSnapshot([node(raw_node("a")), node(raw_node("b", ready=False))])

    assert (nodes.names, nodes.ready) == ({"a", "b"}, {"a"})


def test_a_node_that_nobody_knows_is_asked_for() -> None:
    """One list serves all, until a pod is on a node that has joined since."""
    lists = Lists(["a"], ["a", "b"])

    async def test() -> None:
        cache = lists.cache()
        for expected, wanted in (
            ((), {"a"}),
            (("a",), {"a"}),
            (("b",), {"a", "b"}),
            (("a", "b"), {"a", "b"}),
        ):
            snapshot = await cache.get(expected)
            assert (snapshot and snapshot.names) == wanted
        assert lists.answers == []

    asyncio.run(test())


def test_without_permission_nodes_are_not_asked_for_again() -> None:
    """Whoever may not list nodes knows none for a while."""

    async def test() -> None:
        cache = Lists(ApiError(403, "Forbidden", "nodes is forbidden")).cache()
        assert [await cache.get(), await cache.get(["a"])] == [None, None]

    asyncio.run(test())


def test_a_server_that_is_down_is_asked_again() -> None:
    """Any other refusal is the caller's to deal with."""

    async def test() -> None:
        cache = Lists(ApiError(500, "InternalError", "down"), ["a"]).cache()
        with pytest.raises(ApiError):
            await cache.get()
        assert await cache.get() is not None

    asyncio.run(test())
