"""Files in /dev/shm that dead ranks have left.

libfabric's shared memory, which oneCCL uses among ranks of a host, has a file for each rank, of up to 64 MiB, whose
name begins with the process id: `PID:DOMAIN:ENDPOINT`. It stays when the process is killed. (Intel MPI's files have no
names any more once its ranks have met.) A pod's /dev/shm ends with the pod; that of a machine does not.
"""

import contextlib
import re
from pathlib import Path

FOLDER = Path("/dev/shm")  # noqa: S108 - what others wrote there is removed; nothing is written
_REGION = re.compile(r"([1-9]\d*):\d+:\d+")


def remove_stale_regions(folder: Path = FOLDER, processes: Path = Path("/proc")) -> list[Path]:
    """Remove the files of processes that no longer exist; returns those removed.

    What belongs to another user stays, and so does what another rank removes at the same time. Containers that share
    the machine's /dev/shm have numbers of their own for their processes: what any process that can be seen has mapped
    stays, and where not all can be seen, everything does.
    """
    dead = {}
    for path in folder.glob("*:*:*"):
        name = _REGION.fullmatch(path.name)
        if name and not (processes / name[1]).exists():
            with contextlib.suppress(OSError):
                dead[path] = path.stat().st_ino
    if not dead or not _sees_all(processes):
        return []
    used = _mapped(processes)
    removed = []
    for path, inode in dead.items():
        if inode not in used:
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path)
    return removed


def _sees_all(processes: Path) -> bool:
    """Whether this is the machine's own namespace of processes, whose number the kernel never changes."""
    try:
        return str((processes / "self/ns/pid").readlink()) == "pid:[4026531836]"
    except OSError:
        return False


def _mapped(processes: Path) -> set[int]:
    """The inodes, of whatever file system, that processes which we may look at have mapped."""
    inodes = set()
    for maps in processes.glob("[1-9]*/maps"):
        with contextlib.suppress(OSError):
            inodes |= {int(line.split()[4]) for line in maps.read_text(errors="replace").splitlines()}
    return inodes
