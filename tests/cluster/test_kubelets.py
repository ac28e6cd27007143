"""A kubelet keeps for itself every CPU that is not its node's."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from testcluster import kubelets
from testcluster.node import Node

NODE = Node("node-a", "10.77.0.11", "10.77.1.0/24", "qlora-a", 0, Path("/nowhere"), Path("/nowhere"))


@pytest.mark.parametrize("cpu", sorted(os.sched_getaffinity(0)))
def test_all_cpus_but_one_are_reserved(cpu: int) -> None:
    """Pods of a node may own its one CPU, however many the machine has."""
    reserved = {int(word) for word in kubelets.reserved_cpus(replace(NODE, cpu=cpu)).split(",") if word}

    assert reserved == os.sched_getaffinity(0) - {cpu}
