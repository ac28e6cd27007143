"""Who computes where: CPUs, threads and memory of each rank of a pod. Decides, and touches nothing.

- A thread computes on a physical core of its own. The core's other hardware threads stay idle, or take the rank's
  helpers: communication, heartbeat, progress. Cores that are left over serve helpers first.
- All ranks of a pod have the same number of threads. Every rank gets the same share of a step, so a rank with more
  would wait for those with fewer.
- `auto` makes one rank of each NUMA node of the pod's CPUs (with SNC or NPS: of each cluster), of as many nodes as
  keep the most cores at work under that rule; smaller ones are left out. Where more than JOIN_GAIN times as many
  cores work when the nodes of a socket are joined into one rank, or all of them, they are: memory farther away costs
  less than idle cores.
- A given number of ranks is spread over the nodes, each within one node, and within one last-level cache, while it
  fits there.
- Ranks are bound only to CPUs that no other pod uses: chosen for this launcher, or no more than the pod asked for,
  as a kubelet with static CPU management gives. Otherwise all pods of a node would crowd on its first CPUs: there
  they float, with as many threads as their share of the quota, and `auto` is one rank.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from qlora_contract.cpus import format_cpu_list
from qlora_contract.run import MemoryTier, Pinning, RanksPerPod
from qlora_trainer.cpu import CpuError
from qlora_trainer.topology.machine import Core, Machine
from qlora_trainer.topology.memory import choose_hbm

JOIN_GAIN = 1.25
"""Nodes are joined into one rank when more than so many times as many cores work then. An estimate: within a socket
farther memory is a tenth slower, beyond it half as fast, and most of a step is products that live in the caches."""
HELPER_CORES = 2
"""Cores left over that a rank's helpers get at most; they are seldom at work."""


class LayoutError(CpuError):
    """This share of a machine cannot hold the ranks; the text says what would."""


@dataclass(frozen=True)
class Share:
    """What a launcher may use of its machine."""

    cpus: tuple[int, ...]
    quota: float | None = None
    """CPUs' worth of time; None: no quota."""
    ours_alone: bool = False
    """Somebody chose these CPUs for this launcher, so that nobody else uses them."""
    memory_nodes: tuple[int, ...] | None = None
    """NUMA nodes whose memory it may use; None: all."""
    may_place_memory: bool = False
    """Whether it may set a memory policy."""

    @property
    def usable(self) -> int:
        """How many CPUs can be at work at once, at least one."""
        return len(self.cpus) if self.quota is None else max(1, min(len(self.cpus), int(self.quota)))


@dataclass(frozen=True)
class Wish:
    """What a job asks for in each pod."""

    ranks: RanksPerPod
    cpus: int
    """CPUs of all the pod's ranks together."""
    pinning: Pinning = "strict"
    """`strict` refuses what cannot be had; `best-effort` takes what there is and says so."""
    memory_tier: MemoryTier = "any"


@dataclass(frozen=True)
class RankPlace:
    """Where one rank runs."""

    cpus: tuple[int, ...]
    """Where its threads compute: its affinity from the start, so that its memory is near."""
    threads: int
    """Threads that compute."""
    helpers: tuple[int, ...] = ()
    """CPUs for its other threads; empty: they share `cpus`."""
    nodes: tuple[int, ...] = ()
    """NUMA nodes of `cpus`."""
    memory_node: int | None = None
    """NUMA node whose memory it prefers; None: that of the CPU that touches it first."""


@dataclass(frozen=True)
class Layout:
    """The ranks of a pod."""

    ranks: tuple[RankPlace, ...]
    bound: bool
    """Whether each rank has CPUs of its own."""
    unused: tuple[int, ...] = ()
    """CPUs of the share on whose core nothing runs."""
    notes: tuple[str, ...] = ()
    """What is not as one might expect, and why."""

    def lines(self) -> list[str]:
        """The layout for people, a line for each rank, without line ends."""
        return [
            *(f"local rank {number}: {_words(place, self.bound)}" for number, place in enumerate(self.ranks)),
            *([f"unused: CPUs {format_cpu_list(self.unused)}"] if self.unused else []),
            *self.notes,
        ]


