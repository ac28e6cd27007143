"""The backend `mpi`: Intel MPI, compiled ahead (see native/build.py), started without mpirun and without SSH.

torch keeps the name `mpi` for a backend of its own, which its wheels lack, and
gives it neither a store nor a size; so this one's name in torch is `impi`:
`init_process_group("impi")` finds `register` by the entry point of that name.

MPI starts once a process. The first group is its world; later ones are parts
of it. Nothing ends MPI but the end of the process, since groups come and go.
"""

import functools
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist

# torch exports it without saying so in a way that mypy accepts.
from torch.distributed import Store  # type: ignore[attr-defined]

from qlora_trainer.distributed.backends import pmi
from qlora_trainer.distributed.backends.hosts import host_id, store_all_gather, store_host, unique_store
from qlora_trainer.host.network import interface_towards, resolve
from qlora_trainer.native.extension import Extension
from qlora_trainer.native.libraries import preload

NAME = "mpi"
TORCH_NAME = "impi"
EXTENSION = Extension.read(Path(__file__).parent / "csrc" / "mpi.toml")
_OUTSIDE = "outside"

_world_id: str | None = None
"""`WORLD RANK` of this process, once it is in an MPI world. A world is known by its process manager's port."""
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
def load_extension() -> ModuleType:
    """The compiled backend, with its libraries. Raises ExtensionUnavailable."""
    for name in ("libfabric.so.1", "libmpi.so.12"):
        preload(EXTENSION.find("impi-rt", name))
    return EXTENSION.load()


def create(options: Any, _: Any) -> Any:
    """A c10d backend for one group: torch calls this with its DistributedBackendOptions."""
    global _world_id
    store = unique_store(options.store, options.group_id)
    rank, size = options.group_rank, options.group_size
    world_ids = store_all_gather(store, "mpi/world", rank, size, _world_id or _OUTSIDE)
    if set(world_ids) == {_OUTSIDE}:
        _world_id = _enter_world(store, rank, size)
        world_ids = [f"{_world_id.split()[0]} {member}" for member in range(size)]
    return load_extension().create(world_ranks(world_ids), options.group_id, rank, options.timeout)


def world_ranks(world_ids: list[str]) -> list[int]:
    """The members of a group as ranks of MPI's world. Pure.

    Raises ValueError when they are not all of one world.
    """
    worlds = {world_id.split()[0] for world_id in world_ids}
    if len(worlds) > 1:
        outside = [rank for rank, world_id in enumerate(world_ids) if world_id == _OUTSIDE]
        raise ValueError(
            f"{TORCH_NAME}: the ranks of this group are not all in one MPI world (outside: {outside}): "
            f"MPI starts once, with a process's first {TORCH_NAME} group, so that one must have every rank"
        )
    return [int(world_id.split()[1]) for world_id in world_ids]


def _enter_world(store: Store, rank: int, size: int) -> str:
    """Tell MPI, which has not started yet, who and where it is. Returns this rank's world id."""
    hosts = store_all_gather(store, "mpi/host", rank, size, host_id())
    if rank == 0:
        words = [sys.executable, "-I", "-S", pmi.__file__, str(size), pmi.process_mapping(hosts)]
        started = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        _managers.append(started)
        assert started.stdin is not None
        assert started.stdout is not None
        token = secrets.token_hex(16)
        started.stdin.write(f"{token}\n".encode())
        started.stdin.flush()
        store.set("mpi/manager", f"{started.stdout.readline().decode().strip()} {token}")
    port_text, token = store.get("mpi/manager").decode().split()
    port = int(port_text)
    address = resolve(store_host(store, os.environ), port)
    root = EXTENSION.find("impi-rt", "libmpi.so.12").parents[1]
    os.environ.update(settings(interface_towards(address), root, os.environ))
    # A connection of ours, since MPI cannot make one to an IPv6 address.
    manager = pmi.connect(address, port, rank, token)
    os.environ.update(PMI_FD=str(manager.detach()), PMI_RANK=str(rank), PMI_SIZE=str(size))
    return f"{port} {rank}"


def register() -> None:
    """Make `impi` known to torch. Raises ExtensionUnavailable, which says what to do, before anything starts."""
    load_extension()
    dist.Backend.register_backend(TORCH_NAME, create, extended_api=True, devices=["cpu"])
