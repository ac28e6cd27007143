"""How ranks find each other at the start.

Rank 0 serves a store at MASTER_ADDR:MASTER_PORT; every rank announces itself in
it; rank 0 gives the outcome when all have come, or says who is missing.

c10d's own ways would be shorter, and say less: `TCPStore(wait_for_workers=True)` counts and names no rank, its
connecting fills the log with warnings while rank 0 is not up yet, and so does a `wait` that times out.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TypeVar

# torch exports these without saying so in a way that mypy accepts.
from torch.distributed import DistError, Store, TCPStore  # type: ignore[attr-defined]

from qlora_trainer.distributed.backends.gloo import one_line
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RendezvousError
from qlora_trainer.host.network import is_loopback, listen, resolve

_OUTCOME = "rendezvous/outcome"
_READY = "ready"
_POLL_SECONDS = 0.1
_RETRY_SECONDS = 0.25
_CONNECT_SECONDS = 5.0
_LINGER_SECONDS = 2.0
"""How long a failed rank 0 stays, so that the others can read the outcome."""

T = TypeVar("T")


def rendezvous(world: World, host: str, timeout_seconds: float) -> tuple[Store, str]:
    """Wait until every rank has come; return the store they share, and rank 0's address.

    Raises RendezvousError, which names the ranks that came and those that did not.
    """
    deadline = time.monotonic() + timeout_seconds
    address = _find_rank_0(world, deadline, timeout_seconds)
    try:
        store = _open_store(world, address, timedelta(seconds=timeout_seconds))
        # The nonce tells two processes on one host apart.
        mine = f"{host} {time.time_ns()}"
        first = store.compare_set(_rank_key(world.rank), "", mine).decode()
        if first != mine:
            raise RendezvousError(
                f"rank {world.rank} came twice to {world.master}: from {first.rpartition(' ')[0]} and from {host}"
            )
        outcome = _await_outcome(store, world, deadline, timeout_seconds)
    except DistError as error:
        raise RendezvousError(f"rank 0 at {world.master} went away: {one_line(str(error))}") from None
    if outcome != _READY:
        raise RendezvousError(outcome)
    return store, address


def run_with_timeout(seconds: float, call: Callable[[], T], otherwise: str) -> T:
    """The call's result; RendezvousError(otherwise) when it takes longer.

    The call is left behind in a daemon thread: some of c10d's have no timeout
    (a server that accepts and stays silent), and none can be interrupted.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    worker = threading.Thread(target=run, name="rendezvous", daemon=True)
    worker.start()
    worker.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise RendezvousError(otherwise)
    return results[0]


def rank_ranges(ranks: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2, 5`."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][-1] + 1:
            ranges[-1].append(rank)
        else:
            ranges.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ranges)


def missing_ranks_message(size: int, joined: Iterable[int], address: str, seconds: float) -> str:
    """The sentence that says which ranks came and which did not."""
    joined = set(joined)
    came, missing = (
        f"rank{'' if len(ranks) == 1 else 's'} {rank_ranges(ranks)}"
        for ranks in (joined, set(range(size)) - joined)
    )
    return (
        f"{came} of {size} came to {address} within {seconds:g} s; {missing} did not: "
        f"see whether their processes started and can reach that address"
    )


def _find_rank_0(world: World, deadline: float, timeout_seconds: float) -> str:
    """Rank 0's address, once its name resolves and, for the others, once it listens."""
    while True:
        try:
            address = resolve(world.master_addr, world.master_port)
            if world.rank > 0:
                probe = socket.create_connection((address, world.master_port), timeout=_CONNECT_SECONDS)
                with probe:
                    # While nothing listens on an ephemeral port, a connection to it can connect to itself.
                    if probe.getsockname()[:2] == probe.getpeername()[:2]:
                        raise ConnectionRefusedError("nothing listens there")
            return address
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RendezvousError(
                    f"rank {world.rank} waited {timeout_seconds:g} s for rank 0 at {world.master}, "
                    f"which did not come: {error.strerror or error}"
                ) from None
        time.sleep(_RETRY_SECONDS)


def _open_store(world: World, address: str, timeout: timedelta) -> TCPStore:
    """Serve the store, as rank 0, or connect to it."""
    if world.rank > 0:
        return TCPStore(address, world.master_port, is_master=False, timeout=timeout, wait_for_workers=False)
    try:
        listener = listen(address, world.master_port)
    except OSError as error:
        reason = f"rank 0 cannot listen at {world.master}: {error.strerror}"
        raise RendezvousError(f"{reason}; MASTER_PORT must be free") from None
    return TCPStore(
        address if is_loopback(address) else "127.0.0.1",
        world.master_port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _rank_key(rank: int) -> str:
    return f"rendezvous/rank/{rank}"


def _heard_key(rank: int) -> str:
    return f"rendezvous/heard/{rank}"


def _await_keys(store: Store, keys: Sequence[str], deadline: float) -> bool:
    """Whether all keys are there by the deadline."""
    while not store.check(list(keys)):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _await_outcome(store: Store, world: World, deadline: float, timeout_seconds: float) -> str:
    """`ready` once every rank has come, else the sentence that names the missing ones: rank 0 gives it, others read."""
    if world.rank == 0:
        awaited = [_rank_key(rank) for rank in range(world.size)]
    else:
        awaited = [_OUTCOME]
        # Rank 0 may have started later than we did: then we are the first to give up.
        deadline += _POLL_SECONDS
    if _await_keys(store, awaited, deadline):
        if world.rank == 0:
            store.set(_OUTCOME, _READY)
            return _READY
        outcome = store.get(_OUTCOME).decode()
        store.set(_heard_key(world.rank), "")
        return outcome
    joined = [rank for rank in range(world.size) if store.check([_rank_key(rank)])]
    outcome = missing_ranks_message(world.size, joined, world.master, timeout_seconds)
    if world.rank == 0:
        store.set(_OUTCOME, outcome)
        _await_keys(store, [_heard_key(rank) for rank in joined if rank], time.monotonic() + _LINGER_SECONDS)
    return outcome
