"""The pods of a job on one machine: the ISA tier of all, and the CPUs of each."""

from collections.abc import Sequence

from qlora_contract.cpus import partition
from qlora_contract.exit_codes import ExitCode
from qlora_contract.plan import Machine
from qlora_contract.run_config import IsaTier
from qlora_operator.api.pod_resources import pod_cpus
from qlora_operator.api.v1alpha1 import Topology
from qlora_operator.errors import CommandError


class PlacementError(CommandError):
    """The job does not fit this machine; `code` is what its ranks would exit with."""


def choose_tier(allowed: Sequence[IsaTier], machine: Machine) -> IsaTier:
    """The first allowed tier that the machine meets.

    Raises:
        PlacementError: it meets none; says what the machine has and lacks.
    """
    for tier in allowed:
        if tier in machine.tiers:
            return tier
    lacking = ", ".join(machine.lacking[allowed[-1]])
    has = machine.tiers[0] if machine.tiers else "no ISA tier at all"
    remedy = f"add {has} to spec.isa.allowed" if machine.tiers else "an x86-64 processor with AVX2 is needed"
    raise PlacementError(
        f"this machine has {has}, and spec.isa.allowed has only {', '.join(allowed)}: "
        f"it lacks {lacking} for {allowed[-1]}; {remedy}, or take another machine",
        ExitCode.ISA_BELOW_TIER,
    )


def launcher_cpus(topology: Topology, machine: Machine) -> list[list[int]]:
    """The CPUs of each pod's launcher: disjoint, and no more than can run at once.

    When there are too few, best-effort pinning shares them evenly, or in turns.

    Raises:
        PlacementError: there are too few, and pinning is strict.
    """
    usable, each = machine.usable_cpus, pod_cpus(topology)
    needed = topology.pods * each
    if topology.pinning == "strict" and usable < needed:
        what, less = f"{topology.ranks_per_pod} rank(s) of {topology.cpus_per_rank} CPU(s)", ", ranksPerPod"
        if topology.ranks_per_pod == "auto":
            what, less = f"{each} CPU(s)", ""
        raise PlacementError(
            f"{topology.pods} pod(s) with {what} "
            f"need {needed} CPUs, and {usable} can be used here: lower spec.topology.cpusPerRank{less} or pods, "
            "or set spec.topology.pinning to best-effort",
            ExitCode.INVALID_CONFIGURATION,
        )
    return partition(machine.cpus[:usable], topology.pods, each)