def _words(place: RankPlace, bound: bool) -> str:
    words = f"{place.threads} thread(s) on {'' if bound else 'any of '}CPUs {format_cpu_list(place.cpus)}"
    words += f", NUMA node(s) {format_cpu_list(place.nodes)}"
    words += f", helpers on {format_cpu_list(place.helpers)}" if place.helpers else ""
    return words + (f", memory of node {place.memory_node}" if place.memory_node is not None else "")


def layout(machine: Machine, share: Share, wish: Wish) -> Layout:
    """The ranks of a pod, each with its CPUs, threads and memory. The same input gives the same layout.

    Raises:
        LayoutError: pinning is strict and the share has too few CPUs or cores, or not the memory that was asked for.
    """
    _check_cpus(share, wish)
    cores = machine.cores_of(share.cpus)
    if not _is_ours(share, wish):
        found = _float(share, wish, cores)
    elif wish.ranks == "auto":
        found = _one_per_cluster(cores)
    elif len(cores) < wish.ranks:
        found = _crowd(cores, wish)
    else:
        found = _spread(cores, wish.ranks, wish.cpus // wish.ranks)
    found = replace(found, ranks=tuple(_near(machine, place) for place in found.ranks))
    return found if wish.memory_tier == "any" else _in_hbm(found, machine, share, wish)


def _check_cpus(share: Share, wish: Wish) -> None:
    if not share.cpus:
        raise LayoutError("no CPU can be used here: at least one is needed")
    if wish.pinning != "strict" or share.usable >= wish.cpus:
        return
    if wish.ranks == "auto":
        raise LayoutError(
            f"the pod asks for {wish.cpus} CPUs, and {share.usable} can be used here: "
            "lower what it asks for, or set topology.pinning to best-effort"
        )
    raise LayoutError(
        f"{wish.ranks} rank(s) of {wish.cpus // wish.ranks} CPU(s) need {wish.cpus} CPUs, and {share.usable} can be "
        "used here: lower topology.cpusPerRank or topology.ranksPerPod, or set topology.pinning to best-effort"
    )


def _is_ours(share: Share, wish: Wish) -> bool:
    """Whether no other pod uses these CPUs, as far as can be known."""
    return share.usable == len(share.cpus) and (share.ours_alone or len(share.cpus) <= wish.cpus)


# --- the ways to lay out


def _float(share: Share, wish: Wish, cores: Sequence[Core]) -> Layout:
    """Not bound: the kernel's scheduler sees who else is at work, and we do not."""
    ranks = 1 if wish.ranks == "auto" else wish.ranks
    threads = max(1, min(wish.cpus // ranks, share.usable // ranks, len(cores) // ranks))
    note = (
        "CPUs are shared with others, so ranks are not bound to any: for CPUs of its own a pod needs a kubelet "
        "with cpuManagerPolicy static"
    )
    if wish.ranks == "auto":
        note += "; ranksPerPod auto is one rank here"
    return Layout((RankPlace(share.cpus, threads),) * ranks, bound=False, notes=(note,))


def _crowd(cores: Sequence[Core], wish: Wish) -> Layout:
    """More ranks than cores: a hardware thread each, those of other cores first; then by turns."""
    assert wish.ranks != "auto", "auto never makes more ranks than there are cores"
    cpus = sorted(chain(*(core.cpus for core in cores)))
    if wish.pinning == "strict":
        raise LayoutError(
            f"{wish.ranks} rank(s) need a physical core each, and CPUs {format_cpu_list(cpus)} are hardware threads "
            f"of {len(cores)} core(s): raise topology.cpusPerRank to the hardware threads of a core, "
            "lower topology.ranksPerPod, or set topology.pinning to best-effort"
        )
    threads = max(len(core.cpus) for core in cores)
    order = [core.cpus[turn] for turn in range(threads) for core in cores if turn < len(core.cpus)]
    places = tuple(RankPlace((order[rank % len(order)],), 1) for rank in range(wish.ranks))
    return Layout(places, bound=True, notes=(f"{wish.ranks} ranks share {len(cores)} core(s)",))


def _spread(cores: Sequence[Core], ranks: int, each: int) -> Layout:
    """So many ranks, each of as many cores as its CPUs are, or as there are for each; no more than one node if it fits.

    Equal sizes cannot fragment a node, so the roomiest node is right for every next rank.
    """
    size = min(each, len(cores) // ranks)
    free = list(cores)
    groups: list[list[Core]] = []
    for _ in range(ranks):
        near = _roomiest(free, lambda core: core.node)
        near = near if len(near) >= size else free
        nearest = _roomiest(near, lambda core: (core.node, core.cache))
        taken = (nearest if len(nearest) >= size else near)[:size]
        groups.append(taken)
        free = [core for core in free if core not in taken]
    groups.sort(key=lambda group: cores.index(group[0]))
    return _bound(cores, groups)


def _one_per_cluster(cores: Sequence[Core]) -> Layout:
    """One rank for each NUMA node, or for each socket or for all, where that keeps clearly more cores at work."""
    best: list[list[Core]] = []
    levels: list[Callable[[Core], Hashable]] = [
        lambda core: core.node,
        lambda core: core.socket,
        lambda _: None,
    ]
    for level in levels:
        groups = _equal(_grouped(cores, level))
        if _total(groups) > JOIN_GAIN * _total(best):
            best = groups
    best.sort(key=lambda group: cores.index(group[0]))
    found = _bound(cores, best)
    left = sorted({core.node for core in cores} - {core.node for group in best for core in group})
    if not left:
        return found
    note = f"NUMA node(s) {format_cpu_list(left)} are left out: a rank of their few cores would hold all others up"
    return replace(found, notes=(note,))


def _equal(groups: list[list[Core]]) -> list[list[Core]]:
    """The most cores that groups of one size can have: the largest groups, all cut to the smallest of them."""
    groups = sorted(groups, key=len, reverse=True)
    count = max(range(1, len(groups) + 1), key=lambda count: (count * len(groups[count - 1]), count))
    return [group[: len(groups[count - 1])] for group in groups[:count]]


def _total(groups: Iterable[Sequence[Core]]) -> int:
    return sum(map(len, groups))


def _grouped(cores: Iterable[Core], key: Callable[[Core], Hashable]) -> list[list[Core]]:
    groups: dict[Hashable, list[Core]] = {}
    for core in cores:
        groups.setdefault(key(core), []).append(core)
    return list(groups.values())


def _roomiest(cores: Sequence[Core], key: Callable[[Core], Hashable]) -> list[Core]:
    """The largest group; of equals, the first."""
    return max(_grouped(cores, key), key=len)


def _bound(cores: Sequence[Core], groups: Sequence[Sequence[Core]]) -> Layout:
    """Each group a rank: a thread for each core, helpers on cores left over nearby, else on the other threads."""
    taken = {core.cpus for group in groups for core in group}
    left = [core for core in cores if core.cpus not in taken]
    places = []
    for group in groups:
        nodes = {core.node for core in group}
        spare = [core for core in left if core.node in nodes]
        # Ranks of one node share what is left there.
        sharing = sum(1 for other in groups if nodes & {core.node for core in other})
        spare = spare[: min(HELPER_CORES, -(-len(spare) // sharing))]
        left = [core for core in left if core not in spare]
        helpers = (
            chain(*(core.cpus for core in spare)) if spare else chain(*(core.cpus[1:] for core in group))
        )
        compute = tuple(sorted(core.cpus[0] for core in group))
        places.append(RankPlace(compute, len(group), tuple(sorted(helpers))))
    return Layout(tuple(places), bound=True, unused=tuple(sorted(chain(*(core.cpus for core in left)))))


# --- memory


def _near(machine: Machine, place: RankPlace) -> RankPlace:
    return replace(place, nodes=machine.nodes_of(place.cpus))


def _in_hbm(found: Layout, machine: Machine, share: Share, wish: Wish) -> Layout:
    nodes, problem = choose_hbm(
        machine,
        [place.nodes for place in found.ranks],
        share.memory_nodes,
        may_place=share.may_place_memory,
    )
    if problem and wish.pinning == "strict":
        raise LayoutError(f"{problem}, or topology.pinning to best-effort to go on without")
    places = (replace(place, memory_node=node) for place, node in zip(found.ranks, nodes, strict=True))
    return replace(found, ranks=tuple(places), notes=(*found.notes, *([problem] if problem else [])))
