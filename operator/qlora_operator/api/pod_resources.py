"""What a pod of ranks requests of its node: what its ranks need, and what the pod itself does."""

from qlora_contract.run_config import RunStage
from qlora_operator.api.quantity import parse_memory, parse_quantity
from qlora_operator.api.v1alpha1 import Topology

AUTO_RANKS = 8
"""Ranks of a pod that are assumed where its launcher finds their number: the NUMA clusters of a two-socket server."""
TMP_BYTES = 256 * 2**20
"""Limit of a pod's /tmp, which is in memory."""
SHM_BYTES_PER_RANK = 64 * 2**20
"""Each rank's part of its pod's /dev/shm, through which the pod's ranks communicate; oneCCL uses nearly all of it."""
CHECK_MILLICORES = 100
"""What the container beside a fetch requests that looks at the data: it begins when the fetch has ended, whose CPUs it
then uses."""


def fetch_cpus(cpu: str) -> tuple[str, str]:
    """What a fetch and the look at its data request of a CPU quantity, which may be all of a node's: in all no more."""
    whole = int(parse_quantity(cpu) * 1000)
    check = min(CHECK_MILLICORES, whole // 2)
    return f"{whole - check}m", f"{check}m"


def with_pods(topology: Topology, pods: int | None) -> Topology:
    """The topology of an attempt that makes do with so many pods; None: with all."""
    return topology if pods is None else topology.model_copy(update={"pods": pods})


def stage_pods(topology: Topology, stage: RunStage) -> int:
    """Pods of an attempt: a transfer, or an export, has one, however many train."""
    return topology.pods if stage == "train" else 1


def stage_topology(topology: Topology, stage: RunStage) -> Topology:
    """The topology of an attempt's processes: what an adapter is exported by is one rank, which has what each rank has
    that trains. That is enough: the trained model is gone by then, and a shard of it at a time is merged."""
    return topology.model_copy(update={"pods": 1, "ranks_per_pod": 1}) if stage == "export" else topology


def resource_multiplier(topology: Topology) -> int:
    """How many times a pod has cpusPerRank and memoryPerRank; with `auto` they are the pod's."""
    return 1 if topology.ranks_per_pod == "auto" else topology.ranks_per_pod


def shm_bytes(topology: Topology) -> int:
    """Limit of a pod's /dev/shm, in bytes."""
    ranks = AUTO_RANKS if topology.ranks_per_pod == "auto" else topology.ranks_per_pod
    return ranks * SHM_BYTES_PER_RANK


def pod_memory(topology: Topology) -> int:
    """Bytes of a pod: its ranks', and its full /tmp and /dev/shm, which count towards its limit."""
    return (
        resource_multiplier(topology) * parse_memory(topology.memory_per_rank)
        + TMP_BYTES
        + shm_bytes(topology)
    )


def pod_cpus(topology: Topology) -> int:
    """Whole CPUs of a pod."""
    return resource_multiplier(topology) * topology.cpus_per_rank
