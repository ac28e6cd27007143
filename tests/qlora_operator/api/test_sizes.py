"""What a pod asks of its node."""

from qlora_operator.api.sizes import SHM_BYTES, TMP_BYTES, pod_cpus, pod_memory
from qlora_operator.api.types import Topology


def test_a_pod_has_the_memory_of_its_ranks_and_of_its_own_folders() -> None:
    """What /tmp and /dev/shm may fill is asked for once per pod, beyond what the user asks for per rank."""
    topology = Topology.model_validate({"pods": 3, "ranksPerPod": 2, "memoryPerRank": "16Gi"})

    assert pod_memory(topology) == 32 * 2**30 + TMP_BYTES + SHM_BYTES


def test_a_pod_has_the_cpus_of_its_ranks() -> None:
    """Other pods' ranks do not count."""
    topology = Topology.model_validate(
        {"pods": 3, "ranksPerPod": 2, "cpusPerRank": 5, "memoryPerRank": "16Gi"}
    )

    assert pod_cpus(topology) == 10
