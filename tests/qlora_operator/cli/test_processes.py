"""Launchers that are started on this machine, with real processes."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli import job_folder, processes
from qlora_operator.cli.processes import Launcher, ProcessError

pytestmark = pytest.mark.process

Start = Callable[..., list[Launcher]]


def test_launchers_get_what_they_need(start_launchers: Start, tmp_path: Path) -> None:
    """Each launcher has its place in the environment, and an output of its own."""
    launchers = start_launchers("print(json.dumps(dict(os.environ)), os.getsid(0) == os.getpid())")

    assert [launcher.process.wait() for launcher in launchers] == [0, 0]
    places, own_session = zip(
        *(launcher.log.read_text().strip().rsplit(" ", 1) for launcher in launchers), strict=True
    )
    first, second = (json.loads(text) for text in places)
    assert own_session == ("True", "True")
    assert [env["JOB_COMPLETION_INDEX"] for env in (first, second)] == ["0", "1"]
    assert [env["QLORA_PROGRESS_PORT"] for env in (first, second)] == ["4242", "0"]
    assert first["QLORA_TERMINATION_LOG"] != second["QLORA_TERMINATION_LOG"]
    assert first["QLORA_CPUS"] == "0"
    assert json.loads(first["QLORA_VOLUMES"]) == {"team": str(tmp_path)}
    assert first["QLORA_PARENT_DEATH"] == str(os.getpid())
    assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == ("127.0.0.1", second["MASTER_PORT"])
    assert json.loads(Path(first["QLORA_RUN_CONFIG"]).read_text())["job"]["attempt"] == 1
    assert launchers[1].log == tmp_path / "logs/attempt-1/launcher-1.log"


def test_a_program_that_is_not_there_is_named(tmp_path: Path, a_job: Callable[..., QLoRAJob]) -> None:
    """A launcher that cannot be started is an error, and leaves nothing behind."""
    run = to_run_config(a_job(topology={"pods": 2}), uid="u", attempt=1, isa="avx2")
    with (
        job_folder.locked(tmp_path) as lock,
        pytest.raises(ProcessError, match="launcher 0 could not be started"),
    ):
        processes.start(run, tmp_path, [[0], [0]], {}, [lock.fileno()], 1, ("./no-such-program",))


def test_a_port_is_kept_for_the_one_who_listens_later() -> None:
    """Servers of both families can listen at it, while whoever asks for a free one gets another."""
    port = processes.free_port()
    assert port not in {processes.free_port() for _ in range(20)}
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))

    socket.create_server(("127.0.0.1", port)).close()
    socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
