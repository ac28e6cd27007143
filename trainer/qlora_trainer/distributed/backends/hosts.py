"""What ranks tell each other through the store before a backend starts: who shares a host, who is where."""

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

_generation: Counter[str] = Counter()
"""How often this process has made a group of each name."""


def unique_store(store: Store, group_id: str) -> Store:
    """The store, without what was written for an earlier group of that name.

    torch gives a process's second default group the same keys as the first. Every
    member makes the groups of one name equally often, so they all count alike.
    """
    _generation[group_id] += 1
    return PrefixStore(f"generation-{_generation[group_id]}", store)


def store_all_gather(store: Store, key: str, rank: int, size: int, value: str) -> list[str]:
    """The values of all ranks, in rank order. Every rank calls this."""
    store.set(f"{key}/{rank}", value)
    return [store.get(f"{key}/{other}").decode() for other in range(size)]


def host_id() -> str:
    """Equal for two processes exactly when they can talk through shared memory: one kernel, one /dev/shm."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else socket.gethostname()
    return f"{boot}/{_SHARED_MEMORY.stat().st_dev if _SHARED_MEMORY.exists() else os.getpid()}"


def local_rank_and_size(hosts: list[str], rank: int) -> tuple[int, int]:
    """A rank's number among the ranks of its host, and how many those are.

    `hosts` has each rank's `host_id`, in rank order.
    """
    return hosts[:rank].count(hosts[rank]), hosts.count(hosts[rank])


def store_host(store: Store, environ: Mapping[str, str]) -> str:
    """The host that serves a store, as this process and others reach it; loopback for stores without one.

    Its own server may reach it over loopback, which says nothing of others: there MASTER_ADDR does.
    """
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    host = str(store.host) if isinstance(store, TCPStore) else _LOOPBACK
    return environ.get("MASTER_ADDR") or host if host == _LOOPBACK else host
