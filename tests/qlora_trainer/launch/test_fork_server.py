"""Ranks forked from one process, with real processes."""

import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.launch.cpu_layout import CpuAssignment
from qlora_trainer.launch.fork_server import ForkedProcess, SpawnError, fork_ranks

pytestmark = pytest.mark.process

CPUS = tuple(sorted(os.sched_getaffinity(0)))


@pytest.fixture
def forked(tmp_path: Path) -> Callable[..., list[ForkedProcess]]:
    """make(program, ranks=2, module=False, ...) -> ranks that run it, as a script or as a module's `main`."""

    def make(
        program: str,
        ranks: int = 2,
        *,
        module: bool = False,
        assignments: list[CpuAssignment] | None = None,
        stopping: Callable[[], bool] = lambda: False,
        **environ: str,
    ) -> list[ForkedProcess]:
        (tmp_path / "job").mkdir()
        (tmp_path / "job" / "__init__.py").touch()
        file = tmp_path / "job" / "__main__.py"
        file.write_text(textwrap.dedent(program))
        common = os.environ | {"PYTHONPATH": str(tmp_path), "FOLDER": str(tmp_path)} | environ
        return fork_ranks(
            [sys.executable, *(["-m", "job"] if module else [str(file)])],
            [common | {"RANK": str(rank)} for rank in range(ranks)],
            assignments or [CpuAssignment(CPUS, 1)] * ranks,
            stopping,
        )

    return make


def ends(ranks: list[ForkedProcess]) -> list[tuple[bytes, bytes, int]]:
    """What each wrote to stdout and stderr, and its exit code."""
    found = []
    for rank in ranks:
        with rank.stdout as out, rank.stderr as err:
            found.append((out.read(), err.read(), rank.wait()))
    return found


def answers(ranks: list[ForkedProcess]) -> list[Any]:
    """The JSON that each wrote before it ended well."""
    told = ends(ranks)
    assert [(err, code) for _, err, code in told] == [(b"", 0)] * len(ranks)
    return [json.loads(out) for out, _, _ in told]


WHERE = """
    import json, os, sys
    print(json.dumps({
        "rank": os.environ["RANK"],
        "path": "PATH" in os.environ,
        "pid": os.getpid(),
        "parent": os.getppid(),
        "session": os.getsid(0),
        "cpus": sorted(os.sched_getaffinity(0)),
        "name": open("/proc/self/comm").read().strip(),
        "stdin": sys.stdin.read(),
        "files": sorted(int(n) for n in os.listdir("/proc/self/fd")),
    }))
"""


def test_a_rank_is_a_process_of_its_own(forked: Callable[..., list[ForkedProcess]]) -> None:
    """Its environment, session, name and CPUs are its own, its parent is the launcher, and no pipe is another's."""
    assignments = [CpuAssignment(CPUS[:1], 1), CpuAssignment(CPUS[-1:], 1)]
    ranks = forked(WHERE, assignments=assignments)
    told = answers(ranks)

    for number, (rank, assignment, said) in enumerate(zip(ranks, assignments, told, strict=True)):
        said_files = said.pop("files")
        assert said == {
            "rank": str(number),
            "path": True,
            "pid": rank.pid,
            "parent": os.getpid(),
            "session": rank.pid,
            "cpus": list(assignment.cpus),
            "name": f"qlora-rank-{number}",
            "stdin": "",
        }
        assert said_files == [0, 1, 2, 3]  # the last one is that of the listed folder


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        pytest.param("pass", 0, b"", id="the end"),
        pytest.param("import sys; sys.exit(31)", 31, b"", id="an exit code"),
        pytest.param("import os; os._exit(43)", 43, b"", id="at once"),
        pytest.param("import os; os.kill(os.getpid(), 9)", -9, b"", id="a signal"),
        pytest.param("1 / 0", 1, b"ZeroDivisionError: division by zero\n", id="an exception"),
    ],
)
@pytest.mark.parametrize("module", [False, True])
def test_the_launcher_learns_how_each_ended(
    forked: Callable[..., list[ForkedProcess]], program: str, code: int, said: bytes, module: bool
) -> None:
    """Exit codes, signals and tracebacks are those of a process started outright."""
    got = ends(forked(f"def main():\n    {program}\n" if module else program, module=module))

    assert [end[2] for end in got] == [code] * 2
    assert all(end[1].endswith(said) for end in got)


