"""Control groups, v1 and v2: how much CPU time and memory this process may use, and does."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_trainer.host.kernel_files import ROOT, parse_fields, read_int, read_text

_V1_UNLIMITED = 1 << 60
"""cgroup v1 has no word for "no limit": it shows the largest number of whole pages."""


@dataclass(frozen=True)
class Hierarchy:
    """Where a controller's files are: the process's own group first, the outermost visible one last."""

    version: Literal[1, 2]
    folders: tuple[Path, ...]


def hierarchy(controller: str, root: Path = ROOT) -> Hierarchy | None:
    """The groups that limit this process in a controller (`cpu`, `memory`); None without any.

    A controller mounted as v1 is looked up there, any other in the unified v2 tree (cgroups(7)). A group outside what
    the mount shows is taken as the mount itself.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text()
    except OSError:
        return None
    groups: dict[str, Path] = {}  # by controller; the unified tree has the name ""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), Path(path)))
    version: Literal[1, 2] = 1 if controller in groups else 2
    group = groups.get(controller, groups.get(""))
    found = _mount(mounts, controller if version == 1 else None)
    if group is None or found is None:
        return None
    shown, mount_point = found
    top = root / mount_point.relative_to("/")
    below = group.relative_to(shown).parts if group.is_relative_to(shown) else ()
    if ".." in below:
        below = ()
    return Hierarchy(version, tuple(top.joinpath(*below[:depth]) for depth in range(len(below), -1, -1)))


def _mount(mountinfo: str, v1_controller: str | None) -> tuple[Path, Path] | None:
    """(group shown, mount point) of a v1 controller, or of the v2 tree (proc_pid_mountinfo(5))."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        shown, mount_point = (Path(field) for field in before.split(" ")[3:5])
        if v1_controller is None and kind == "cgroup2":
            return shown, mount_point
        if v1_controller is not None and kind == "cgroup" and v1_controller in options.split(","):
            return shown, mount_point
    return None


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time this process may use: the smallest quota of its nested groups; None: no quota."""
    groups = hierarchy("cpu", root)
    if groups is None:
        return None
    quotas = []
    for folder in groups.folders:
        if groups.version == 2:
            quota, _, period = (read_text(folder / "cpu.max") or "max").partition(" ")
        else:
            quota = read_text(folder / "cpu.cfs_quota_us") or "-1"
            period = read_text(folder / "cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit():  # "max" in v2 and -1 in v1 mean no quota
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def available_cpus(root: Path = ROOT) -> tuple[list[int], float | None]:
    """CPUs that this process may run on, sorted, and its quota in CPUs' worth of time; None: no quota.

    The kernel keeps the affinity within the cpuset.
    """
    return sorted(os.sched_getaffinity(0)), cpu_quota(root)


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes: the smallest memory limit of the nested groups; None: no limit."""
    groups = hierarchy("memory", root)
    if groups is None:
        return None
    name = "memory.max" if groups.version == 2 else "memory.limit_in_bytes"
    limits = [read_int(folder / name) for folder in groups.folders]
    return min((limit for limit in limits if limit is not None and limit < _V1_UNLIMITED), default=None)


def usable_memory(root: Path = ROOT) -> tuple[int | None, int | None]:
    """Bytes of memory that this process may use at most, and those of them that it can have now; None: unknown.

    The machine's, within every limit of the nested groups. Pages of files count as free: the kernel drops them.
    """
    machine = dict(parse_fields(read_text(root / "proc/meminfo") or ""))  # in kB
    totals, free = ([_kibibytes(machine.get(name))] for name in ("MemTotal", "MemAvailable"))
    groups = hierarchy("memory", root)
    for folder in () if groups is None else groups.folders:
        v2 = groups is not None and groups.version == 2
        limit = read_int(folder / ("memory.max" if v2 else "memory.limit_in_bytes"))
        if limit is None or limit >= _V1_UNLIMITED:
            continue
        totals.append(limit)
        used = read_int(folder / ("memory.current" if v2 else "memory.usage_in_bytes"))
        if used is None:
            continue
        lines = (read_text(folder / "memory.stat") or "").splitlines()
        pages = dict(line.split(" ", 1) for line in lines if " " in line)
        names = ("active_file", "inactive_file") if v2 else ("total_active_file", "total_inactive_file")
        dropped = sum(int(pages[name]) for name in names if pages.get(name, "").isdecimal())
        free.append(max(0, limit - max(0, used - dropped)))
    known = ([value for value in values if value is not None] for values in (totals, free))
    total, now = (min(values, default=None) for values in known)
    return total, now


def _kibibytes(text: str | None) -> int | None:
    """Bytes of `24683652 kB`."""
    number = (text or "").removesuffix(" kB")
    return int(number) * 1024 if number.isdecimal() else None


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
    return read_int(groups.folders[0] / names[0]), read_int(groups.folders[0] / names[1])


def oom_kills(root: Path = ROOT) -> int:
    """How many processes of its own group the kernel has killed because memory ran out."""
    groups = hierarchy("memory", root)
    if groups is None:
        return 0
    name = "memory.events" if groups.version == 2 else "memory.oom_control"
    for line in (read_text(groups.folders[0] / name) or "").splitlines():
        key, _, count = line.partition(" ")
        if key == "oom_kill":
            return int(count)
    return 0
