"""What dead ranks have left in /dev/shm."""

import mmap
from pathlib import Path

import pytest

from qlora_trainer.distributed.backends.shared_memory import remove_stale_regions

GONE, LIVING = 4242, 4243
"""Process ids."""


@pytest.fixture
def processes(tmp_path: Path) -> Path:
    """A /proc of the machine's own namespace, with one process, which has nothing mapped."""
    folder = tmp_path / "proc"
    (folder / "self" / "ns").mkdir(parents=True)
    (folder / "self" / "ns" / "pid").symlink_to("pid:[4026531836]")
    (folder / str(LIVING)).mkdir()
    (folder / str(LIVING) / "maps").write_text("")
    return folder


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


def test_files_of_dead_processes_go(shared: Path, processes: Path) -> None:
    """All regions of a process that ended are removed, and those of one that lives are not."""
    dead = [shared / f"{GONE}:0:{endpoint}" for endpoint in (0, 1)]
    living = shared / f"{LIVING}:0:0"
    for path in (*dead, living):
        path.write_bytes(b"")

    assert sorted(remove_stale_regions(shared, processes)) == dead
    assert list(shared.iterdir()) == [living]


def test_what_a_container_uses_stays(shared: Path, processes: Path) -> None:
    """Its processes have other numbers here than in it, after which its files are named."""
    path = shared / f"{GONE}:0:0"
    path.write_bytes(b"x" * mmap.PAGESIZE)
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0):
        (processes / str(LIVING) / "maps").write_text(Path("/proc/self/maps").read_text())

        assert remove_stale_regions(shared, processes) == []


def test_within_a_container_everything_stays(shared: Path, processes: Path) -> None:
    """There nobody can tell whether a process of another one lives."""
    link = processes / "self" / "ns" / "pid"
    link.unlink()
    link.symlink_to("pid:[4026532001]")
    (shared / f"{GONE}:0:0").write_bytes(b"")

    assert remove_stale_regions(shared, processes) == []


@pytest.mark.parametrize("name", ["sem.{}", "{}:0:0.bak", "0{}:0:0", "a:{}:0", "{}::0"])
def test_other_files_stay(name: str, shared: Path, processes: Path) -> None:
    """Only names that libfabric gives are looked at."""
    (shared / name.format(GONE)).write_bytes(b"")

    assert remove_stale_regions(shared, processes) == []


def test_what_cannot_be_removed_stays(shared: Path, processes: Path) -> None:
    """Another's file, as this folder that no unlink removes, is no reason to fail."""
    (shared / f"{GONE}:0:0").mkdir()

    assert remove_stale_regions(shared, processes) == []


def test_a_machine_without_shared_memory_has_nothing_stale(tmp_path: Path, processes: Path) -> None:
    """A folder that is not there is an empty one."""
    assert remove_stale_regions(tmp_path / "nothing", processes) == []


def test_the_kernel_says_what_is_read_here() -> None:
    """The names of namespaces, and the columns of what is mapped, are as they are taken to be."""
    assert str(Path("/proc/self/ns/pid").readlink()).startswith("pid:[")
    assert all(line.split()[4].isdigit() for line in Path("/proc/self/maps").read_text().splitlines())
