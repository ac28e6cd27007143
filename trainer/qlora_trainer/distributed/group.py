"""The ranks as one group: a few collectives, whatever the backend."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

# torch exports these without saying so in a way that mypy accepts.
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from qlora_trainer.distributed.backends import gloo, registry
from qlora_trainer.distributed.rendezvous import rendezvous, run_with_timeout
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RendezvousError

_GRACE_SECONDS = 10.0
"""Beyond the timeouts proper, before a rendezvous that has none of its own is left."""


class Group:
    """All ranks, ready to talk. A world of one starts nothing, and its operations change nothing.

    A collective that fails raises PeerLost (a connection broke), CollectiveTimeout
    (a peer did not answer), or CollectiveError. The group is of no use after it.
    """

    def __init__(self, world: World, store: Store) -> None:
        self.world = world
        self.store = store
        """Keys and values that all ranks share."""
        self.waiting = False
        """Whether this rank is in a collective, and so waits for the others."""

    @classmethod
    def open(
        cls,
        world: World,
        backend: str,
        timeout_seconds: float,
        rendezvous_timeout_seconds: float,
    ) -> "Group":
        """Wait for all ranks, then connect them by `backend`: gloo, ccl or mpi.

        `timeout_seconds` bounds each collective, `rendezvous_timeout_seconds`
        how long ranks wait for each other, and then for their connections. Raises ConfigurationError when the
        backend cannot be used here, and RendezvousError.
        """
        if world.size == 1:
            return cls(world, HashStore())
        torch_name = registry.prepare(backend)
        store, address = run_with_timeout(
            rendezvous_timeout_seconds + _GRACE_SECONDS,
            lambda: rendezvous(world, socket.gethostname(), rendezvous_timeout_seconds),
            f"rank {world.rank} reached {world.master}, "
            f"but what listens there did not answer as rank 0 does in {rendezvous_timeout_seconds:g} s",
        )
        if backend == "gloo":
            os.environ.update(gloo.settings_towards(address, world.size, os.environ))

        def connect() -> None:
            try:
                dist.init_process_group(
                    torch_name,
                    store=PrefixStore("group", store),
                    rank=world.rank,
                    world_size=world.size,
                    timeout=timedelta(seconds=timeout_seconds),
                )
            except (OSError, RuntimeError, ValueError) as error:
                reason = gloo.one_line(str(error))
                raise RendezvousError(
                    f"rank {world.rank} cannot connect to the other ranks: {reason}"
                ) from None

        connect_timeout = min(timeout_seconds, rendezvous_timeout_seconds)
        run_with_timeout(
            connect_timeout + _GRACE_SECONDS,
            connect,
            f"rank {world.rank} met the other ranks, but could not connect to them in {connect_timeout:g} s",
        )
        return cls(world, store)

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        """Replace a tensor, in place, by its sum over all ranks (equal shape and dtype on each)."""
        if self.world.size > 1:
            with self._collective("all-reduce"):
                dist.all_reduce(tensor)

    def all_gather_object(self, item: Any) -> list[Any]:
        """The items of all ranks, in rank order. They are pickled: small things only."""
        if self.world.size == 1:
            return [item]
        items: list[Any] = [None] * self.world.size
        with self._collective("all-gather"):
            dist.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        """Return once every rank has called this."""
        if self.world.size > 1:
            with self._collective("barrier"):
                dist.barrier()

    @contextmanager
    def _collective(self, operation: str) -> Iterator[None]:
        self.waiting = True
        try:
            yield
        except RuntimeError as error:
            raise gloo.collective_error(operation, str(error)) from error
        finally:
            self.waiting = False

    def tell(self, key: str, text: str) -> None:
        """Leave a text for the other ranks."""
        with self._collective("telling the other ranks"):
            self.store.set(key, text)

    def told(self, key: str) -> str | None:
        """What a rank has left under a key by now; None: nothing yet. It waits for nobody."""
        with self._collective("asking rank 0"):
            return self.store.get(key).decode() if self.store.check([key]) else None

    def close(self) -> None:
        """Leave the group. Rank 0 takes the store with it, so a barrier comes first."""
        if self.world.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
