"""What the processor can do, which CPUs this process may use, and how much memory.

Standard library only: the launcher asks before torch is imported. What ranks make of the
CPUs is decided in `topology`. Functions that read the kernel's files take `root`, the
folder that holds `proc` and `sys`.
"""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_contract.run import ISA_TIERS, IsaTier

ROOT = Path("/")

TIER_FLAGS: dict[IsaTier, frozenset[str]] = {
    "amx_bf16": frozenset({"amx_tile", "amx_bf16"}),
    "avx512_bf16": frozenset({"avx512f", "avx512_bf16"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "avx2": frozenset({"avx2", "fma"}),
}
"""Flags of /proc/cpuinfo that a tier needs. amx_bf16 also needs the kernel's permission."""

AMX_PERMISSION = "permission of the kernel to use AMX tiles"
"""What tier_lacks names when the flags are there and ARCH_REQ_XCOMP_PERM was refused."""

# asm/prctl.h, asm/unistd_64.h, asm/fpu/types.h of x86-64.
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18

_V1_UNLIMITED = 1 << 60
"""cgroup v1 has no word for "no limit": it shows the largest number of whole pages."""


class CpuError(ValueError):
    """This machine, or the share of it we were given, cannot do what was asked."""


# --- instruction sets


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Flags that every processor in the text of /proc/cpuinfo has."""
    lines = {text for key, _, text in _split_lines(cpuinfo) if key == "flags"}
    return frozenset.intersection(*(frozenset(line.split()) for line in lines)) if lines else frozenset()


def _split_lines(text: str) -> list[tuple[str, str, str]]:
    return [
        (key.strip(), colon, value) for key, colon, value in (s.partition(":") for s in text.splitlines())
    ]


def tier_lacks(flags: frozenset[str], tier: IsaTier, *, amx_permitted: bool) -> list[str]:
    """What is missing for a tier, in words fit for a message; empty when nothing is."""
    lacking = sorted(TIER_FLAGS[tier] - flags)
    if tier == "amx_bf16" and not lacking and not amx_permitted:
        return [AMX_PERMISSION]
    return lacking


def best_tier(flags: frozenset[str], *, amx_permitted: bool) -> IsaTier:
    """The best tier that nothing is missing for. Raises CpuError below avx2."""
    for tier in ISA_TIERS:
        if not tier_lacks(flags, tier, amx_permitted=amx_permitted):
            return tier
    lacking = ", ".join(tier_lacks(flags, ISA_TIERS[-1], amx_permitted=amx_permitted))
    raise CpuError(f"the processor lacks {lacking}: an x86-64 processor with AVX2 and FMA is needed")


def meets(have: IsaTier, need: IsaTier) -> bool:
    """Whether `have` is `need` or better."""
    return ISA_TIERS.index(have) <= ISA_TIERS.index(need)


def request_amx() -> bool:
    """Ask the kernel to let this process use AMX tile data (Linux 5.16 and newer).

    The permission holds for this process and what it forks, and ends with exec,
    so every rank asks for itself. Only for x86-64, where the system call has this number.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0


@dataclass(frozen=True)
class Isa:
    """What a probe found."""

    flags: frozenset[str]
    amx_permitted: bool

    @property
    def tier(self) -> IsaTier:
        """The best usable tier. Raises CpuError below avx2."""
        return best_tier(self.flags, amx_permitted=self.amx_permitted)

    def lacks(self, tier: IsaTier) -> list[str]:
        """What is missing for a tier; empty when nothing is."""
        return tier_lacks(self.flags, tier, amx_permitted=self.amx_permitted)


def probe(root: Path = ROOT) -> Isa:
    """The processor's flags, and whether this process may use AMX."""
    flags = cpu_flags((root / "proc/cpuinfo").read_text())
    return Isa(flags, amx_permitted=TIER_FLAGS["amx_bf16"] <= flags and request_amx())


def probe_isa() -> IsaTier:
    """The best tier that this process can really use. Raises CpuError below avx2."""
    return probe().tier


# --- lists of CPUs


def parse_cpu_list(text: str) -> list[int]:
    """`0-3,8` -> [0, 1, 2, 3, 8], sorted, each once. Raises CpuError for any other form."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise CpuError(f"{text!r} is not a CPU list such as 0-3,8")
        cpus.update(range(int(first), int(last or first) + 1))
    if not cpus:
        raise CpuError(f"{text!r} names no CPU; a CPU list looks like 0-3,8")
    return sorted(cpus)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


# --- control groups


@dataclass(frozen=True)
class Hierarchy:
    """Where a controller's files are: the process's own group first, the outermost visible one last."""

    version: Literal[1, 2]
    folders: tuple[Path, ...]


def hierarchy(controller: str, root: Path = ROOT) -> Hierarchy | None:
    """The groups that limit this process in a controller (`cpu`, `memory`); None without any.

    A controller mounted as v1 is looked up there, any other in the unified v2 tree
    (cgroups(7)). A group outside what the mount shows is taken as the mount itself.
    """
    try:
        groups = _groups((root / "proc/self/cgroup").read_text())
        mounts = (root / "proc/self/mountinfo").read_text()
    except OSError:
        return None
    wanted: Literal[1, 2] = 1 if controller in groups else 2
    group = groups.get(controller, groups.get(""))
    found = _mount(mounts, controller if wanted == 1 else None)
    if group is None or found is None:
        return None
    shown, point = found
    top = root / point.relative_to("/")
    below = group.relative_to(shown).parts if group.is_relative_to(shown) else ()
    below = () if ".." in below else below
    folders = [top.joinpath(*below[:depth]) for depth in range(len(below), -1, -1)]
    return Hierarchy(wanted, tuple(folders))


def _groups(text: str) -> dict[str, Path]:
    """/proc/self/cgroup -> controller to group; the unified tree has the name ""."""
    groups: dict[str, Path] = {}
    for line in text.splitlines():
        _, controllers, group = line.split(":", 2)
        groups.update({controller: Path(group) for controller in controllers.split(",")})
    return groups


def _mount(mountinfo: str, v1_controller: str | None) -> tuple[Path, Path] | None:
    """(group shown, mount point) of a v1 controller, or of the v2 tree (proc_pid_mountinfo(5))."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        shown, point = (Path(field) for field in before.split(" ")[3:5])
        if v1_controller is None and kind == "cgroup2":
            return shown, point
        if v1_controller is not None and kind == "cgroup" and v1_controller in options.split(","):
            return shown, point
    return None


def _read(path: Path) -> str | None:
    """The text of a file of the kernel, or None: files differ by version and by group."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and text.isdigit() else None


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time this process may use: the smallest quota of its nested groups; None: no quota."""
    groups = hierarchy("cpu", root)
    if groups is None:
        return None
    quotas = [_quota(folder, groups.version) for folder in groups.folders]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path, version: Literal[1, 2]) -> float | None:
    if version == 2:
        quota, _, period = (_read(folder / "cpu.max") or "max").partition(" ")
    else:
        quota = _read(folder / "cpu.cfs_quota_us") or "-1"
        period = _read(folder / "cpu.cfs_period_us") or ""
    # "max" in v2 and -1 in v1 mean no quota.
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def available_cpus(root: Path = ROOT) -> tuple[list[int], float | None]:
    """(ids of the CPUs this process may run on, quota in CPUs or None).

    The affinity mask is already within the cpuset.
    """
    return sorted(os.sched_getaffinity(0)), cpu_quota(root)


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes: the smallest memory limit of the nested groups; None: no limit."""
    groups = hierarchy("memory", root)
    if groups is None:
        return None
    name = "memory.max" if groups.version == 2 else "memory.limit_in_bytes"
    limits = [_number(folder / name) for folder in groups.folders]
    return min((n for n in limits if n is not None and n < _V1_UNLIMITED), default=None)


def memory_current_and_peak(root: Path = ROOT) -> tuple[int | None, int | None]:
    """Bytes that the process's own group uses now and used at most, page cache included.

    None where the kernel has no such file (the outermost v2 group; peak before Linux 5.19).
    """
    groups = hierarchy("memory", root)
    if groups is None:
        return None, None
    names = ("memory.current", "memory.peak")
    if groups.version == 1:
        names = ("memory.usage_in_bytes", "memory.max_usage_in_bytes")
    return _number(groups.folders[0] / names[0]), _number(groups.folders[0] / names[1])


def oom_kills(root: Path = ROOT) -> int:
    """Processes of the own group that the kernel killed for want of memory so far."""
    groups = hierarchy("memory", root)
    if groups is None:
        return 0
    name = "memory.events" if groups.version == 2 else "memory.oom_control"
    for line in (_read(groups.folders[0] / name) or "").splitlines():
        key, _, count = line.partition(" ")
        if key == "oom_kill":
            return int(count)
    return 0


# --- memory of this process


@dataclass(frozen=True)
class ProcessMemory:
    """Proportional set size of a process in bytes, by what is behind it."""

    anonymous: int
    shared: int
    """Shared memory (tmpfs, memfd), this process's part."""
    file: int
    """Mapped files, this process's part: the kernel can drop and reread them."""

    @property
    def needed(self) -> int:
        """What cannot be dropped: anonymous and shared memory."""
        return self.anonymous + self.shared


def parse_smaps_rollup(text: str) -> ProcessMemory:
    """ProcessMemory from the text of smaps_rollup (Linux 5.4 and newer tell the kinds apart)."""
    kib = {key: int(value.split()[0]) for key, _, value in _split_lines(text) if value.endswith(" kB")}
    if "Pss_Anon" not in kib:
        raise CpuError("/proc/self/smaps_rollup has no Pss_Anon: Linux 5.4 or newer is needed")
    return ProcessMemory(*(1024 * kib[key] for key in ("Pss_Anon", "Pss_Shmem", "Pss_File")))


def process_memory() -> ProcessMemory:
    """What this process uses now."""
    return parse_smaps_rollup(Path("/proc/self/smaps_rollup").read_text())
