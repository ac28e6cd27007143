"""Recorded processes are ended, and only those."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testcluster.errors import ClusterError
from testcluster.processes import Processes, end_recorded, recorded, started
from testcluster.waiting import wait_for

SLEEP = ["/bin/sleep", "300"]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Processes in an empty folder."""
    made = Processes(tmp_path)
    yield made
    made.end_all()


def test_a_started_program_is_recorded(processes: Processes, tmp_path: Path) -> None:
    """state.json has the pid of what runs, and no longer that of what was ended."""
    processes.start("a", SLEEP)
    processes.start("b", SLEEP)
    processes.end("a")

    assert recorded(tmp_path) == {"b": processes.pids["b"]}


def test_a_program_starts_again_as_it_was(processes: Processes) -> None:
    """Without a command, the program's earlier command is used."""
    processes.start("a", SLEEP)
    processes.end("a")

    processes.start("a")
    command = wait_for(lambda: _command(processes.pids["a"]) == SLEEP)

    assert command


def test_any_process_can_end_what_is_recorded(processes: Processes, tmp_path: Path) -> None:
    """end_recorded kills what state.json names, without the object that started it."""
    processes.start("a", SLEEP)
    pid = processes.pids["a"]

    end_recorded(tmp_path)

    assert started(pid) is None


def test_a_recycled_pid_is_not_killed(processes: Processes, tmp_path: Path) -> None:
    """A process that merely has a recorded pid, but started at another time, lives on."""
    processes.start("a", SLEEP)
    state = json.loads((tmp_path / "state.json").read_text())
    state["processes"]["a"]["started"] -= 1
    (tmp_path / "state.json").write_text(json.dumps(state))

    end_recorded(tmp_path)

    assert started(processes.pids["a"]) is not None


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_nothing_recorded_is_nothing_to_end(tmp_path: Path, folder: str) -> None:
    """A folder without state.json, or no folder, has no processes."""
    (tmp_path / "empty").mkdir()

    end_recorded(tmp_path / folder)

    assert recorded(tmp_path / folder) == {}


def test_an_ended_program_is_reported_with_its_log(processes: Processes) -> None:
    """check raises with the program's name, status and what it printed last."""
    processes.start("a", ["/bin/sh", "-c", "echo the reason >&2; exit 3"])

    with pytest.raises(ClusterError, match=r"a ended with 3(?s:.*)the reason"):
        wait_for(processes.check, seconds=5)


@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
def test_a_killed_parent_takes_attached_programs_with_it(tmp_path: Path, detached: bool) -> None:
    """When the starter is killed, its programs die with it unless they are detached; those are then cleaned up."""
    code = (
        "import sys, time, pathlib; from testcluster.processes import Processes; "
        f"Processes(pathlib.Path(sys.argv[1]), detached={detached}).start('a', {SLEEP}); "
        "print(flush=True); time.sleep(300)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        [pid] = recorded(tmp_path).values()
        wait_for(lambda: _command(pid) == SLEEP)
        parent.kill()

    if not detached:
        wait_for(lambda: started(pid) is None)
    lives = started(pid) is not None
    end_recorded(tmp_path)

    assert lives == detached
    assert started(pid) is None


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
