"""Processes on this machine: the launchers of `qlora run`, and the questions to the trainer.

The only module that starts any. What `cluster.py` is to a cluster, this is to one machine.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from qlora_contract.cpus import format_cpu_list
from qlora_contract.exit_codes import COLLATERAL_DELAY_SECONDS, ExitCode, fold
from qlora_contract.places import (
    COMPLETION_INDEX_ENV,
    CPUS_ENV,
    PARENT_DEATH_ENV,
    PROGRESS_PORT_ENV,
    RUN_CONFIG,
    RUN_CONFIG_ENV,
    TERMINATION_LOG_ENV,
    VOLUMES_ENV,
)
from qlora_contract.plan import PlanAnswer
from qlora_contract.progress import TerminationReport
from qlora_contract.run import RunConfig
from qlora_operator import workspace
from qlora_operator.errors import CommandError

LAUNCHER = (sys.executable, "-m", "qlora_trainer.launch")
TRANSFER = (sys.executable, "-m", "qlora_trainer.transfer")
PLANNER = (sys.executable, "-m", "qlora_trainer.plan")
TRAINER_PACKAGES = ("huggingface_hub", "jinja2", "numpy", "s3fs", "safetensors", "torch", "transformers")
"""What the extra `trainer` brings and a job cannot do without; looked for, never imported here."""

POLL_SECONDS = 0.1
PATIENCE_MARGIN_SECONDS = 60.0
"""What launchers get beyond their ranks' heartbeat to notice that another one has ended; more than a launcher
gives its own ranks."""
KILL_DELAY_SECONDS = 20.0
"""From SIGTERM to SIGKILL for launchers that outlived the patience; more than they give their ranks."""
GRACE_MARGIN_SECONDS = 10.0
"""What launchers get beyond the grace period to end by themselves."""
CAUSE_LINES = 5
"""Last lines of a log that stand for a cause where there is no report."""


class ProcessError(CommandError):
    """A program of ours could not be started, or gave no answer."""


# --- questions to the trainer


def require_trainer() -> None:
    """Raise ProcessError, saying what to install, when the trainer's packages are not all there."""
    missing = [name for name in TRAINER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ProcessError(
            f"the trainer's packages are not installed ({', '.join(missing)} missing): "
            "pip install 'qlora-operator[trainer]'"
        )


def ask_trainer(
    *arguments: str, volumes: Mapping[str, Path] | None = None, command: Sequence[str] = PLANNER
) -> PlanAnswer:
    """The answer of `python -m qlora_trainer.plan ARGUMENT...`. Raises ProcessError when there is none."""
    environ = _environ(volumes or {}) | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [*command, *arguments],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise ProcessError(f"{command[0]} could not be started: {error.strerror}") from error
    lines = done.stdout.strip().splitlines()
    try:
        return PlanAnswer.model_validate_json(lines[-1] if lines else "")
    except ValidationError:
        said = done.stderr.strip().splitlines()[-1:] or ["it wrote nothing to stderr"]
        raise ProcessError(
            f"`{' '.join(command[1:])}` ended with code {done.returncode} and no answer: {said[0]}"
        ) from None


def _environ(volumes: Mapping[str, Path]) -> dict[str, str]:
    """Our own environment, with what claims stand for; the working folder is no place to import from."""
    paths = {claim: str(path) for claim, path in volumes.items()}
    return {**os.environ, VOLUMES_ENV: json.dumps(paths), "PYTHONSAFEPATH": "1"}


# --- the launchers


@dataclass
class Launcher:
    """One launcher's process, and where it leaves what."""

    index: int
    process: subprocess.Popen[bytes]
    log: Path
    report: Path
    forced: bool = False
    """It was ended because its time was over, so its end is no cause."""

    @property
    def lives(self) -> bool:
        """Whether it still runs; keeps its exit code when it does not."""
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL; its ranks die with it."""
        self.forced = True
        self.process.kill()
        self.process.wait()


def start(
    run: RunConfig,
    folder: Path,
    cpus: Sequence[Sequence[int]],
    volumes: Mapping[str, Path],
    lock: int,
    progress_port: int,
    command: Sequence[str] = LAUNCHER,
) -> list[Launcher]:
    """Write run.json and start one launcher per pod, each in a session of its own: Ctrl-C reaches us alone.

    Args:
        run: what to do.
        folder: the job's, locked.
        cpus: of each launcher.
        volumes: claim -> folder.
        lock: descriptor of the folder's lock, which the launchers keep held.
        progress_port: where rank 0 shall serve its progress.
        command: what a launcher is.
    """
    logs = workspace.prepare(folder, run)
    common = _environ(volumes) | {
        RUN_CONFIG_ENV: str(folder / RUN_CONFIG),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port(besides=progress_port)),
        PARENT_DEATH_ENV: str(os.getpid()),
    }
    launchers: list[Launcher] = []
    try:
        for index, part in enumerate(cpus):
            report = workspace.termination_file(folder, index)
            own = {
                COMPLETION_INDEX_ENV: str(index),
                CPUS_ENV: format_cpu_list(part),
                TERMINATION_LOG_ENV: str(report),
                # Only rank 0 serves; a port of another one would be a promise that nobody keeps.
                PROGRESS_PORT_ENV: str(progress_port) if index == 0 else "0",
            }
            log = logs / f"launcher-{index}.log"
            launchers.append(Launcher(index, _start(command, common | own, log, lock), log, report))
    except OSError as error:
        kill(launchers)
        raise ProcessError(f"launcher {len(launchers)} could not be started: {error}") from error
    return launchers


def _start(command: Sequence[str], environ: dict[str, str], log: Path, lock: int) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )


def free_port(besides: int = 0) -> int:
    """A port of the loopback interface that nobody listens on now, other than `besides`."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port != besides:
            return port


def kill(launchers: Sequence[Launcher]) -> None:
    """End those that still run, at once."""
    for launcher in launchers:
        if launcher.lives:
            launcher.kill()


# --- watching over them


@dataclass
class Stop:
    """Signals that asked us to stop. A handler itself."""

    signal: int | None = None
    """The first of them."""
    at: float | None = None
    """When it came, on the monotonic clock."""
    again: bool = False
    """There was another one: end at once."""

    def __call__(self, number: int, _: object = None) -> None:
        """A signal came."""
        if self.signal is None:
            self.signal, self.at = number, time.monotonic()
        else:
            self.again = True

    def listen(self) -> None:
        """Handle Ctrl-C, SIGTERM and the terminal's end."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self)


@dataclass(frozen=True)
class Limits:
    """Seconds that launchers may go on for."""

    grace: float
    """After we were asked to stop."""
    patience: float
    """After the first of them ended: their ranks' own heartbeats come first."""
    kill_delay: float = KILL_DELAY_SECONDS
    """After the patience ended and they were told to stop."""


def limits_of(run: RunConfig) -> Limits:
    """The limits of a run."""
    return Limits(
        grace=run.termination_grace_period_seconds + GRACE_MARGIN_SECONDS,
        patience=COLLATERAL_DELAY_SECONDS + run.distributed.timeout_seconds + PATIENCE_MARGIN_SECONDS,
    )


def action(
    now: float, stop: Stop, ended_at: float | None, limits: Limits
) -> Literal["wait", "terminate", "kill"]:
    """What the living launchers are due. Times are of one monotonic clock, in seconds; None: not yet."""
    patient_until = None if ended_at is None else ended_at + limits.patience
    out_of_grace = stop.at is not None and now >= stop.at + limits.grace
    out_of_patience = patient_until is not None and now >= patient_until
    if stop.again or out_of_grace or (patient_until is not None and now >= patient_until + limits.kill_delay):
        return "kill"
    return "terminate" if stop.at is not None or out_of_patience else "wait"


def watch(launchers: Sequence[Launcher], limits: Limits, stop: Stop, tick: Callable[[], None]) -> None:
    """Return when every launcher has ended, and see to it that it comes to that; `tick` is called meanwhile."""
    ended_at: float | None = None
    told = False
    while living := [launcher for launcher in launchers if launcher.lives]:
        if ended_at is None and len(living) < len(launchers):
            ended_at = time.monotonic()
        due = action(time.monotonic(), stop, ended_at, limits)
        if due == "terminate" and not told:
            told = True
            for launcher in living:
                launcher.forced = stop.at is None
                launcher.process.terminate()
        if due == "kill":
            kill(living)
        tick()
        time.sleep(POLL_SECONDS)


# --- after them


@dataclass(frozen=True)
class Outcome:
    """How the whole gang ended."""

    code: int
    """Folded from the launchers' codes."""
    cause: str
    log: Path
    """Of the launcher that tells the cause."""
    report: TerminationReport | None = None


def conclude(launchers: Sequence[Launcher]) -> Outcome:
    """One outcome for all: that of the launcher whose code names the cause best.

    One that we had to end tells no cause, unless no other does.
    """
    failed = [launcher for launcher in launchers if launcher.process.returncode != 0]
    telling = [launcher for launcher in failed if not launcher.forced] or failed or list(launchers)
    code = fold([launcher.process.returncode for launcher in telling])
    winner = next(launcher for launcher in telling if fold([launcher.process.returncode]) == code)
    report = workspace.read_termination(winner.report)
    cause = report.cause if report is not None else _cause(winner)
    return Outcome(code, cause, winner.log, report)


def _cause(launcher: Launcher) -> str:
    """What can be said of a launcher that left no report."""
    code = launcher.process.returncode
    if launcher.forced:
        return f"launcher {launcher.index} still ran when its time was over, and was killed"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        why = ": perhaps the machine ran out of memory" if -code == signal.SIGKILL else ""
        return f"launcher {launcher.index} died of {name}{why}"
    return (
        f"launcher {launcher.index} exited with code {code}: {last_lines(launcher.log) or 'it wrote nothing'}"
    )


def last_lines(log: Path, count: int = CAUSE_LINES) -> str:
    """The last lines of a log that are not blank."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 65_536))
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines()]
    return "\n".join([line for line in lines if line][-count:])


def sentence(code: int, cause: str) -> str:
    """A folded exit code and its cause: `invalid data: docs.jsonl: line 3: ...`."""
    if code in set(ExitCode) - {ExitCode.UNEXPECTED}:
        return f"{ExitCode(code).name.lower().replace('_', ' ')}: {cause}"
    return cause
