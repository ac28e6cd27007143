"""The pods of a job on one machine: the ISA tier of all, the ranks and CPUs of each, and whether memory suffices."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_contract.cpus import format_cpu_list, partition
from qlora_contract.exit_codes import ExitCode
from qlora_contract.plan import Machine
from qlora_contract.run_config import IsaTier
from qlora_contract.units import format_bytes
from qlora_operator.api.pod_resources import pod_cpus, resource_multiplier
from qlora_operator.api.quantity import parse_memory
from qlora_operator.api.v1alpha1 import QLoRAJob, Topology
from qlora_operator.errors import CommandError

MOST_CPUS_PER_RANK = 1024
"""As the API has it."""
MEMORY_SHARE = 0.8
"""Of the memory that is free, what ranks may take whose job does not say how much."""
MEMORY_STEP = 256 * 2**20
"""Such a rank's bytes are a multiple of it: a number that people can read."""


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


def on_this_machine(topology: Topology, machine: Machine) -> Topology:
    """The topology, with what the job leaves out filled in so that it uses the machine.

    Without cpusPerRank all CPUs are shared among the ranks. Without ranksPerPod either there is one for each NUMA
    cluster, or as many fewer as memoryPerRank leaves room for. Without memoryPerRank, as in a job without a file, the
    ranks share most of the memory that is free. Only what the job's file has counts as written: the API server, which
    fills in defaults, knows no such machine.
    """
    written, filled_in = topology.model_fields_set, dict[str, Any]()
    ranks, memory = topology.ranks_per_pod, machine.free_memory or machine.memory
    if "cpus_per_rank" not in written:
        if "ranks_per_pod" not in written:
            room = machine.clusters
            if memory is not None and "memory_per_rank" in written:
                room = min(room, memory // parse_memory(topology.memory_per_rank))
            ranks = max(1, room // topology.pods)
        sharing = topology.pods * (1 if ranks == "auto" else ranks)
        cpus = min(max(1, machine.usable_cpus // sharing), MOST_CPUS_PER_RANK)
        filled_in = {"ranks_per_pod": ranks, "cpus_per_rank": cpus}
    if "memory_per_rank" not in written and memory is not None:
        sharing = topology.pods * (1 if ranks == "auto" else ranks)
        steps = int(MEMORY_SHARE * memory / sharing) // MEMORY_STEP
        filled_in["memory_per_rank"] = f"{max(1, steps) * MEMORY_STEP // 2**20}Mi"
    return topology.model_copy(update=filled_in)


def with_topology(job: QLoRAJob, topology: Topology) -> QLoRAJob:
    """The job with another topology."""
    return job.model_copy(update={"spec": job.spec.model_copy(update={"topology": topology})})


def launcher_cpus(
    topology: Topology, machine: Machine, busy: Mapping[int, str] | None = None
) -> list[list[int]]:
    """The CPUs of each pod's launcher: disjoint, no other job's, and no more than can run at once.

    When there are too few, best-effort pinning shares them evenly, or in turns; when every one is another job's, with
    that job.

    Args:
        topology: what the job asks for.
        machine: what there is.
        busy: CPUs that are in use by another job, and which one that is.

    Raises:
        PlacementError: there are too few, and pinning is strict.
    """
    free = without(machine, busy or {})
    usable, each = free.usable_cpus if free.cpus else 0, pod_cpus(topology)
    needed = topology.pods * each
    if topology.pinning == "strict" and usable < needed:
        what, less = f"{topology.ranks_per_pod} rank(s) of {topology.cpus_per_rank} CPU(s)", ", ranksPerPod"
        if topology.ranks_per_pod == "auto":
            what, less = f"{each} CPU(s)", ""
        others = f" ({'; '.join(in_use(busy))})" if busy else ""
        remedies = ["wait until they are free"] if busy else []
        if usable:
            remedies.append(f"lower spec.topology.cpusPerRank{less} or pods")
        remedies.append("set spec.topology.pinning to best-effort, which shares them" if busy else
                        "set spec.topology.pinning to best-effort")  # fmt: skip
        raise PlacementError(
            f"{topology.pods} pod(s) with {what} need {needed} CPUs, and {usable} can be used here{others}: "
            f"{', or '.join(remedies)}",
            ExitCode.INVALID_CONFIGURATION,
        )
    chosen = free if free.cpus else machine
    return partition(chosen.cpus[: chosen.usable_cpus], topology.pods, each)


def without(machine: Machine, busy: Mapping[int, str]) -> Machine:
    """The machine without the CPUs that other jobs use."""
    return machine.model_copy(update={"cpus": [cpu for cpu in machine.cpus if cpu not in busy]})


def in_use(busy: Mapping[int, str]) -> list[str]:
    """A sentence for each job that has CPUs here, such as `CPUs 0-3 are in use by job demo (process 17)`."""
    by_holder: dict[str, list[int]] = {}
    for cpu, holder in busy.items():
        by_holder.setdefault(holder, []).append(cpu)
    return [f"CPUs {format_cpu_list(cpus)} are in use by {holder}" for holder, cpus in by_holder.items()]


def idle_cpus(
    topology: Topology,
    machine: Machine,
    launchers: Sequence[Sequence[int]],
    busy: Mapping[int, str] | None = None,
) -> list[str]:
    """Which of the machine's CPUs the job leaves idle and why, in a sentence each; those of other jobs, too.

    Args:
        topology: as `on_this_machine` returns it.
        machine: what there is.
        launchers: as `launcher_cpus` returns it.
        busy: as for `launcher_cpus`.
    """
    notes = in_use(busy or {})
    free = without(machine, busy or {})
    given = {cpu for cpus in launchers for cpu in cpus}
    idle = [cpu for cpu in free.cpus if cpu not in given]
    if not idle:
        return notes
    left = free.usable_cpus - len(given)
    if left <= 0:
        return [
            *notes,
            f"CPUs {format_cpu_list(idle)} stay idle: a quota of {machine.quota:g} CPUs is all that can be used",
        ]
    ranks = topology.pods * resource_multiplier(topology)
    why = f"the job asks for {ranks} x {topology.cpus_per_rank} CPU(s)"
    if left < ranks:
        why = f"{free.usable_cpus} CPUs cannot be shared evenly among {ranks}"
    remedy = "" if left < ranks else "; without spec.topology.cpusPerRank it uses all"
    return [*notes, f"CPUs {format_cpu_list(idle)} stay idle: {why}{remedy}"]


def all_memory(topology: Topology) -> int:
    """Bytes that all ranks together may take."""
    return topology.pods * resource_multiplier(topology) * parse_memory(topology.memory_per_rank)


def less_promised(machine: Machine, promised: Mapping[str, int]) -> Machine:
    """The machine without the memory that other jobs may yet take."""
    if machine.free_memory is None:
        return machine
    return machine.model_copy(update={"free_memory": max(0, machine.free_memory - sum(promised.values()))})


def promises(promised: Mapping[str, int]) -> list[str]:
    """A sentence for each job that may take more: `job demo (process 17) may take 2.00 GiB more memory`."""
    return [
        f"{holder} may take {format_bytes(size)} more memory" for holder, size in promised.items() if size
    ]


def memory_shortage(
    topology: Topology, machine: Machine, promised: Mapping[str, int] | None = None
) -> str | None:
    """Why the ranks cannot have memoryPerRank here, and what to do; None when they can, or where nothing is known.

    Args:
        topology: as `on_this_machine` returns it.
        machine: what there is.
        promised: holder -> bytes that it may yet take of what is free.
    """
    parts, needed = topology.pods * resource_multiplier(topology), all_memory(topology)
    # With auto, memoryPerRank is the pod's.
    unit = "pod(s)" if topology.ranks_per_pod == "auto" else "rank(s)"
    asked = f"{parts} {unit} with spec.topology.memoryPerRank {topology.memory_per_rank} may use {format_bytes(needed)}"
    lower = "lower memoryPerRank (`qlora plan` shows what the job needs)"
    if parts > 1:
        lower += " or the number of ranks"
    if machine.memory is not None and needed > machine.memory:
        return f"{asked}, and this machine has {format_bytes(machine.memory)}: {lower}"
    free = less_promised(machine, promised or {}).free_memory
    if free is not None and needed > free:
        others = "".join(f"; {sentence}" for sentence in promises(promised or {}))
        return (
            f"{asked}, and {format_bytes(free)} of this machine's memory are free{others}: end what uses the "
            f"rest, or {lower}"
        )
    return None
