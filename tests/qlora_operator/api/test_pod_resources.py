"""What a pod asks of its node."""

import pytest

from qlora_contract.run_config import RunStage
from qlora_operator.api.pod_resources import (
    AUTO_RANKS,
    SHM_BYTES_PER_RANK,
    TMP_BYTES,
    pod_cpus,
    pod_memory,
    stage_pods,
)
from qlora_operator.api.v1alpha1 import Topology


def test_a_pod_has_the_memory_of_its_ranks_and_of_its_own_folders() -> None:
    """What /tmp and each rank in /dev/shm may fill is asked for beyond what the user asks for per rank."""
    topology = Topology.model_validate({"pods": 3, "ranksPerPod": 2, "memoryPerRank": "16Gi"})

    assert pod_memory(topology) == 32 * 2**30 + TMP_BYTES + 2 * SHM_BYTES_PER_RANK


def test_a_pod_whose_ranks_are_settled_there_has_what_the_job_says() -> None:
    """With `auto`, cpusPerRank and memoryPerRank are the pod's, however many ranks come of it."""
    topology = Topology.model_validate(
        {"pods": 3, "ranksPerPod": "auto", "cpusPerRank": 96, "memoryPerRank": "400Gi"}
    )

    assert pod_cpus(topology) == 96
    assert pod_memory(topology) == 400 * 2**30 + TMP_BYTES + AUTO_RANKS * SHM_BYTES_PER_RANK


def test_a_pod_has_the_cpus_of_its_ranks() -> None:
    """Other pods' ranks do not count."""
    topology = Topology.model_validate(
        {"pods": 3, "ranksPerPod": 2, "cpusPerRank": 5, "memoryPerRank": "16Gi"}
    )

    assert pod_cpus(topology) == 10


@pytest.mark.parametrize(("stage", "pods"), [("fetch", 1), ("train", 7), ("publish", 1)])
def test_one_pod_transfers_however_many_train(stage: RunStage, pods: int) -> None:
    """More would fetch the same files, or send them, twice."""
    topology = Topology.model_validate({"pods": 7, "memoryPerRank": "16Gi"})

    assert stage_pods(topology, stage) == pods
