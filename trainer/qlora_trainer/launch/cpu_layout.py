"""Which CPUs, threads and memory each rank of a pod gets. Decides, and touches nothing.

- A thread computes on a physical core of its own. The core's other hardware threads stay idle, or take the rank's
  service threads: communication, heartbeat, progress. Cores that are left over serve these first.
- All ranks of a pod have the same number of threads. Every rank gets the same share of a step, so a rank with more
  would wait for those with fewer.
- `auto` makes one rank of each NUMA node of the pod's CPUs (with SNC or NPS: of each cluster), of as many nodes as
  keep the most cores busy under that rule; smaller ones are left out. Where joining the nodes of a socket, or all of
  them, into one rank keeps more than JOIN_GAIN times as many cores busy, they are joined: memory farther away costs
  less than idle cores.
- A given number of ranks is spread over the nodes, each within one node, and within one last-level cache, while it
  fits there.
- Ranks are pinned only to CPUs that no other pod uses: chosen for this launcher, or no more than the pod asked for,
  as a kubelet with static CPU management gives. Otherwise all pods of a node would crowd on its first CPUs: there
  they are not pinned, have as many threads as their share of the quota, and `auto` is one rank.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from qlora_contract.cpus import format_cpu_list
from qlora_contract.run_config import MemoryTier, Pinning, RanksPerPod
from qlora_trainer.host.hbm import choose_hbm
from qlora_trainer.host.numa import Core, Machine

JOIN_GAIN = 1.25
"""Nodes are joined into one rank when that keeps more than this many times as many cores busy. An estimate: within a
socket farther memory is a tenth slower, beyond it half as fast, and most of a step is products that live in caches."""
MAX_SERVICE_CORES = 2
"""Left-over cores that a rank's service threads get at most; they are seldom busy."""


class LayoutError(ValueError):
    """The ranks do not fit on these CPUs; the message says what would."""


@dataclass(frozen=True)
class AvailableCpus:
    """What a launcher may use of its machine."""

    cpus: tuple[int, ...]
    quota: float | None = None
    """CPUs' worth of time; None: no quota."""
    exclusive: bool = False
    """These CPUs were chosen for this launcher, so nobody else uses them."""
    memory_nodes: tuple[int, ...] | None = None
    """NUMA nodes whose memory it may use; None: all."""
    may_set_memory_policy: bool = False

    @property
    def usable(self) -> int:
        """How many CPUs can be busy at once, at least one."""
        return len(self.cpus) if self.quota is None else max(1, min(len(self.cpus), int(self.quota)))


@dataclass(frozen=True)
class CpuRequest:
    """What a job asks for in each pod."""

    ranks: RanksPerPod
    cpus: int
    """CPUs of all the pod's ranks together."""
    pinning: Pinning = "strict"
    """`strict` refuses what cannot be had; `best-effort` takes what there is and says so."""
    memory_tier: MemoryTier = "any"


@dataclass(frozen=True)
class CpuAssignment:
    """Where one rank runs."""

    cpus: tuple[int, ...]
    """Where its threads compute: its affinity from the start, so that its memory is near."""
    threads: int
    """Threads that compute."""
    service_cpus: tuple[int, ...] = ()
    """CPUs for its other threads; empty: they share `cpus`."""
    nodes: tuple[int, ...] = ()
    """NUMA nodes of `cpus`."""
    memory_node: int | None = None
    """NUMA node whose memory it prefers; None: that of the CPU that touches it first."""


@dataclass(frozen=True)
class CpuLayout:
    """The ranks of a pod."""

    ranks: tuple[CpuAssignment, ...]
    pinned: bool
    """Whether each rank has CPUs of its own."""
    unused: tuple[int, ...] = ()
    """Available CPUs on whose core nothing runs."""
    notes: tuple[str, ...] = ()
    """What may surprise, and why it is so."""

    def lines(self) -> list[str]:
        """The layout as log lines without line ends: one for each rank, one for unused CPUs, one for each note."""
        lines = []
        for number, rank in enumerate(self.ranks):
            line = f"local rank {number}: {rank.threads} thread(s) on {'' if self.pinned else 'any of '}CPUs "
            line += f"{format_cpu_list(rank.cpus)}, NUMA node(s) {format_cpu_list(rank.nodes)}"
            if rank.service_cpus:
                line += f", service threads on CPUs {format_cpu_list(rank.service_cpus)}"
            if rank.memory_node is not None:
                line += f", memory of node {rank.memory_node}"
            lines.append(line)
        if self.unused:
            lines.append(f"unused: CPUs {format_cpu_list(self.unused)}")
        return [*lines, *self.notes]


