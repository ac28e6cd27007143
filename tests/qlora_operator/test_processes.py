"""Launchers on this machine, with real processes."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.exit_codes import ExitCode
from qlora_contract.run import RunConfig
from qlora_operator import processes, workspace
from qlora_operator.api.types import QLoRAJob
from qlora_operator.desired.run_config import run_config
from qlora_operator.processes import Launcher, Limits, ProcessError, Stop, action, ask_trainer

LIMITS = Limits(grace=30, patience=300, kill_delay=20)
SHORT = Limits(grace=0.3, patience=0.3, kill_delay=0.3)

REPORT = """
import json, os, sys
def report(code, cause):
    path = os.environ["QLORA_TERMINATION_LOG"]
    open(path, "w").write(json.dumps({"exitCode": code, "reason": "R", "cause": cause}))
    sys.exit(code)
index = int(os.environ["JOB_COMPLETION_INDEX"])
"""


def ignored(number: int) -> Stop:
    """A Stop that got this signal at time 0 of the clock."""
    return Stop(signal=number, at=0.0)


@pytest.mark.parametrize(
    ("now", "stop", "ended_at", "due"),
    [
        pytest.param(1e6, Stop(), None, "wait", id="all goes well"),
        pytest.param(1.0, ignored(2), None, "terminate", id="asked to stop"),
        pytest.param(30.0, ignored(2), None, "kill", id="grace is over"),
        pytest.param(1.0, Stop(signal=2, at=0.0, again=True), None, "kill", id="asked twice"),
        pytest.param(299.0, Stop(), 0.0, "wait", id="one has ended"),
        pytest.param(300.0, Stop(), 0.0, "terminate", id="patience is over"),
        pytest.param(320.0, Stop(), 0.0, "kill", id="and SIGTERM did not help"),
        pytest.param(30.0, ignored(15), 29.0, "kill", id="grace counts from the signal"),
    ],
)
def test_living_launchers_are_due(now: float, stop: Stop, ended_at: float | None, due: str) -> None:
    """Launchers are let alone, then asked, then killed."""
    assert action(now, stop, ended_at, LIMITS) == due


Gang = Callable[..., list[Launcher]]


@pytest.fixture
def gang(tmp_path: Path, a_job: Callable[..., QLoRAJob]) -> Iterator[Gang]:
    """A maker of two launchers that run a program; none of them outlives the test."""
    started: list[Launcher] = []

    def make(program: str, count: int = 2) -> list[Launcher]:
        run = a_run(a_job, count)
        with workspace.locked(tmp_path) as lock:
            command = (sys.executable, "-c", REPORT + program)
            started.extend(
                processes.start(
                    run, tmp_path, [[0]] * count, {"team": tmp_path}, lock.fileno(), 4242, command
                )
            )
        return started

    yield make
    processes.kill(started)


def a_run(a_job: Callable[..., QLoRAJob], pods: int = 2) -> RunConfig:
    """A RunConfig of so many pods."""
    return run_config(a_job(topology={"pods": pods}), uid="u", attempt=1, isa="avx2")


def watched(
    launchers: list[Launcher], limits: Limits = LIMITS, stop: Stop | None = None
) -> processes.Outcome:
    """What became of the launchers."""
    processes.watch(launchers, limits, stop or Stop(), lambda: None)
    return processes.conclude(launchers)


def wait_for(happened: Callable[[], Any]) -> None:
    """Return once it happened; the test's own time-out ends a wait in vain."""
    while not happened():
        time.sleep(0.02)


def test_launchers_get_what_they_need(gang: Gang, tmp_path: Path) -> None:
    """Each launcher has its place in the environment, and an output of its own."""
    launchers = gang("print(json.dumps(dict(os.environ)), os.getsid(0) == os.getpid())")

    assert watched(launchers).code == 0
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


def test_the_cause_is_that_of_the_launcher_that_failed_first_hand(gang: Gang) -> None:
    """Bad data on one launcher explains the lost peer of the other."""
    outcome = watched(gang("report(11, 'line 3 is no JSON') if index else report(40, 'rank 1 is gone')"))

    assert (outcome.code, outcome.cause) == (ExitCode.INVALID_DATA, "line 3 is no JSON")
    assert outcome.log.name == "launcher-1.log"


def test_a_launcher_that_dies_without_a_word_is_named(gang: Gang) -> None:
    """A killed launcher's signal is the cause, and the code is the shell's."""
    launchers = gang("import time; time.sleep(60) if index else report(40, 'rank 1 is gone')")
    launchers[1].process.kill()

    outcome = watched(launchers)
    assert (outcome.code, outcome.cause) == (
        137,
        "launcher 1 died of SIGKILL: perhaps the machine ran out of memory",
    )


