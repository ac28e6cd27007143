"""Control groups: where every process of the nodes lives, so that none is ever lost.

Pids are recycled and parents die; a process leaves its control group only on
purpose. So a node is stopped by killing all below its group, whoever started
it, also after the program that made it was killed itself.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

from testcluster.errors import ClusterError

ROOT = "qlora-nodes"
"""The group below which all others are."""
_MOUNT = Path("/sys/fs/cgroup")
_V2_CONTROLLERS = "+cpuset +cpu +memory +pids"


def hierarchies() -> list[Path]:
    """Where control groups are mounted: one folder (version 2), or one for each controller (version 1)."""
    if (_MOUNT / "cgroup.controllers").exists():
        return [_MOUNT]
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    found = [Path(where) for _, where, kind, *_ in lines if kind in ("cgroup", "cgroup2")]
    if not any(path.name.startswith("cpuset") for path in found):
        raise ClusterError(
            "the nodes pin pods to CPUs, and no cpuset control group is mounted below "
            "/sys/fs/cgroup: run on the machine itself, or in a container with its own cgroups"
        )
    return found


def make(name: str) -> None:
    """Make the group `ROOT/name` in every hierarchy."""
    for hierarchy in hierarchies():
        folder = hierarchy / ROOT / name
        folder.mkdir(parents=True, exist_ok=True)
        if hierarchy == _MOUNT:
            for parent in (_MOUNT, _MOUNT / ROOT):
                (parent / "cgroup.subtree_control").write_text(_V2_CONTROLLERS)
        elif (folder / "cpuset.cpus").exists():
            _inherit_cpus(hierarchy, folder)


def _inherit_cpus(hierarchy: Path, folder: Path) -> None:
    """A group of version 1 begins without CPUs, and no process can enter it."""
    for target in (hierarchy / ROOT, folder):
        for file in ("cpuset.cpus", "cpuset.mems"):
            (target / file).write_text((target.parent / file).read_text())


def entry_files(name: str) -> list[str]:
    """The files into which a process writes its pid to enter the group `ROOT/name`."""
    return [str(hierarchy / ROOT / name / "cgroup.procs") for hierarchy in hierarchies()]


def pids(name: str = "") -> set[int]:
    """The processes in the group `ROOT/name` and all below it."""
    found: set[int] = set()
    for hierarchy in hierarchies():
        for where, _, _ in os.walk(hierarchy / ROOT / name):
            with contextlib.suppress(OSError):  # the group went away meanwhile
                found.update(int(line) for line in Path(where, "cgroup.procs").read_text().split())
    return found


def kill(name: str = "", *, seconds: float = 30) -> None:
    """Kill all processes in the group `ROOT/name` and below; returns when none is left."""
    deadline = time.monotonic() + seconds
    while left := pids(name):
        if time.monotonic() > deadline:
            raise ClusterError(f"these processes do not end though they were killed: {sorted(left)}")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def remove(name: str = "", *, seconds: float = 10) -> None:
    """Kill all in the group `ROOT/name` and below, and remove the groups."""
    kill(name)
    deadline = time.monotonic() + seconds
    while left := [where for hierarchy in hierarchies() for where in _bottom_up(hierarchy / ROOT / name)]:
        if time.monotonic() > deadline:
            raise ClusterError(f"these control groups cannot be removed: {', '.join(left)}")
        for where in left:
            with contextlib.suppress(OSError):  # a killed process is still on its way out
                Path(where).rmdir()


def _bottom_up(folder: Path) -> list[str]:
    return [where for where, _, _ in os.walk(folder, topdown=False)]