def compute_layout(machine: Machine, available: AvailableCpus, request: CpuRequest) -> CpuLayout:
    """The ranks of a pod, each with its CPUs, threads and memory. The same input gives the same layout.

    Raises:
        LayoutError: pinning is strict and there are too few CPUs or cores, or not the memory that was asked for.
    """
    _check_cpus(available, request)
    cores = machine.cores_of(available.cpus)
    # As far as can be known, no other pod uses these CPUs.
    exclusive = available.usable == len(available.cpus) and (
        available.exclusive or len(available.cpus) <= request.cpus
    )
    if not exclusive:
        layout = _unpinned(available, request, cores)
    elif request.ranks == "auto":
        layout = _one_per_cluster(cores)
    elif len(cores) < request.ranks:
        layout = _oversubscribed(cores, request.ranks, request.pinning)
    else:
        layout = _spread(cores, request.ranks, request.cpus // request.ranks)
    ranks = (replace(rank, nodes=machine.nodes_of(rank.cpus)) for rank in layout.ranks)
    layout = replace(layout, ranks=tuple(ranks))
    if request.memory_tier == "any":
        return layout
    nodes, problem = choose_hbm(
        machine,
        [rank.nodes for rank in layout.ranks],
        available.memory_nodes,
        may_set_policy=available.may_set_memory_policy,
    )
    if problem and request.pinning == "strict":
        raise LayoutError(f"{problem}, or topology.pinning to best-effort to do without")
    ranks = (replace(rank, memory_node=node) for rank, node in zip(layout.ranks, nodes, strict=True))
    return replace(layout, ranks=tuple(ranks), notes=(*layout.notes, *([problem] if problem else [])))


def _check_cpus(available: AvailableCpus, request: CpuRequest) -> None:
    if not available.cpus:
        raise LayoutError("no CPU can be used here: at least one is needed")
    if request.pinning != "strict" or available.usable >= request.cpus:
        return
    if request.ranks == "auto":
        raise LayoutError(
            f"the pod asks for {request.cpus} CPUs, but only {available.usable} can be used here: "
            "lower topology.cpusPerRank, or set topology.pinning to best-effort"
        )
    raise LayoutError(
        f"{request.ranks} rank(s) of {request.cpus // request.ranks} CPU(s) need {request.cpus} CPUs, but only "
        f"{available.usable} can be used here: lower topology.cpusPerRank or topology.ranksPerPod, or set "
        "topology.pinning to best-effort"
    )


# --- the kinds of layout


def _unpinned(available: AvailableCpus, request: CpuRequest, cores: Sequence[Core]) -> CpuLayout:
    """Ranks that the kernel's scheduler places: it sees who else is busy on these CPUs, and we do not."""
    ranks = 1 if request.ranks == "auto" else request.ranks
    threads = max(1, min(request.cpus // ranks, available.usable // ranks, len(cores) // ranks))
    note = (
        "other pods may use these CPUs too, so ranks are not pinned: a pod gets CPUs of its own from a kubelet with "
        "cpuManagerPolicy static"
    )
    if request.ranks == "auto":
        note += "; ranksPerPod auto is one rank here"
    return CpuLayout((CpuAssignment(available.cpus, threads),) * ranks, pinned=False, notes=(note,))


def _oversubscribed(cores: Sequence[Core], ranks: int, pinning: Pinning) -> CpuLayout:
    """More ranks than cores: a hardware thread each, those of different cores first; then several ranks on each."""
    if pinning == "strict":
        cpus = format_cpu_list(chain(*(core.cpus for core in cores)))
        raise LayoutError(
            f"{ranks} rank(s) need a physical core each, but CPUs {cpus} are the hardware threads of only "
            f"{len(cores)} core(s): raise topology.cpusPerRank to the hardware threads of a core, lower "
            "topology.ranksPerPod, or set topology.pinning to best-effort"
        )
    threads_per_core = max(len(core.cpus) for core in cores)
    order = [
        core.cpus[thread] for thread in range(threads_per_core) for core in cores if thread < len(core.cpus)
    ]
    assignments = tuple(CpuAssignment((order[rank % len(order)],), 1) for rank in range(ranks))
    return CpuLayout(assignments, pinned=True, notes=(f"{ranks} ranks share {len(cores)} core(s)",))


def _spread(cores: Sequence[Core], ranks: int, cpus_per_rank: int) -> CpuLayout:
    """A given number of ranks of min(cpus_per_rank, cores / ranks) cores each, within one NUMA node if they fit.

    Equal sizes cannot fragment a node, so the node with the most free cores is right for every next rank.
    """
    size = min(cpus_per_rank, len(cores) // ranks)
    free = list(cores)
    groups: list[list[Core]] = []
    for _ in range(ranks):
        in_node = _largest_group(free, lambda core: core.node)
        candidates = in_node if len(in_node) >= size else free
        in_cache = _largest_group(candidates, lambda core: (core.node, core.cache))
        taken = (in_cache if len(in_cache) >= size else candidates)[:size]
        groups.append(taken)
        free = [core for core in free if core not in taken]
    return _pinned(cores, groups)


def _one_per_cluster(cores: Sequence[Core]) -> CpuLayout:
    """One rank for each NUMA node; for each socket, or for all, where that keeps clearly more cores busy."""
    best: list[list[Core]] = []
    levels: list[Callable[[Core], Hashable]] = [
        lambda core: core.node,
        lambda core: core.socket,
        lambda _: None,
    ]
    for level in levels:
        groups = _equal_groups(_group(cores, level))
        if sum(map(len, groups)) > JOIN_GAIN * sum(map(len, best)):
            best = groups
    layout = _pinned(cores, best)
    left_out = {core.node for core in cores} - {core.node for group in best for core in group}
    if not left_out:
        return layout
    note = f"NUMA node(s) {format_cpu_list(left_out)} are left out: all ranks would wait for one on their few cores"
    return replace(layout, notes=(note,))


def _equal_groups(groups: list[list[Core]]) -> list[list[Core]]:
    """The most cores in groups of one size: the largest groups, all cut to the smallest of them."""
    groups = sorted(groups, key=len, reverse=True)
    count = max(range(1, len(groups) + 1), key=lambda count: (count * len(groups[count - 1]), count))
    return [group[: len(groups[count - 1])] for group in groups[:count]]


def _group(cores: Iterable[Core], key: Callable[[Core], Hashable]) -> list[list[Core]]:
    groups: dict[Hashable, list[Core]] = {}
    for core in cores:
        groups.setdefault(key(core), []).append(core)
    return list(groups.values())


def _largest_group(cores: Sequence[Core], key: Callable[[Core], Hashable]) -> list[Core]:
    """The largest group; of equals, the first."""
    return max(_group(cores, key), key=len)


def _pinned(cores: Sequence[Core], groups: Sequence[Sequence[Core]]) -> CpuLayout:
    """Each group of cores a rank: one thread per core; service threads on left-over cores of the same NUMA nodes, else
    on the other hardware threads of the rank's own cores."""
    groups = sorted(groups, key=lambda group: cores.index(group[0]))
    taken = {core.cpus for group in groups for core in group}
    left = [core for core in cores if core.cpus not in taken]
    assignments = []
    for group in groups:
        nodes = {core.node for core in group}
        spare = [core for core in left if core.node in nodes]
        # The ranks of a node share what is left there.
        sharing = sum(1 for other in groups if nodes & {core.node for core in other})
        spare = spare[: min(MAX_SERVICE_CORES, -(-len(spare) // sharing))]
        left = [core for core in left if core not in spare]
        service_cpus = (core.cpus for core in spare) if spare else (core.cpus[1:] for core in group)
        compute = tuple(sorted(core.cpus[0] for core in group))
        assignments.append(CpuAssignment(compute, len(group), tuple(sorted(chain(*service_cpus)))))
    unused = tuple(sorted(chain(*(core.cpus for core in left))))
    return CpuLayout(tuple(assignments), pinned=True, unused=unused)
