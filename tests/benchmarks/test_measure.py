"""What the measuring harness says about real processes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "trainer" / "benchmarks" / "measure.py"
MIB = 2**20


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_measure", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


measure = _load()

HOLD = "import time; time.sleep(1.5)"
"""Long enough to be seen on a busy machine."""
PROGRAMS = {
    "anonymous": ("held = bytearray(b'x') * (100 << 20)", "anon", 100),
    "shared by two": (
        "import mmap, os; h = mmap.mmap(-1, 100 << 20); [h.write(b'x' * 4096) for _ in range(25600)]; os.fork()",
        "shmem",
        100,
    ),
    "of each of two": ("import os; os.fork(); held = bytearray(b'x') * (50 << 20)", "anon", 100),
}


@pytest.mark.parametrize(("program", "kind", "mebibytes"), PROGRAMS.values(), ids=PROGRAMS)
def test_memory_of_a_tree_is_counted_once(program: str, kind: str, mebibytes: int) -> None:
    """Each page counts once, whichever of the processes hold it, and under its kind."""
    result = measure.measure([sys.executable, "-c", f"{program}\n{HOLD}"], interval=0.02)

    assert result.exit_code == 0
    assert mebibytes * MIB <= getattr(result.peak, kind) <= (mebibytes + 30) * MIB
    assert mebibytes * MIB <= result.peak.pss <= (mebibytes + 60) * MIB
    assert mebibytes * MIB <= result.peak_private <= result.peak.pss


def test_file_backed_memory_is_told_apart(tmp_path: Path) -> None:
    """Pages of a mapped file count as file-backed and not as private."""
    data = tmp_path / "data"
    data.write_bytes(b"x" * (64 * MIB))
    program = (
        f"import mmap; f = open({str(data)!r}, 'rb')\n"
        "m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); s = sum(m[::4096])\n"
    )

    result = measure.measure([sys.executable, "-c", program + HOLD], interval=0.02)

    assert result.peak.file >= 64 * MIB
    assert result.peak_private < 64 * MIB


def test_a_process_whose_parent_died_stays_in_the_tree(tmp_path: Path) -> None:
    """A member that is handed to another parent still counts."""
    note = tmp_path / "orphan"
    start = "import os, subprocess, sys, time; subprocess.{}([sys.executable, '-c', {!r}])"
    orphan = (
        "import os, time\nparent = os.getppid()\n"
        "while os.getppid() == parent: time.sleep(0.01)\n"
        f"held = bytearray(b'x') * (80 << 20); {HOLD}; open({str(note)!r}, 'w')"
    )
    middle = start.format("Popen", orphan) + "; time.sleep(1.5)"
    program = start.format("run", middle) + f"\nwhile not os.path.exists({str(note)!r}): time.sleep(0.01)"

    result = measure.measure([sys.executable, "-c", program], interval=0.02)

    assert result.peak.anon >= 80 * MIB


def test_what_outlives_the_command_is_killed(tmp_path: Path) -> None:
    """No process of the tree is left behind when the command ends before it."""
    note = tmp_path / "pid"
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\ntime.sleep(1.5)"
    )

    measure.measure([sys.executable, "-c", program], interval=0.02)

    pid = int(note.read_text())
    assert pid not in {process.pid for process in _running()}


def _running() -> list[Any]:
    states = {}
    for process in measure.process_table():
        stat = Path(f"/proc/{process.pid}/stat")
        if stat.exists():
            states[process] = stat.read_text().rpartition(")")[2].split()[0]
    return [process for process, state in states.items() if state != "Z"]


def test_a_timeout_kills_the_whole_tree() -> None:
    """After the timeout every process is killed and the measurement says so."""
    program = "import os, time; os.fork(); time.sleep(60)"

    result = measure.measure([sys.executable, "-c", program], interval=0.02, timeout=0.3)

    assert result.timed_out
    assert result.exit_code == -signal.SIGKILL


def test_a_command_that_cannot_start_is_an_error() -> None:
    """A command that does not exist raises the system's error, naming it."""
    with pytest.raises(FileNotFoundError, match="no-such-command"):
        measure.measure(["no-such-command"])


def test_a_process_that_ended_has_no_memory() -> None:
    """A process that ended between two looks counts as nothing."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()

    assert measure.memory(child.pid) == measure.Memory()


def test_a_reused_process_id_is_not_a_member() -> None:
    """A process with a member's id but another start time is somebody else."""
    members = frozenset({measure.Process(10, start=1)})
    table = {measure.Process(10, start=9): 1, measure.Process(11, start=9): 10}

    assert measure.grow(members, table) == frozenset()


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(7)", 7), ("os.abort()", 128 + signal.SIGABRT)]
)
def test_the_command_line_passes_the_exit_code_on(code: str, expected: int) -> None:
    """The script exits as its command did and prints one JSON object."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--", sys.executable, "-c", f"import os; {code}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONFAULTHANDLER": ""},
    )

    report = json.loads(done.stderr.splitlines()[-1])
    assert done.returncode == expected
    assert report["exit_code"] in (expected, 128 - expected)
    assert report["wall_seconds"] > 0
