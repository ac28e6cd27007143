"""Memory of a process and its descendants."""

import os
from pathlib import Path

from qlora_operator.cli.memory_use import private_bytes

PAGE = os.sysconf("SC_PAGE_SIZE")


def process(proc: Path, pid: int, parent: int, name: str, resident: int, shared: int) -> None:
    """A process as proc(5) has it."""
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "stat").write_text(f"{pid} ({name}) S {parent} 1 1 0")
    (folder / "statm").write_text(f"{9 * resident} {resident} {shared} 1 0 1 0")


def test_pages_of_a_whole_family_are_counted(tmp_path: Path) -> None:
    """Those that files share are not, nor other families; a name may hold anything; what is gone has none."""
    process(tmp_path, 17, 1, "qlora", 10, 4)
    process(tmp_path, 18, 17, "a) b (", 100, 40)
    process(tmp_path, 19, 18, "rank", 1000, 400)
    process(tmp_path, 20, 1, "other", 7, 0)
    (tmp_path / "21").mkdir()

    assert private_bytes(17, tmp_path) == 666 * PAGE
    assert private_bytes(99, tmp_path) == 0


def test_this_process_has_memory() -> None:
    """More than Python alone."""
    assert private_bytes(os.getpid()) > 2**20
