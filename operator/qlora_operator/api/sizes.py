"""What a pod of ranks asks of its node, its own needs besides the ranks' included."""

from qlora_contract.run import RunStage
from qlora_operator.api.quantity import parse_memory
from qlora_operator.api.types import Topology

TMP_BYTES = 256 * 2**20
"""Bound of a pod's /tmp, which lies in memory."""
SHM_BYTES = 64 * 2**20
"""Bound of a pod's /dev/shm, through which its ranks talk."""


def stage_pods(topology: Topology, stage: RunStage) -> int:
    """Pods of an attempt: one pod transfers, however many train."""
    return topology.pods if stage == "train" else 1


def pod_memory(topology: Topology) -> int:
    """Bytes of a pod: its ranks', and what its /tmp and /dev/shm may fill, which counts as the pod's too."""
    return topology.ranks_per_pod * parse_memory(topology.memory_per_rank) + TMP_BYTES + SHM_BYTES


def pod_cpus(topology: Topology) -> int:
    """Whole CPUs of a pod."""
    return topology.ranks_per_pod * topology.cpus_per_rank
