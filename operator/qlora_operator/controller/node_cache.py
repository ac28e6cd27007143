"""The cluster's nodes, listed rarely for all jobs together."""

import logging
from collections.abc import Iterable, Sequence

from qlora_operator.controller.api_client import ApiClient, ApiError
from qlora_operator.controller.ttl_cache import TtlCache
from qlora_operator.placement import nodes as placement

log = logging.getLogger(__name__)

NODES_SECONDS = 10.0
"""How long one list of the nodes serves all jobs."""
DENIED_SECONDS = 600.0
"""How long it is assumed that the permission to list nodes is still missing."""


class NodeSnapshot:
    """The nodes at one moment. Jobs that ask for the same find the same room, so it is computed once."""

    def __init__(self, nodes: Sequence[placement.Node]) -> None:
        self._nodes = nodes
        self.names = frozenset(node.name for node in nodes)
        self.ready = frozenset(node.name for node in nodes if node.ready)
        self._known: dict[tuple[str, frozenset[str], bool], placement.Feasibility] = {}

    def feasible(
        self, demand: placement.Demand, avoid: frozenset[str], *, native_bf16_only: bool
    ) -> placement.Feasibility:
        """Where the demand fits on all nodes but those to avoid."""
        key = (repr(demand), avoid, native_bf16_only)
        if key not in self._known:
            nodes = [node for node in self._nodes if node.name not in avoid]
            self._known[key] = placement.feasible(nodes, demand, native_bf16_only=native_bf16_only)
        return self._known[key]


class NodeCache:
    """The newest snapshot."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._snapshot: TtlCache[NodeSnapshot | None] = TtlCache(self._list, NODES_SECONDS)

    async def get(self, expected: Iterable[str] = ()) -> NodeSnapshot | None:
        """The nodes; None without the permission to list them.

        Args:
            expected: names of nodes that pods run on. If one is unknown, it has joined since the last list.
        """
        snapshot = await self._snapshot.get()
        if snapshot is not None and set(expected) - snapshot.names:
            self._snapshot.keep(0.0)
            snapshot = await self._snapshot.get()
        return snapshot

    async def _list(self) -> NodeSnapshot | None:
        try:
            # Page by page: as the API has them, thousands of nodes would take hundreds of megabytes.
            return NodeSnapshot([placement.node(raw) async for raw in self._client.nodes()])
        except ApiError as error:
            if error.code != 403:
                raise
            log.warning("no permission to list nodes, so their labels are not checked: %s", error)
            self._snapshot.keep(DENIED_SECONDS)
            return None
