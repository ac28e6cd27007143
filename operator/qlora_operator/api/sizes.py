"""What a pod of ranks asks of its node, its own needs besides the ranks' included."""

from qlora_contract.run import RunStage
from qlora_operator.api.quantity import parse_memory
from qlora_operator.api.types import Topology

AUTO_RANKS = 8
"""Ranks that a pod is counted with where its launcher settles their number: clusters of a server with two sockets."""
TMP_BYTES = 256 * 2**20
"""Bound of a pod's /tmp, which lies in memory."""
SHM_BYTES_PER_RANK = 64 * 2**20
"""What a rank may take of its pod's /dev/shm, through which the pod's ranks talk; oneCCL takes nearly all of it."""


def stage_pods(topology: Topology, stage: RunStage) -> int:
    """Pods of an attempt: one pod transfers, however many train."""
    return topology.pods if stage == "train" else 1


def shares(topology: Topology) -> int:
    """How many times a pod has cpusPerRank and memoryPerRank; with `auto` they are the pod's."""
    return 1 if topology.ranks_per_pod == "auto" else topology.ranks_per_pod


def shm_bytes(topology: Topology) -> int:
    """Bound of a pod's /dev/shm."""
    ranks = AUTO_RANKS if topology.ranks_per_pod == "auto" else topology.ranks_per_pod
    return ranks * SHM_BYTES_PER_RANK


def pod_memory(topology: Topology) -> int:
    """Bytes of a pod: its ranks', and what its /tmp and /dev/shm may fill, which counts as the pod's too."""
    return shares(topology) * parse_memory(topology.memory_per_rank) + TMP_BYTES + shm_bytes(topology)


def pod_cpus(topology: Topology) -> int:
    """Whole CPUs of a pod."""
    return shares(topology) * topology.cpus_per_rank
