"""Fork the ranks of a pod from one process, the fork server, that has imported what all of them need.

Importing torch and transformers takes 400 MiB that ranks hardly ever write to; forked from one process, they share it.
The fork server exits as soon as the ranks are forked, and they become children of the launcher, which is their
subreaper meanwhile: it learns their exit codes, and they die with it. What is read when a library is loaded (thread
counts, the allocator) comes from the fork server's environment, so it has to be the same for all ranks of a pod; each
rank sets the rest, and its CPUs, for itself.

By hand: multiprocessing's fork server keeps running, is the ranks' parent and hides their exit codes
(docs/decisions/0014). This is the launcher's side; the other is fork_server_main.py.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import IO

from qlora_contract.entry_points import FORK_SERVER
from qlora_trainer.host.process import child_subreaper
from qlora_trainer.launch.cpu_layout import CpuAssignment

POLL_SECONDS = 0.1


class SpawnError(Exception):
    """No rank was started; the message says why."""


@dataclass(frozen=True)
class RankSpec:
    """What the fork server needs to start one rank."""

    environment: dict[str, str]
    cpus: Sequence[int]
    memory_node: int | None
    stdout: int
    """A descriptor of the fork server, as the next one."""
    stderr: int


@dataclass(frozen=True)
class ForkRequest:
    """What the fork server reads from stdin. It answers with the ranks' process ids, a JSON list, and exits."""

    launcher: int
    """Process id."""
    start_pipe: int
    """A descriptor from which each rank reads one byte once it is the launcher's child; its end means: do not start."""
    ranks: Sequence[RankSpec]


class ForkedProcess:
    """A child that another process forked: what subprocess.Popen is for one's own."""

    def __init__(self, pid: int, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a death by signal; None while it runs."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        """Wait for its end; returns the exit code as `poll` does."""
        code = self._reap(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has exited."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def fork_ranks(
    command: Sequence[str],
    environments: Sequence[dict[str, str]],
    assignments: Sequence[CpuAssignment],
    stopping: Callable[[], bool],
) -> list[ForkedProcess]:
    """Start one process of `command` (a Python, and its arguments) per environment, on the CPUs assigned to it.

    Raises:
        SpawnError: the fork server could not be started or failed, or `stopping` became true before it was done.
    """
    with contextlib.ExitStack() as our_ends, contextlib.ExitStack() as their_ends:

        def pipe() -> tuple[IO[bytes], int]:
            """The end that we read, and the one that a rank writes to."""
            reading, writing = os.pipe()
            their_ends.callback(os.close, writing)
            return our_ends.enter_context(os.fdopen(reading, "rb")), writing

        outputs, specs = [], []
        for environment, assignment in zip(environments, assignments, strict=True):
            (out, stdout), (err, stderr) = pipe(), pipe()
            outputs.append((out, err))
            specs.append(RankSpec(environment, assignment.cpus, assignment.memory_node, stdout, stderr))
        start_pipe, start = os.pipe()
        their_ends.callback(os.close, start_pipe)
        their_ends.callback(os.close, start)
        pids = _run_fork_server(
            command, ForkRequest(os.getpid(), start_pipe, specs), environments[0], stopping
        )
        # They are our children now. Until here they would have died with the fork server.
        os.write(start, bytes(len(pids)))
        our_ends.pop_all()
    return [ForkedProcess(pid, out, err) for pid, (out, err) in zip(pids, outputs, strict=True)]


def _run_fork_server(
    command: Sequence[str], request: ForkRequest, environment: dict[str, str], stopping: Callable[[], bool]
) -> list[int]:
    """Process ids of the ranks, which are children of this process by then. Raises SpawnError as `fork_ranks` does."""
    descriptors = [request.start_pipe, *(fd for rank in request.ranks for fd in (rank.stdout, rank.stderr))]
    # Not a pipe, which holds 64 KiB: a request has the environment of each rank, and communicate() sends no more of it
    # once it has timed out.
    with child_subreaper(), os.fdopen(os.memfd_create("fork-request"), "w+") as written:
        json.dump(asdict(request), written)
        written.seek(0)
        try:
            server = subprocess.Popen(
                [command[0], "-m", FORK_SERVER, *command[1:]],
                env=environment,
                stdin=written,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C reaches the launcher alone
            )
        except OSError as error:
            raise SpawnError(str(error)) from error
        with server:
            while True:
                try:
                    answer, errors = server.communicate(timeout=POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    if stopping():
                        server.kill()
    sys.stderr.buffer.write(errors)
    sys.stderr.buffer.flush()
    if server.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise SpawnError(lines[-1] if lines else f"the fork server exited with code {server.returncode}")
    pids: list[int] = json.loads(answer)
    return pids
