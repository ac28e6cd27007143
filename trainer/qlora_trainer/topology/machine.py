"""A machine as Linux describes it: physical cores, caches, sockets, NUMA nodes and their memory.

`read` takes the folder that holds `proc` and `sys`. Files may be missing, as in containers, virtual machines and
odd kernels: what is not told is taken as one core per CPU, one node per socket, one socket.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from qlora_trainer.cpu import ROOT, CpuError, parse_cpu_list

HBM_MODEL = "CPU Max"
"""In the model name of Intel's processors with high-bandwidth memory. Their firmware's tables (HMAT), which would
tell its nodes by their bandwidth, are not always right."""
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
    """A NUMA node. Without CPUs it is memory alone: HBM in flat mode, CXL, persistent memory."""

    number: int
    memory: int | None = None
    """Bytes; None: not told."""
    bandwidth: int | None = None
    """MB/s that its nearest CPUs read it with, by the firmware's tables; None: not told."""
    distances: tuple[int, ...] = ()
    """To every online node, in the order of their numbers; 10 is local. Empty: not told."""


@dataclass(frozen=True)
class Machine:
    """What the machine is made of, whoever may use it."""

    cores: tuple[Core, ...]
    """By socket, node, cache and number: neighbours are near each other."""
    nodes: tuple[Node, ...] = ()
    """By number."""
    model: str = ""

    @cached_property
    def _core_of(self) -> dict[int, Core]:
        return {cpu: core for core in self.cores for cpu in core.cpus}

    def cores_of(self, cpus: Iterable[int]) -> list[Core]:
        """The cores of these CPUs with no others of their hardware threads, neighbours side by side.

        A CPU that the machine's files do not tell of is a core of its own.
        """
        wanted = set(cpus)
        known = [_only(core, wanted) for core in self.cores if wanted & set(core.cpus)]
        return known + [Core((cpu,), cache=cpu) for cpu in sorted(wanted - set(self._core_of))]

    def nodes_of(self, cpus: Iterable[int]) -> tuple[int, ...]:
        """Numbers of the NUMA nodes that these CPUs belong to."""
        return tuple(sorted({core.node for core in self.cores_of(cpus)}))

    @property
    def memory_only(self) -> tuple[Node, ...]:
        """Nodes that have memory and no CPU."""
        with_cpus = {core.node for core in self.cores}
        return tuple(node for node in self.nodes if node.number not in with_cpus and node.memory != 0)


def _only(core: Core, wanted: set[int]) -> Core:
    return Core(tuple(cpu for cpu in core.cpus if cpu in wanted), core.socket, core.node, core.cache)


# --- reading it


def read(root: Path = ROOT) -> Machine:
    """The machine under `root`. Never raises for what a kernel leaves out or writes in another form."""
    sys = root / "sys/devices/system"
    node_of = {cpu: number for number in _nodes(sys) for cpu in _list(sys / f"node/node{number}/cpulist")}
    return Machine(
        cores=_cores(sys / "cpu", node_of),
        nodes=tuple(_node(sys / "node", number) for number in _nodes(sys)),
        model=_model(root / "proc/cpuinfo"),
    )


def _cores(folder: Path, node_of: dict[int, int]) -> tuple[Core, ...]:
    threads: dict[int, list[int]] = {}
    for cpu in _online(folder):
        threads.setdefault(_first_thread(folder, cpu), []).append(cpu)
    cores = []
    for cpus in threads.values():
        first = folder / f"cpu{cpus[0]}"
        socket = max(0, _number(first / "topology/physical_package_id") or 0)
        # A kernel without NUMA has no nodes: then a socket stands for its memory.
        node = node_of.get(cpus[0], socket)
        cores.append(Core(tuple(cpus), socket, node, _cache(first, cpus[0])))
    return tuple(sorted(cores, key=lambda core: (core.socket, core.node, core.cache, core.cpus)))


def _online(folder: Path) -> list[int]:
    told = _list(folder / "online")
    return told or sorted(int(path.name[3:]) for path in folder.glob("cpu[0-9]*") if path.name[3:].isdigit())


def _first_thread(folder: Path, cpu: int) -> int:
    """The lowest hardware thread of a CPU's core."""
    topology = folder / f"cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the older name
        if cpu in (siblings := _list(topology / name)):
            return siblings[0]
    return cpu


def _cache(cpu: Path, number: int) -> int:
    """The lowest CPU that shares the largest cache of `cpu`."""
    levels = [(_number(index / "level") or 0, index) for index in sorted(cpu.glob("cache/index[0-9]*"))]
    shared = _list(max(levels)[1] / "shared_cpu_list") if levels else []
    return shared[0] if shared else number


def _nodes(sys: Path) -> list[int]:
    return sorted(int(path.name[4:]) for path in (sys / "node").glob("node[0-9]*") if path.name[4:].isdigit())


def _node(folder: Path, number: int) -> Node:
    here = folder / f"node{number}"
    distances = (_text(here / "distance") or "").split()
    return Node(
        number,
        memory=_memory(_text(here / "meminfo") or ""),
        bandwidth=_number(here / "access0/initiators/read_bandwidth"),
        distances=tuple(map(int, distances)) if all(map(str.isdigit, distances)) else (),
    )


def _memory(meminfo: str) -> int | None:
    for line in meminfo.splitlines():
        words = line.split()  # Node 0 MemTotal: 24731708 kB
        if len(words) > 3 and words[2] == "MemTotal:" and words[3].isdigit():
            return int(words[3]) * 1024
    return None


def _model(cpuinfo: Path) -> str:
    for line in (_text(cpuinfo) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""


def huge_pages(root: Path = ROOT) -> HugePages | None:
    """How the kernel gives transparent huge pages; None: it does not tell."""
    text = _text(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""  # always [madvise] never
    modes: tuple[HugePages, ...] = ("always", "madvise", "never")
    return next((mode for mode in modes if f"[{mode}]" in text), None)


def _list(path: Path) -> list[int]:
    try:
        return parse_cpu_list(_text(path) or "")
    except CpuError:
        return []  # a node without CPUs has an empty list


def _number(path: Path) -> int | None:
    text = _text(path) or ""
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
