"""How ranks find each other at the start.

Rank 0 serves a store at MASTER_ADDR:MASTER_PORT; every rank announces itself in
it; rank 0 gives the verdict when all have come, or says who is missing.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

# torch exports these without saying so in a way that mypy accepts.
from torch.distributed import DistError, Store, TCPStore  # type: ignore[attr-defined]

from qlora_trainer.distributed.gloo import one_line
from qlora_trainer.distributed.interface import is_loopback, listen, resolve
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RendezvousError

_VERDICT = "rendezvous/verdict"
_HEARD = "rendezvous/heard"
_READY = "ready"
_POLL_SECONDS = 0.1
_RETRY_SECONDS = 0.25
_CONNECT_SECONDS = 5.0
_LINGER_SECONDS = 2.0
"""How long a failed rank 0 stays, so that the others can read its verdict."""

T = TypeVar("T")


def meet(world: World, host: str, timeout_seconds: float) -> tuple[Store, str]:
    """Wait until every rank has come; return the store they share, and rank 0's address.

    Raises RendezvousError, which names the ranks that came and those that did not.
    """
    deadline = time.monotonic() + timeout_seconds
    address = _find_rank_0(world, deadline, timeout_seconds)
    try:
        store = (_serve if world.rank == 0 else _join)(world, address, timedelta(seconds=timeout_seconds))
        _announce(store, world, host)
        await_all = _await_ranks if world.rank == 0 else _await_verdict
        await_all(store, world, deadline, timeout_seconds)
    except DistError as error:
        raise RendezvousError(f"rank 0 at {_place(world)} went away: {one_line(str(error))}") from None
    return store, address


def within(seconds: float, call: Callable[[], T], otherwise: str) -> T:
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


def ranges(ranks: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def attendance(size: int, came: Iterable[int], place: str, seconds: float) -> str:
    """The sentence that says which ranks came and which did not."""
    came = set(came)
    missing = set(range(size)) - came
    return (
        f"{_ranks(came)} of {size} came to {place} within {seconds:g} s; {_ranks(missing)} did not: "
        f"see whether their processes started and can reach that address"
    )


def _ranks(ranks: set[int]) -> str:
    return f"rank{'' if len(ranks) == 1 else 's'} {ranges(ranks)}"


def _place(world: World) -> str:
    return f"{world.master_addr}:{world.master_port}"


def _find_rank_0(world: World, deadline: float, timeout_seconds: float) -> str:
    """Rank 0's address, once its name resolves and, for the others, once it listens."""
    while True:
        try:
            address = resolve(world.master_addr, world.master_port)
            if world.rank > 0:
                _knock(address, world.master_port)
            return address
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RendezvousError(
                    f"rank {world.rank} waited {timeout_seconds:g} s for rank 0 at {_place(world)}, "
                    f"which did not come: {error.strerror or error}"
                ) from None
        time.sleep(_RETRY_SECONDS)


def _knock(address: str, port: int) -> None:
    with socket.create_connection((address, port), timeout=_CONNECT_SECONDS) as connection:
        # While nobody listens on an ephemeral port, a connection to it can meet itself.
        if connection.getsockname()[:2] == connection.getpeername()[:2]:
            raise ConnectionRefusedError("nobody listens there")


def _serve(world: World, address: str, timeout: timedelta) -> TCPStore:
    try:
        listener = listen(address, world.master_port)
    except OSError as error:
        reason = f"rank 0 cannot listen at {_place(world)}: {error.strerror}"
        raise RendezvousError(f"{reason}; MASTER_PORT must be free") from None
    own = address if is_loopback(address) else "127.0.0.1"
    return TCPStore(
        own,
        world.master_port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _join(world: World, address: str, timeout: timedelta) -> TCPStore:
    return TCPStore(address, world.master_port, is_master=False, timeout=timeout, wait_for_workers=False)


def _key(rank: int) -> str:
    return f"rendezvous/rank/{rank}"


def _announce(store: Store, world: World, host: str) -> None:
    # The nonce tells two processes on one host apart.
    mine = f"{host} {time.time_ns()}"
    first = store.compare_set(_key(world.rank), "", mine).decode()
    if first != mine:
        other = first.rpartition(" ")[0]
        raise RendezvousError(
            f"rank {world.rank} came twice to {_place(world)}: from {other} and from {host}"
        )


def _came(store: Store, size: int) -> list[int]:
    return [rank for rank in range(size) if store.check([_key(rank)])]


def _await_ranks(store: Store, world: World, deadline: float, timeout_seconds: float) -> None:
    everyone = [_key(rank) for rank in range(world.size)]
    while not store.check(everyone):
        if time.monotonic() >= deadline:
            came = _came(store, world.size)
            sentence = attendance(world.size, came, _place(world), timeout_seconds)
            store.set(_VERDICT, sentence)
            _linger(store, len(came) - 1)
            raise RendezvousError(sentence)
        time.sleep(_POLL_SECONDS)
    store.set(_VERDICT, _READY)


def _linger(store: Store, listeners: int) -> None:
    until = time.monotonic() + _LINGER_SECONDS
    while store.add(_HEARD, 0) < listeners and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)


def _await_verdict(store: Store, world: World, deadline: float, timeout_seconds: float) -> None:
    while not store.check([_VERDICT]):
        # Rank 0 may have started later than we did: then we are the first to give up.
        if time.monotonic() >= deadline + _POLL_SECONDS:
            sentence = attendance(world.size, _came(store, world.size), _place(world), timeout_seconds)
            raise RendezvousError(sentence)
        time.sleep(_POLL_SECONDS)
    verdict = store.get(_VERDICT).decode()
    store.add(_HEARD, 1)
    if verdict != _READY:
        raise RendezvousError(verdict)