SHARED = """
    import json, os
    LOAD = bytearray(os.urandom(1 << 20) * 64)
    HERE = os.getpid()
    def main():
        open(os.environ["FOLDER"] + "/ready-" + os.environ["RANK"], "w").close()
        while not all(os.path.exists(os.environ["FOLDER"] + f"/ready-{n}") for n in range(2)):
            pass
        lines = open("/proc/self/smaps_rollup").read().splitlines()
        anonymous = next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
        print(json.dumps([HERE, anonymous]), flush=True)
        done = os.environ["FOLDER"] + "/measured-"
        open(done + os.environ["RANK"], "w").close()
        while not all(os.path.exists(done + str(n)) for n in range(2)):
            pass
"""


def test_what_was_imported_is_shared(forked: Callable[..., list[ForkedProcess]]) -> None:
    """A module is imported once, before the ranks are there, and each pays for its part of the memory."""
    (one, first), (other, second) = answers(forked(SHARED, module=True))

    assert one == other
    assert first + second < 1.5 * 64 * 1024


def test_a_failing_import_is_reported(
    forked: Callable[..., list[ForkedProcess]], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """What cannot be imported starts no rank, and the last line says what it was; the rest is in the log."""
    with pytest.raises(SpawnError, match=r"^ModuleNotFoundError: No module named 'nowhere'$"):
        forked("import nowhere", module=True)

    assert b"Traceback" in capfdbinary.readouterr().err


def test_a_death_without_a_message_is_reported(forked: Callable[..., list[ForkedProcess]]) -> None:
    """The exit code stands for a cause when there is no other."""
    with pytest.raises(SpawnError, match="exited with code -9"):
        forked("import os; os.kill(os.getpid(), 9)", module=True)


def test_a_stop_does_not_wait_for_imports(forked: Callable[..., list[ForkedProcess]], tmp_path: Path) -> None:
    """A stop while the fork server imports ends it, and nothing is left."""
    program = "import os, time; open(os.environ['FOLDER'] + '/importing', 'w').write(str(os.getpid())); time.sleep(600)"
    importing = tmp_path / "importing"
    with pytest.raises(SpawnError):
        forked(program, module=True, stopping=lambda: importing.exists() and bool(importing.read_text()))

    assert not Path(f"/proc/{importing.read_text()}").exists()


def test_no_descriptor_is_left_open(forked: Callable[..., list[ForkedProcess]]) -> None:
    """Once a rank's output is read and closed, the launcher holds nothing of its start."""
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    ends(forked("pass"))

    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_a_rank_can_be_signaled_and_polled(forked: Callable[..., list[ForkedProcess]]) -> None:
    """As with a process of one's own: it runs, takes a signal, has an exit code, and takes no signal any more."""
    (rank,) = forked("import time; print('up', flush=True); time.sleep(600)", ranks=1)
    assert rank.stdout.readline() == b"up\n"
    assert rank.poll() is None
    rank.send_signal(signal.SIGTERM)

    assert rank.wait() == rank.poll() == -signal.SIGTERM
    rank.send_signal(signal.SIGTERM)
    ends([rank])


def test_orphans_are_adopted_for_the_start_alone(
    forked: Callable[..., list[ForkedProcess]], tmp_path: Path
) -> None:
    """What a rank leaves behind later is not the launcher's child."""
    program = """
        import os, time
        if os.fork() == 0:
            while os.getppid() == int(open(os.environ["FOLDER"] + "/rank").read() or 0):
                time.sleep(0.01)
            open(os.environ["FOLDER"] + "/parent", "w").write(str(os.getppid()))
            os._exit(0)
    """
    (tmp_path / "rank").touch()
    (rank,) = forked(program, ranks=1)
    (tmp_path / "rank").write_text(str(rank.pid))
    ends([rank])
    while not (tmp_path / "parent").exists() or not (tmp_path / "parent").read_text():
        time.sleep(0.01)

    assert int((tmp_path / "parent").read_text()) != os.getpid()
