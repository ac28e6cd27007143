"""Processes are found and ended by their control group, whoever started them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from testcluster import cgroups, processes
from testcluster.node import spawn

pytestmark = [
    pytest.mark.nodes,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes control groups: run the tests as root"),
]


@pytest.fixture
def group() -> Iterator[str]:
    """A group of its own beside those of a cluster that may run."""
    name = f"test-{os.getpid()}"
    yield name
    cgroups.remove(name)
    for hierarchy in cgroups.hierarchies():
        with contextlib.suppress(OSError):  # a cluster runs
            (hierarchy / cgroups.ROOT).rmdir()


def test_an_orphan_is_ended_with_its_children(group: str, tmp_path: Path) -> None:
    """A program, its child and that child's own group die together; what they printed stays."""
    spawn(["sh", "-c", "echo started; sleep 1000 & exec sleep 1000"], group, tmp_path / "log")
    while len(found := cgroups.pids(group)) < 2:
        pass
    cgroups.make(f"{group}/inner")
    for file in cgroups.entry_files(f"{group}/inner"):
        Path(file).write_text(str(max(found)))

    assert cgroups.pids(f"{group}/inner") == {max(found)}
    cgroups.kill(group)

    assert cgroups.pids(group) == set()
    assert [processes.started(pid) for pid in found] == [None, None]
    assert (tmp_path / "log").read_text() == "started\n"


def test_an_absent_group_has_no_processes() -> None:
    """Asking and killing before anything was started is no error."""
    cgroups.kill("test-absent")

    assert cgroups.pids("test-absent") == set()
