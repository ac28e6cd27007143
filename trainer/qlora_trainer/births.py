"""How the ranks of a pod come to be: forked from one process that has imported what all of them need.

Importing torch and transformers takes 400 MiB that ranks hardly ever write to. Forked from one process, the nursery,
they share it. The nursery ends as soon as the ranks are born, and they become children of the launcher, which has
asked the kernel for orphans among its descendants (PR_SET_CHILD_SUBREAPER): it learns their exit codes, and they die
with it. What is read when a library is loaded (thread counts, the allocator) is the nursery's environment, so it has
to be the same for all ranks of a pod; the rest, and the CPUs, each rank sets for itself.

This is the launcher's side; the nursery's is nursery.py.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO

from qlora_trainer.topology.layout import RankPlace

POLL_SECONDS = 0.1

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


class BirthError(Exception):
    """No rank was started; the message says why."""


@dataclass(frozen=True)
class Birth:
    """What the nursery is told of one rank."""

    environment: dict[str, str]
    cpus: Sequence[int]
    memory_node: int | None
    stdout: int
    """A descriptor of the nursery, as the next one."""
    stderr: int


@dataclass(frozen=True)
class Order:
    """What the nursery is told. It answers with the ranks' process ids, a JSON list, and ends."""

    launcher: int
    """Process id."""
    go: int
    """A descriptor that gives each rank a byte once it is the launcher's child; its end means: never mind."""
    births: Sequence[Birth]


class Process:
    """A child that another process forked: what subprocess.Popen is for one's own."""

    def __init__(self, pid: int, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a death by signal; None while it runs."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        """The exit code, once it has ended."""
        code = self._reap(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def fork(
    command: Sequence[str],
    environments: Sequence[dict[str, str]],
    places: Sequence[RankPlace],
    stopping: Callable[[], bool],
) -> list[Process]:
    """One process of `command` (a Python, and its arguments) per environment, bound to its place.

    Raises:
        BirthError: the nursery could not be started or failed, or `stopping()` was true before it was done.
    """
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        outputs, births = [], []
        for environment, place in zip(environments, places, strict=True):
            (out, stdout), (err, stderr) = _pipe(ours, theirs), _pipe(ours, theirs)
            outputs.append((out, err))
            births.append(Birth(environment, place.cpus, place.memory_node, stdout, stderr))
        go, let_go = os.pipe()
        theirs.callback(os.close, go)
        theirs.callback(os.close, let_go)
        order = Order(os.getpid(), go, births)
        pids = _nursery(command, order, environments[0], stopping)
        # They are this process's own now. Before, they would have died with the nursery.
        os.write(let_go, bytes(len(pids)))
        ours.pop_all()
    return [Process(pid, out, err) for pid, (out, err) in zip(pids, outputs, strict=True)]


def _pipe(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[IO[bytes], int]:
    """Our end, to be read, and theirs."""
    reading, writing = os.pipe()
    theirs.callback(os.close, writing)
    return ours.enter_context(os.fdopen(reading, "rb")), writing


def _nursery(
    command: Sequence[str], order: Order, environment: dict[str, str], stopping: Callable[[], bool]
) -> list[int]:
    """Process ids of the ranks, by then children of this process."""
    ends = [order.go, *(end for birth in order.births for end in (birth.stdout, birth.stderr))]
    with _adopting_orphans():
        try:
            nursery = subprocess.Popen(
                [command[0], "-m", "qlora_trainer.nursery", *command[1:]],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=ends,
                # Ctrl-C reaches the launcher alone.
                start_new_session=True,
            )
        except OSError as error:
            raise BirthError(str(error)) from error
        with nursery:
            answer, said = _converse(nursery, json.dumps(asdict(order)).encode(), stopping)
    sys.stderr.buffer.write(said)
    sys.stderr.buffer.flush()
    if nursery.returncode:
        lines = said.decode(errors="replace").strip().splitlines()
        raise BirthError(lines[-1] if lines else f"what forks them ended with code {nursery.returncode}")
    pids: list[int] = json.loads(answer)
    return pids


def _converse(
    nursery: subprocess.Popen[bytes], order: bytes, stopping: Callable[[], bool]
) -> tuple[bytes, bytes]:
    """What it wrote to stdout and stderr until its end, which comes at once when we are to stop."""
    unsent: bytes | None = order
    while True:
        try:
            return nursery.communicate(unsent, POLL_SECONDS)
        except subprocess.TimeoutExpired:
            unsent = None  # it is kept, and sent as the nursery reads
            if stopping():
                nursery.kill()


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """What descendants of this process leave behind meanwhile becomes its own child."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
