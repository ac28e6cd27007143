"""A machine as Linux describes it: physical cores, caches, sockets, NUMA nodes and their memory.

Files may be missing, as in containers, virtual machines and unusual kernels. What is unknown is taken as one core per
CPU, one node per socket, one socket.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qlora_contract.cpus import CpuListError, parse_cpu_list
from qlora_trainer.host.kernel_files import ROOT, parse_fields, read_int, read_text

HBM_MODEL = "CPU Max"
"""In the model name of Intel's processors with high-bandwidth memory. The name decides, because the firmware's tables
(HMAT), which would identify its nodes by their bandwidth, are not always right."""
HBM_PER_SOCKET = 64 << 30
"""Bytes, of every Xeon CPU Max."""

HugePages = Literal["always", "madvise", "never"]
"""Transparent huge pages: for all memory, for what asks for them, or none."""


@dataclass(frozen=True)
class Core:
    """A physical core."""

    cpus: tuple[int, ...]
    """Its hardware threads, the lowest number first."""
    socket: int = 0
    node: int = 0
    """Its NUMA node; with sub-NUMA clustering (SNC, NPS), its cluster."""
    cache: int = 0
    """The lowest CPU that shares its last-level cache."""


@dataclass(frozen=True)
class Node:
    """A NUMA node. Without CPUs it is memory only: HBM in flat mode, CXL, persistent memory."""

    number: int
    memory: int | None = None
    """Bytes; None: unknown."""
    bandwidth: int | None = None
    """MB/s at which its nearest CPUs read it, by the firmware's tables; None: unknown."""
    distances: tuple[int, ...] = ()
    """To every online node, in the order of their numbers; 10 is local. Empty: unknown."""


@dataclass(frozen=True)
class Machine:
    """What the machine is made of, whoever may use it."""

    cores: tuple[Core, ...]
    """By socket, node, cache and number: neighbors are near each other."""
    nodes: tuple[Node, ...] = ()
    """By number."""
    model: str = ""

    def cores_of(self, cpus: Iterable[int]) -> list[Core]:
        """The cores of these CPUs, without their hardware threads that are not among these; neighbors side by side.

        A CPU that the machine's files do not mention is a core of its own.
        """
        wanted = set(cpus)
        known = [
            replace(core, cpus=tuple(cpu for cpu in core.cpus if cpu in wanted))
            for core in self.cores
            if not wanted.isdisjoint(core.cpus)
        ]
        unknown = wanted.difference(*(core.cpus for core in self.cores))
        return known + [Core((cpu,), cache=cpu) for cpu in sorted(unknown)]

    def nodes_of(self, cpus: Iterable[int]) -> tuple[int, ...]:
        """Numbers of the NUMA nodes that these CPUs belong to."""
        return tuple(sorted({core.node for core in self.cores_of(cpus)}))

    @property
    def memory_only(self) -> tuple[Node, ...]:
        """Nodes that have memory but no CPUs."""
        with_cpus = {core.node for core in self.cores}
        return tuple(node for node in self.nodes if node.number not in with_cpus and node.memory != 0)


# --- reading it


def read_machine(root: Path = ROOT) -> Machine:
    """The machine under `root`. Never raises for what a kernel leaves out or writes in another form."""
    system = root / "sys/devices/system"
    numbers = _numbered(system / "node", "node")
    node_of = {cpu: number for number in numbers for cpu in _cpu_list(system / f"node/node{number}/cpulist")}
    fields = parse_fields(read_text(root / "proc/cpuinfo") or "")
    return Machine(
        cores=_cores(system / "cpu", node_of),
        nodes=tuple(_node(system / f"node/node{number}", number) for number in numbers),
        model=next((value for key, value in fields if key == "model name"), ""),
    )


def _cores(folder: Path, node_of: dict[int, int]) -> tuple[Core, ...]:
    threads: dict[int, list[int]] = {}
    for cpu in _cpu_list(folder / "online") or _numbered(folder, "cpu"):
        threads.setdefault(_first_thread(folder / f"cpu{cpu}", cpu), []).append(cpu)
    cores = []
    for cpus in threads.values():
        first = folder / f"cpu{cpus[0]}"
        socket = max(0, read_int(first / "topology/physical_package_id") or 0)
        # A kernel without NUMA has no nodes: then a socket stands for its memory.
        node = node_of.get(cpus[0], socket)
        cores.append(Core(tuple(cpus), socket, node, _last_level_cache(first, cpus[0])))
    return tuple(sorted(cores, key=lambda core: (core.socket, core.node, core.cache, core.cpus)))


def _first_thread(folder: Path, cpu: int) -> int:
    """The lowest hardware thread of a CPU's core."""
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the older name
        if cpu in (siblings := _cpu_list(folder / "topology" / name)):
            return siblings[0]
    return cpu


def _last_level_cache(folder: Path, cpu: int) -> int:
    """The lowest CPU that shares the largest cache of `cpu`."""
    levels = [(read_int(index / "level") or 0, index) for index in sorted(folder.glob("cache/index[0-9]*"))]
    shared = _cpu_list(max(levels)[1] / "shared_cpu_list") if levels else []
    return shared[0] if shared else cpu


def _node(folder: Path, number: int) -> Node:
    distances = (read_text(folder / "distance") or "").split()
    # Node 0 MemTotal: 24731708 kB
    total = re.search(r"^Node +\d+ +MemTotal: +(\d+) ", read_text(folder / "meminfo") or "", re.MULTILINE)
    return Node(
        number,
        memory=int(total[1]) * 1024 if total else None,
        bandwidth=read_int(folder / "access0/initiators/read_bandwidth"),
        distances=tuple(map(int, distances)) if all(map(str.isdigit, distances)) else (),
    )


def huge_pages(root: Path = ROOT) -> HugePages | None:
    """When the kernel gives transparent huge pages; None: unknown."""
    text = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""  # always [madvise] never
    modes: tuple[HugePages, ...] = ("always", "madvise", "never")
    return next((mode for mode in modes if f"[{mode}]" in text), None)


def _numbered(folder: Path, prefix: str) -> list[int]:
    """The numbers of a folder's entries such as node0, node1, sorted."""
    suffixes = (path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}[0-9]*"))
    return sorted(int(suffix) for suffix in suffixes if suffix.isdigit())


def _cpu_list(path: Path) -> list[int]:
    """A file's CPU list, sorted; empty where there is none, as in a node without CPUs."""
    try:
        return parse_cpu_list(read_text(path) or "")
    except CpuListError:
        return []
