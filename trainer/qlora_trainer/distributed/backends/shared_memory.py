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

    What belongs to another user stays, and so does what another rank removes at the same time.
    """
    removed = []
    for path in folder.glob("*:*:*"):
        name = _REGION.fullmatch(path.name)
        if name and not (processes / name[1]).exists():
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path)
    return removed
