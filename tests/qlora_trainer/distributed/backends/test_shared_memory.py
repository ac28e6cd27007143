"""What dead ranks have left in /dev/shm."""

import os
import subprocess
from pathlib import Path

import pytest

from qlora_trainer.distributed.backends.shared_memory import remove_stale_regions

pytestmark = pytest.mark.process


@pytest.fixture
def gone() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_files_of_dead_processes_go(tmp_path: Path, gone: int) -> None:
    """All regions of a process that ended are removed, and those of one that lives are not."""
    dead = [tmp_path / f"{gone}:0:{endpoint}" for endpoint in (0, 1)]
    living = tmp_path / f"{os.getpid()}:0:0"
    for path in (*dead, living):
        path.write_bytes(b"")

    assert sorted(remove_stale_regions(tmp_path)) == dead
    assert list(tmp_path.iterdir()) == [living]


@pytest.mark.parametrize("name", ["sem.{}", "{}:0:0.bak", "0{}:0:0", "a:{}:0", "{}::0"])
def test_other_files_stay(name: str, tmp_path: Path, gone: int) -> None:
    """Only names that libfabric gives are looked at."""
    (tmp_path / name.format(gone)).write_bytes(b"")

    assert remove_stale_regions(tmp_path) == []


def test_what_cannot_be_removed_stays(tmp_path: Path, gone: int) -> None:
    """Another's file, as this folder that no unlink removes, is no reason to fail."""
    (tmp_path / f"{gone}:0:0").mkdir()

    assert remove_stale_regions(tmp_path) == []


def test_a_machine_without_shared_memory_has_nothing_stale(tmp_path: Path) -> None:
    """A folder that is not there is an empty one."""
    assert remove_stale_regions(tmp_path / "nothing") == []