def test_a_launcher_without_a_report_is_quoted(gang: Gang) -> None:
    """The last lines of its log stand for the cause."""
    outcome = watched(gang("print('reading'); sys.exit('no module named torch')", count=1))

    assert outcome.code == 1
    assert outcome.cause == "launcher 0 exited with code 1: reading\nno module named torch"


def test_a_launcher_that_never_ends_is_ended(gang: Gang) -> None:
    """Once another has failed and the patience is over, one that ignores SIGTERM is killed, and is no cause."""
    launchers = gang(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600) if index else report(40, 'rank 1 gave no sign of life')"
    )
    wait_for(lambda: launchers[1].log.read_text())

    outcome = watched(launchers, SHORT)
    assert (outcome.code, outcome.cause) == (ExitCode.LOST_PEER, "rank 1 gave no sign of life")
    assert launchers[1].process.returncode == -signal.SIGKILL


def test_stopped_launchers_may_finish_what_they_do(gang: Gang) -> None:
    """SIGTERM goes to each of them once, and their own end counts."""
    launchers = gang(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: report(50, 'a checkpoint holds all up to step 7'))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    wait_for(lambda: all(launcher.log.read_text() for launcher in launchers))
    stop = Stop()
    stop(signal.SIGINT)

    outcome = watched(launchers, LIMITS, stop)
    assert (outcome.code, outcome.cause) == (ExitCode.TERMINATED, "a checkpoint holds all up to step 7")
    assert not any(launcher.forced for launcher in launchers)


def test_a_second_signal_kills(gang: Gang) -> None:
    """Whoever asks twice does not wait for a checkpoint."""
    launchers = gang(
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    )
    wait_for(lambda: all(launcher.log.read_text() for launcher in launchers))
    stop = Stop()
    stop(signal.SIGINT)
    stop(signal.SIGINT)

    outcome = watched(launchers, LIMITS, stop)
    assert outcome.code == 128 + signal.SIGKILL
    assert outcome.cause == "launcher 0 still ran when its time was over, and was killed"


def test_a_program_that_is_not_there_is_named(tmp_path: Path, a_job: Callable[..., QLoRAJob]) -> None:
    """A launcher that cannot be started is an error, and leaves nothing behind."""
    with (
        workspace.locked(tmp_path) as lock,
        pytest.raises(ProcessError, match="launcher 0 could not be started"),
    ):
        processes.start(a_run(a_job), tmp_path, [[0], [0]], {}, lock.fileno(), 1, ("./no-such-program",))


def test_a_port_is_free_and_another() -> None:
    """Somebody can listen at it, and two that are asked for differ."""
    first = processes.free_port()
    second = processes.free_port(besides=first)

    assert first != second
    socket.create_server(("127.0.0.1", second)).close()


def test_the_trainer_tells_of_the_machine() -> None:
    """The planner, asked for nothing, answers without torch, with the CPUs of this process."""
    machine = ask_trainer().machine

    assert machine is not None
    assert sorted(machine.cpus) == sorted(os.sched_getaffinity(0))
    assert set(machine.tiers).isdisjoint(machine.lacking)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        pytest.param(
            "import sys; sys.exit('no torch')", "ended with code 1 and no answer: no torch", id="error"
        ),
        pytest.param("print('hello')", "code 0 and no answer: it wrote nothing to stderr", id="no JSON"),
    ],
)
def test_a_planner_without_an_answer_is_quoted(program: str, said: str) -> None:
    """What it said last stands in the error."""
    with pytest.raises(ProcessError, match=said):
        ask_trainer(command=(sys.executable, "-c", program))


def test_the_working_folder_is_no_place_to_import_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's json.py beside the job does not become Python's."""
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)

    assert ask_trainer().machine is not None


@pytest.mark.parametrize(
    ("code", "text"),
    [
        pytest.param(11, "invalid data: c", id="a code of the contract"),
        pytest.param(1, "c", id="unexpected"),
        pytest.param(137, "c", id="a signal"),
    ],
)
def test_a_code_and_its_cause_make_a_sentence(code: int, text: str) -> None:
    """A known code stands before its cause in words; the others say nothing that the cause does not."""
    assert processes.sentence(code, "c") == text


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trainer's packages the extra to install is named."""
    monkeypatch.setattr(processes, "TRAINER_PACKAGES", ("json", "no_such_package"))

    with pytest.raises(
        ProcessError, match=r"\(no_such_package missing\): pip install 'qlora-operator\[trainer\]'"
    ):
        processes.require_trainer()
