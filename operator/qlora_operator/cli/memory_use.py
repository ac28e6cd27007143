"""How much memory the processes of a job have, whoever started it."""

import os
from pathlib import Path

PROC = Path("/proc")


def private_bytes(root: int, proc: Path = PROC) -> int:
    """Bytes that a process and its descendants have to themselves; 0 where there is no such process.

    Pages that are shared with files are left out: the machine counts them as free.
    """
    children: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for folder in proc.glob("[0-9]*"):
        try:
            # After the name, which may hold anything: state, parent (proc(5)).
            parent = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            resident, shared = map(int, (folder / "statm").read_text().split()[1:3])
        except (OSError, ValueError, IndexError):
            continue  # it has ended meanwhile
        children.setdefault(parent, []).append(int(folder.name))
        sizes[int(folder.name)] = (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        total += sizes.get(process, 0)
        waiting += children.get(process, ())
    return total
