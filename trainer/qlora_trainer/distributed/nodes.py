"""What ranks tell each other through the store before a backend starts: who shares a node, who is where."""

import os
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

# torch exports these without saying so in a way that mypy accepts.
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

_LOOPBACK = "127.0.0.1"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - asked which one it is; nothing is written there


_lives: Counter[str] = Counter()


def fresh(store: Store, group_id: str) -> Store:
    """The store, without what was written for an earlier group of that name.

    torch gives a process's second default group the same keys as the first. Every
    member makes the groups of one name equally often, so they all count alike.
    """
    _lives[group_id] += 1
    return PrefixStore(f"life-{_lives[group_id]}", store)


def exchange(store: Store, key: str, rank: int, size: int, value: str) -> list[str]:
    """The values of all ranks, in rank order. Every rank calls this."""
    store.set(f"{key}/{rank}", value)
    return [store.get(f"{key}/{each}").decode() for each in range(size)]


def node_name() -> str:
    """Equal for two processes exactly when they can talk through shared memory: one kernel, one /dev/shm."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else socket.gethostname()
    return f"{boot}/{_SHARED_MEMORY.stat().st_dev if _SHARED_MEMORY.exists() else os.getpid()}"


def local_place(nodes: list[str], rank: int) -> tuple[int, int]:
    """(number of this rank among those of its node, how many those are); `nodes` as `exchange` gives them."""
    return nodes[:rank].count(nodes[rank]), nodes.count(nodes[rank])


def store_host(store: Store, environ: Mapping[str, str]) -> str:
    """The host that serves a store, as this process and others reach it; loopback for stores without one.

    Its own server may reach it over loopback, which says nothing of others: there MASTER_ADDR does.
    """
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    host = str(store.host) if isinstance(store, TCPStore) else _LOOPBACK
    return environ.get("MASTER_ADDR") or host if host == _LOOPBACK else host
