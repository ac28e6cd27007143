"""The backend `ccl`: oneCCL, compiled ahead (see native/build.py).

`init_process_group("ccl")` finds `register` by the entry point of its name.
"""

import functools
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from qlora_trainer.distributed.backends import upstream
from qlora_trainer.distributed.backends.hosts import (
    host_id,
    local_rank_and_size,
    store_all_gather,
    store_host,
    unique_store,
)
from qlora_trainer.distributed.backends.shared_memory import remove_stale_regions
from qlora_trainer.host.network import interface_towards, resolve
from qlora_trainer.native.extension import Extension
from qlora_trainer.native.libraries import ExtensionUnavailable, preload

log = logging.getLogger("qlora_trainer")

NAME = "ccl"
REPEATABLE_ALLREDUCE = "ring"
"""The algorithm of oneCCL that adds up more than two numbers in the same order in every run. What it chooses by itself
adds up messages of up to 1 MB as they come: another sum in some calls."""
EXTENSION = Extension.read(Path(__file__).parent / "csrc" / "ccl.toml")


def settings(
    interface: str, hosts: list[str], rank: int, cpus: Collection[int], environ: Mapping[str, str]
) -> dict[str, str]:
    """Environment variables that oneCCL reads when it starts; what the user set is kept. Pure.

    `hosts` has each rank's host; where ranks share one, every rank of the world uses shared memory for those.

    Without worker threads (`CCL_WORKER_OFFLOAD=0`) the calling thread does the work: workers spin,
    and cost 2 to 40 times the latency. Who turns them on gets them bound to CPUs that this process
    may use, the last ones: oneCCL's own choice, the host's last cores, fails inside a container.
    """
    local_rank, local_size = local_rank_and_size(hosts, rank)
    wanted = {
        "CCL_ATL_SHM": str(int(len(set(hosts)) < len(hosts))),
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
    if len(hosts) > 2:  # a sum of two numbers has one rounding
        wanted["CCL_ALLREDUCE"] = REPEATABLE_ALLREDUCE
    if environ.get("CCL_WORKER_OFFLOAD", "0") != "0":
        workers = int(environ.get("CCL_WORKER_COUNT", "1"))
        wanted["CCL_WORKER_AFFINITY"] = ",".join(str(cpu) for cpu in sorted(cpus)[-workers:])
    return {name: value for name, value in wanted.items() if not environ.get(name)}


@functools.cache
def load_extension() -> ModuleType:
    """The compiled backend, with its libraries. Raises ExtensionUnavailable."""
    fabric = EXTENSION.find("impi-rt", "libfabric.so.1")
    preload(EXTENSION.find("tcmlib", "libhwloc.so.15"))
    os.environ.setdefault("CCL_OFI_LIBRARY_PATH", str(fabric))
    os.environ.setdefault("FI_PROVIDER_PATH", str(fabric.parent))
    return EXTENSION.load()


def create(options: Any, _: Any) -> Any:
    """A c10d backend for one group: torch calls this with its DistributedBackendOptions."""
    remove_stale_regions()
    store = unique_store(options.store, options.group_id)
    rank, size = options.group_rank, options.group_size
    hosts = store_all_gather(store, "ccl/host", rank, size, host_id())
    interface = interface_towards(resolve(store_host(store, os.environ), 0))
    os.environ.update(settings(interface, hosts, rank, os.sched_getaffinity(0), os.environ))
    return load_extension().create(store, rank, size, options.timeout)


def register() -> None:
    """Make `ccl` known to torch. Raises ExtensionUnavailable, which says what to do, before anything starts."""
    refusal = upstream.refusal(torch.__version__)
    try:
        load_extension()
    except ExtensionUnavailable as error:
        raise ExtensionUnavailable(f"{refusal}; {error}" if refusal else str(error)) from None
    if refusal:
        log.warning("%s; the backend compiled here is used instead", refusal)
    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu"])
