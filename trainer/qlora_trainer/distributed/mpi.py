"""The backend `mpi`: Intel MPI, compiled ahead (see build.py), started without mpirun and without SSH.

torch keeps the name `mpi` for a backend of its own, which its wheels lack, and
gives it neither a store nor a size; so this one's name in torch is `impi`:
`init_process_group("impi")` finds `register` by the entry point of that name.

MPI starts once a process. The first group is its world; later ones are parts
of it. Nothing ends MPI but the end of the process, since groups come and go.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist

# torch exports it without saying so in a way that mypy accepts.
from torch.distributed import Store  # type: ignore[attr-defined]

from qlora_trainer.distributed import compiled, pmi
from qlora_trainer.distributed.interface import interface_towards, resolve
from qlora_trainer.distributed.libraries import find, preload
from qlora_trainer.distributed.nodes import exchange, fresh, node_name, store_host

NAME = "mpi"
TORCH_NAME = "impi"
_NEW = "new"

_place: str | None = None
"""`ADDRESS RANK` of this process in MPI's world, once it is there."""
_managers: list[subprocess.Popen[bytes]] = []
"""The process manager, in rank 0: kept, for it ends when our end of its standard input is closed."""


def settings(interface: str, root: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that Intel MPI reads when it starts; what the user set is kept. Pure.

    `root` is the prefix that Intel MPI is installed under. Ranks are bound by our launcher,
    so MPI must not bind them; a thread that waits gives its CPU to those that compute.
    """
    wanted = {
        "I_MPI_ROOT": str(root),
        "I_MPI_PIN": "0",
        "I_MPI_THREAD_YIELD": "2",
        "FI_PROVIDER": "tcp",
        "FI_PROVIDER_PATH": str(root / "lib"),
        "FI_TCP_IFACE": interface,
    }
    return {name: value for name, value in wanted.items() if not environ.get(name)}


@functools.cache
def extension() -> ModuleType:
    """The compiled backend, with its libraries. Raises BackendUnavailable."""
    for name in ("libfabric.so.1", "libmpi.so.12"):
        preload(find("impi-rt", name, NAME))
    return compiled.load(NAME)


def create(options: Any, _: Any) -> Any:
    """A c10d backend for one group: torch calls this with its DistributedBackendOptions."""
    global _place
    store = fresh(options.store, options.group_id)
    rank, size = options.group_rank, options.group_size
    places = exchange(store, "mpi/place", rank, size, _place or _NEW)
    if set(places) == {_NEW}:
        _place = _join(store, rank, size)
        places = [f"{_place.split()[0]} {each}" for each in range(size)]
    timeout = timedelta(seconds=_seconds(options.timeout))
    return extension().create(world_ranks(places), options.group_id, rank, timeout)


def _seconds(timeout: Any) -> float:
    return float(timeout.total_seconds() if isinstance(timeout, timedelta) else timeout)


def world_ranks(places: list[str]) -> list[int]:
    """The members of a group as ranks of MPI's world. Pure.

    Raises ValueError when they are not all of one world.
    """
    worlds = {place.split()[0] for place in places}
    if len(worlds) > 1:
        outside = [rank for rank, place in enumerate(places) if place == _NEW]
        raise ValueError(
            f"{TORCH_NAME}: the ranks of this group are not all in one MPI world (outside: {outside}): "
            f"MPI starts once, with a process's first {TORCH_NAME} group, so that one must have every rank"
        )
    return [int(place.split()[1]) for place in places]


def _join(store: Store, rank: int, size: int) -> str:
    """Tell MPI, which has not started yet, who and where it is. Returns this rank's place."""
    nodes = exchange(store, "mpi/node", rank, size, node_name())
    if rank == 0:
        store.set("mpi/manager", _start_manager(size, pmi.mapping(nodes)))
    port = int(store.get("mpi/manager"))
    host = resolve(store_host(store, os.environ), port)
    root = find("impi-rt", "libmpi.so.12", NAME).parents[1]
    os.environ.update(settings(interface_towards(host), root, os.environ))
    # A connection of ours, since MPI cannot make one to an IPv6 address.
    manager = pmi.enter(host, port, rank)
    os.environ.update(PMI_FD=str(manager.detach()), PMI_RANK=str(rank), PMI_SIZE=str(size))
    return f"{port} {rank}"


def _start_manager(size: int, mapping: str) -> str:
    """Start rank 0's process manager; returns its port."""
    words = [sys.executable, "-I", "-S", pmi.__file__, str(size), mapping]
    manager = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    _managers.append(manager)
    assert manager.stdout is not None
    return manager.stdout.readline().decode().strip()


def register() -> None:
    """Make `impi` known to torch. Raises BackendUnavailable, whose text says what to do, before anything starts."""
    extension()
    dist.Backend.register_backend(TORCH_NAME, create, extended_api=True, devices=["cpu"])
