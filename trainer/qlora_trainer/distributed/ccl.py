"""The backend `ccl`: oneCCL, compiled ahead (see build.py), or Intel's own binding where that fits.

`init_process_group("ccl")` finds `register` by the entry point of its name.
"""

import functools
import logging
import os
from collections.abc import Collection, Mapping
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from qlora_trainer.distributed import compiled, upstream
from qlora_trainer.distributed.interface import interface_towards, resolve
from qlora_trainer.distributed.libraries import BackendUnavailable, find, preload
from qlora_trainer.distributed.nodes import exchange, fresh, local_place, node_name, store_host
from qlora_trainer.distributed.shared_memory import sweep

log = logging.getLogger("qlora_trainer")

NAME = "ccl"


def settings(
    interface: str, nodes: list[str], rank: int, cpus: Collection[int], environ: Mapping[str, str]
) -> dict[str, str]:
    """Environment variables that oneCCL reads when it starts; what the user set is kept. Pure.

    `nodes` names each rank's node; where ranks share one, every rank of the world uses shared memory for those.

    Without worker threads (`CCL_WORKER_OFFLOAD=0`) the calling thread does the work: workers spin,
    and cost 2 to 40 times the latency. Who turns them on gets them bound to CPUs that this process
    may use, the last ones: oneCCL's own choice, the host's last cores, fails inside a container.
    """
    local_rank, local_size = local_place(nodes, rank)
    wanted = {
        "CCL_ATL_SHM": str(int(len(set(nodes)) < len(nodes))),
        "CCL_ATL_TRANSPORT": "ofi",
        "CCL_WORKER_OFFLOAD": "0",
        "CCL_YIELD": "sched_yield",
        "CCL_LOG_LEVEL": "error",
        "CCL_PROCESS_LAUNCHER": "none",
        "CCL_LOCAL_RANK": str(local_rank),
        "CCL_LOCAL_SIZE": str(local_size),
        "CCL_KVS_IFACE": interface,
        "FI_PROVIDER": "tcp",
        "FI_TCP_IFACE": interface,
    }
    if environ.get("CCL_WORKER_OFFLOAD", "0") != "0":
        workers = int(environ.get("CCL_WORKER_COUNT", "1"))
        wanted["CCL_WORKER_AFFINITY"] = ",".join(str(cpu) for cpu in sorted(cpus)[-workers:])
    return {name: value for name, value in wanted.items() if not environ.get(name)}


@functools.cache
def extension() -> ModuleType:
    """The compiled backend, with its libraries. Raises BackendUnavailable."""
    fabric = find("impi-rt", "libfabric.so.1", NAME)
    preload(find("tcmlib", "libhwloc.so.15", NAME))
    os.environ.setdefault("CCL_OFI_LIBRARY_PATH", str(fabric))
    os.environ.setdefault("FI_PROVIDER_PATH", str(fabric.parent))
    return compiled.load(NAME)


def create(options: Any, _: Any) -> Any:
    """A c10d backend for one group: torch calls this with its DistributedBackendOptions."""
    sweep()
    store = fresh(options.store, options.group_id)
    rank, size = options.group_rank, options.group_size
    nodes = exchange(store, "ccl/node", rank, size, node_name())
    interface = interface_towards(resolve(store_host(store, os.environ), 0))
    own = settings(interface, nodes, rank, os.sched_getaffinity(0), os.environ)
    os.environ.update(own)
    return extension().create(store, rank, size, timedelta(seconds=_seconds(options.timeout)))


def _seconds(timeout: Any) -> float:
    return float(timeout.total_seconds() if isinstance(timeout, timedelta) else timeout)


def register() -> None:
    """Make `ccl` known to torch. Raises BackendUnavailable, whose text says what to do, before anything starts."""
    binding = upstream.installed_version()
    reason = upstream.mismatch(binding, torch.__version__) if binding else None
    if binding and not reason:
        upstream.load()
        return
    try:
        extension()
    except BackendUnavailable as error:
        raise BackendUnavailable(f"{reason}; {error}" if reason else str(error)) from None
    if reason:
        log.warning("%s; the one compiled here is used instead", reason)
    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu"])
