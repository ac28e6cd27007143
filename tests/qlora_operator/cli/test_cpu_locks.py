"""CPUs of this machine that one `qlora run` has are not another's, for as long as its processes live."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_operator.cli.cpu_locks import FILE, CpuLocks, holder_text, in_use_now, lock_file

pytestmark = pytest.mark.process

HOLD = """
import sys
from pathlib import Path
from qlora_operator.cli.cpu_locks import CpuLocks, holder_text
locks = CpuLocks(Path(sys.argv[1]))
locks.take([0, 1, 700], "job other (process 17)")
locks.promise_memory(5 << 40, holder_text("larger"))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of locks of the test's own."""
    return tmp_path / FILE


@pytest.fixture
def other(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process, which holds CPUs 0, 1 and 700."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_holder_of_a_cpu_is_named(path: Path, other: "subprocess.Popen[str]") -> None:
    """What another process holds is busy, and says whose it is; the rest is free."""
    busy = CpuLocks(path).busy([0, 1, 2, 700])

    assert busy == dict.fromkeys([0, 1, 700], "job other (process 17)")


def test_a_dead_process_holds_nothing(path: Path, other: "subprocess.Popen[str]") -> None:
    """The kernel releases the locks; the name that stays in the file counts for nothing."""
    other.kill()
    other.wait()

    assert CpuLocks(path).busy([0, 1, 700]) == {}


def test_memory_that_a_job_may_yet_take_is_known(path: Path, other: "subprocess.Popen[str]") -> None:
    """What it asked for, less what its processes have by now; of a process that is gone, all."""
    mine = CpuLocks(path)
    mine.promise_memory(3 << 30, "job other (process 4194305)")
    promised = CpuLocks(path).promised_memory()
    used = 5 * 2**40 - promised.pop(f"job larger (process {other.pid})")

    assert promised == {"job other (process 4194305)": 3 * 2**30}
    assert 2**20 < used < 2**30
    mine.close()
    other.kill()
    other.wait()
    assert CpuLocks(path).promised_memory() == {}


def test_what_is_held_by_others_is_not_taken(path: Path, other: "subprocess.Popen[str]") -> None:
    """A CPU that is shared stays its first holder's, by name as well."""
    mine = CpuLocks(path)
    mine.take([1, 2], holder_text("mine"))

    assert CpuLocks(path).busy([1, 2]) == {
        1: "job other (process 17)",
        2: f"job mine (process {os.getpid()})",
    }


def test_a_child_that_inherits_the_file_keeps_the_cpus(path: Path) -> None:
    """Ranks that outlive their `qlora run` still have their CPUs to themselves."""
    locks = CpuLocks(path)
    locks.take([3], holder_text("mine"))
    with subprocess.Popen(["sleep", "60"], pass_fds=[locks.fileno()]) as child:
        locks.close()
        assert list(CpuLocks(path).busy([3])) == [3]
        child.kill()
        child.wait()
    assert CpuLocks(path).busy([3]) == {}


def test_every_user_can_lock(path: Path) -> None:
    """The umask of whoever comes first shuts nobody out."""
    before = os.umask(0o077)
    try:
        CpuLocks(path).close()
    finally:
        os.umask(before)

    assert path.stat().st_mode & 0o777 == 0o666


def _link(path: Path) -> None:
    path.with_name("elsewhere").write_text("theirs")
    path.symlink_to("elsewhere")


def _hard_link(path: Path) -> None:
    path.with_name("elsewhere").write_text("theirs")
    path.hardlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("make", [_link, _hard_link, os.mkfifo], ids=["link", "hard link", "pipe"])
def test_what_another_user_may_have_put_there_is_not_written_to(path: Path, make: object) -> None:
    """In a folder that everybody can write to, only a plain file of its own is used."""
    make(path)  # type: ignore[operator]

    with pytest.raises(OSError):  # noqa: PT011 - the kernel's own sentence, or ours
        CpuLocks(path)


def test_without_a_place_for_locks_nothing_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is made where no lock can be, too."""
    monkeypatch.setenv("QLORA_CPU_LOCKS", str(tmp_path / "missing"))

    assert lock_file().parent == tmp_path / "missing"
    assert in_use_now([0, 1]) == ({}, {})
