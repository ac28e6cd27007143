"""High-bandwidth memory (HBM): whether this machine has it, and how a rank comes to use it where a job asks for it.

A rank pinned to the CPUs of one NUMA node gets that node's memory for what it touches first; DDR needs nothing more.
Xeon CPU Max has HBM as well. In cache mode and in HBM-only mode all memory is HBM, or cached by it. In flat mode HBM
shows as NUMA nodes without CPUs, which first touch never chooses: that takes a memory policy, and containers' default
seccomp profiles allow one only with CAP_SYS_NICE, which restricted pods do not have.
"""

import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qlora_contract.cpus import format_cpu_list, parse_cpu_list
from qlora_trainer.host.kernel_files import ROOT
from qlora_trainer.host.numa import HBM_MODEL, HBM_PER_SOCKET, Machine, Node

HbmMode = Literal["flat", "cache", "only"]

NO_HBM = (
    "topology.memoryTier is hbm, but this machine has no high-bandwidth memory: choose nodes with Xeon CPU Max "
    "processors by scheduling.nodeSelector, or set topology.memoryTier to any"
)

# linux/mempolicy.h; asm/unistd_64.h of x86-64, the only processors with HBM of this kind.
_NO_MODE, _MPOL_PREFERRED = -1, 1
_SYS_SET_MEMPOLICY = 238
_LONG_BITS = 64


def hbm_nodes(machine: Machine) -> tuple[Node, ...]:
    """The nodes that are HBM only: without CPUs, and of a processor that has HBM, or faster than all DDR."""
    if HBM_MODEL in machine.model:
        return machine.memory_only
    with_cpus = {core.node for core in machine.cores}
    fastest = max((node.bandwidth or 0 for node in machine.nodes if node.number in with_cpus), default=0)
    if not fastest:  # unknown, so there is nothing to compare with
        return ()
    return tuple(node for node in machine.memory_only if (node.bandwidth or 0) > fastest)


def hbm_mode(machine: Machine) -> HbmMode | None:
    """The mode that HBM is in; None: the machine has none. A machine with no more DDR than HBM counts as `only`."""
    if hbm_nodes(machine):
        return "flat"
    if HBM_MODEL not in machine.model:
        return None
    sockets = len({core.socket for core in machine.cores})
    memory = sum(node.memory or 0 for node in machine.nodes)
    return "only" if memory <= sockets * HBM_PER_SOCKET else "cache"


def choose_hbm(
    machine: Machine, ranks: Sequence[tuple[int, ...]], allowed: Sequence[int] | None, *, may_set_policy: bool
) -> tuple[list[int | None], str]:
    """The node whose memory each rank should prefer, or why HBM cannot be used.

    Args:
        machine: the machine.
        ranks: the NUMA nodes of each rank's CPUs.
        allowed: nodes whose memory the process may use; None: all.
        may_set_policy: whether the kernel lets the process set a memory policy.

    Returns:
        For each rank a node, None for what first touch gives; and the problem, empty when there is none.
    """
    first_touch: list[int | None] = [None] * len(ranks)
    mode, nodes = hbm_mode(machine), hbm_nodes(machine)
    if mode != "flat":
        return first_touch, NO_HBM if mode is None else ""
    usable = [node for node in nodes if allowed is None or node.number in allowed]
    if allowed is not None and usable and len(usable) == len(set(allowed)):
        return first_touch, ""  # there is no other memory to take
    flat = (
        "topology.memoryTier is hbm, but HBM is in flat mode here, as NUMA node(s) "
        f"{format_cpu_list(node.number for node in nodes)} without CPUs"
    )
    if not usable:
        others = format_cpu_list(allowed or ())
        return first_touch, (
            f"{flat}, and the container may use memory of node(s) {others} only: set the machine to cache mode"
        )
    if not may_set_policy:
        return first_touch, (
            f"{flat}, which only a memory policy can choose, and set_mempolicy is refused here, as by the default "
            "seccomp profile without CAP_SYS_NICE: set the machine to cache or HBM-only mode"
        )
    order = [node.number for node in machine.nodes]

    def distance(node: Node, rank_nodes: Sequence[int]) -> int:
        distances = dict(zip(order, node.distances, strict=False))
        return min((distances.get(number, 0) for number in rank_nodes), default=0)

    # To each rank the nearest to any of its own nodes; of equals, the lowest number.
    nearest = (
        min(usable, key=lambda node: (distance(node, rank_nodes), node.number)) for rank_nodes in ranks
    )
    return [node.number for node in nearest], ""


# --- the kernel


def allowed_memory_nodes(root: Path = ROOT) -> tuple[int, ...] | None:
    """NUMA nodes whose memory this process may use; None: unknown."""
    try:
        for line in (root / "proc/self/status").read_text().splitlines():
            if line.startswith("Mems_allowed_list:"):
                return tuple(parse_cpu_list(line.partition(":")[2]))
    except (OSError, ValueError):
        pass
    return None


def may_set_memory_policy() -> bool:
    """Whether the kernel lets this process set a memory policy.

    Asked with a mode that does not exist, so that a policy already set, as by numactl, stays as it is.
    """
    return _set_policy(_NO_MODE, None) == errno.EINVAL


def prefer_memory_of(node: int) -> None:
    """Take memory of this NUMA node first, and other memory when it is full. Child processes inherit it.

    Raises:
        OSError: the kernel refuses, or has no such node.
    """
    if error := _set_policy(_MPOL_PREFERRED, node):
        raise OSError(error, f"memory of NUMA node {node} cannot be preferred: {os.strerror(error)}")


def _set_policy(mode: int, node: int | None) -> int:
    """Call set_mempolicy; returns 0 or errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    if node is None:
        result = libc.syscall(_SYS_SET_MEMPOLICY, mode, None, 0)
    else:
        words = (ctypes.c_ulong * (node // _LONG_BITS + 1))()
        words[node // _LONG_BITS] = 1 << node % _LONG_BITS
        # The kernel takes one bit less than the count says.
        result = libc.syscall(_SYS_SET_MEMPOLICY, mode, words, len(words) * _LONG_BITS + 1)
    return ctypes.get_errno() if result else 0
