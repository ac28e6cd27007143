"""What a process asks of the kernel, each in a process of its own."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from qlora_trainer.host.process import is_stopped, processor_seconds

pytestmark = pytest.mark.process


def output_of(program: str) -> str:
    """What a program prints."""
    code = "import os, signal, time\nfrom qlora_trainer.host.process import *\n" + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def test_a_parent_that_is_another_has_died() -> None:
    """Whoever was started by a process that is no longer its parent will not get the signal, and learns so."""
    assert output_of("print(die_with_parent(signal.SIGTERM, os.getppid() + 1))") == "False\n"
    assert output_of(f"print(die_with_parent(signal.SIGTERM, {os.getpid()}))") == "True\n"


def test_a_process_dies_with_its_parent() -> None:
    """The signal ends a child that would have slept on."""
    program = """
        reading, writing = os.pipe()
        parent = os.fork()
        if parent == 0:
            me = os.getpid()
            if os.fork() == 0:
                os.close(reading)
                die_with_parent(signal.SIGKILL, me)
                os.write(writing, b"ready")
                time.sleep(600)
            os.read(reading, 5)
            os._exit(0)
        os.close(writing)
        os.waitpid(parent, 0)
        print(os.read(reading, 1))  # the end, once nobody holds the other end
    """
    assert output_of(program) == "b''\n"


def test_orphans_become_children_meanwhile() -> None:
    """A grandchild whose parent has exited is this process's child inside the context, and not after it."""
    program = """
        def grandchild():
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                me = os.getpid()
                if os.fork() == 0:
                    while os.getppid() == me:
                        time.sleep(0.01)
                    os.write(writing, str(os.getppid() == ancestor).encode())
                    os._exit(7)
                os._exit(0)
            os.waitpid(child, 0)
            return os.read(reading, 5).decode()

        ancestor = os.getpid()
        with child_subreaper():
            print(grandchild(), os.waitstatus_to_exitcode(os.wait()[1]))
        print(grandchild())
    """
    assert output_of(program) == "True 7\nFalse\n"


def test_a_process_is_shown_by_its_name() -> None:
    """The kernel keeps 15 bytes."""
    program = "set_process_name('qlora-rank-1234567'); print(open('/proc/self/comm').read().strip())"

    assert output_of(program) == "qlora-rank-1234\n"


def test_processor_time_grows_with_work_alone() -> None:
    """Of another process, too; a process that is gone has none."""
    before = processor_seconds(os.getpid())
    while processor_seconds(os.getpid()) == before:
        sum(range(100_000))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as waiting:
        assert processor_seconds(waiting.pid) < 60

    assert processor_seconds(waiting.pid) == 0


def test_a_process_knows_when_it_was_started() -> None:
    """Before its first line ran, and after the one that started it."""
    before = time.monotonic()
    started, first_line = map(float, output_of("print(started_at(), time.monotonic())").split())

    assert before - 0.02 < started < first_line


def test_a_stopped_process_is_told_from_one_that_waits() -> None:
    """And one that is gone is neither."""
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert is_stopped(process.pid)
        process.kill()
    assert not is_stopped(process.pid)
