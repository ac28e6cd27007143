"""`qlora run`: a job on this machine, from its file to its adapter."""

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora_contract import places
from qlora_contract.exit_codes import COLLATERAL, PERMANENT, ExitCode
from qlora_contract.run import RunConfig
from qlora_operator import processes, workspace
from qlora_operator.api.types import QLoRAJob, ignored_by_run
from qlora_operator.desired.run_config import run_config
from qlora_operator.display import Display, fetch, result_lines
from qlora_operator.errors import CommandError
from qlora_operator.placement.local import choose_tier, launcher_cpus
from qlora_operator.processes import Launcher, Outcome, Stop

FETCH_EVERY_SECONDS = 0.5
GO_ON = "run the same command again to go on from the last checkpoint"


def run(
    job: QLoRAJob,
    volumes: Mapping[str, Path],
    console: Console,
    *,
    verbose: bool = False,
    launcher: Sequence[str] = processes.LAUNCHER,
) -> int:
    """Train the job here and return the exit code: 0, its ranks' folded code, or 128 + a signal's number.

    Args:
        job: what to train.
        volumes: claim -> folder, for every claim of the job.
        console: where progress goes.
        verbose: also pass the ranks' own output on.
        launcher: what is started for each pod.

    Raises:
        CommandError: the job cannot be started here, or failed; with the exit code.
    """
    machine = processes.ask_trainer().machine
    assert machine is not None, "the planner without arguments tells of the machine"
    isa = choose_tier(job.spec.isa.allowed, machine)
    cpus = launcher_cpus(job.spec.topology, machine)
    folder = places.job_folder(job.spec.workspace, job.metadata.name, dict(volumes)).absolute()
    stop = Stop()
    stop.listen()
    display = Display(console, job.metadata.name)
    if ignored := ignored_by_run(job):
        display.say(f"ignored, since only the operator knows what to do with them: {', '.join(ignored)}")
    with workspace.locked(folder) as lock:
        uid, attempt = workspace.next_attempt(folder)
        config = run_config(job, uid=uid, attempt=attempt, isa=isa)
        if workspace.check_identity(folder, config) and (report := workspace.finished(folder)):
            display.say(f"{job.metadata.name} is done already")
            return _succeeded(display, folder, report)
        port = processes.free_port()
        launchers = processes.start(config, folder, cpus, volumes, lock.fileno(), port, launcher)
        try:
            with display:
                _follow(config, launchers, port, stop, display, verbose=verbose)
        except BaseException:
            _save_and_end(config, launchers, stop)
            raise
        return _ended(processes.conclude(launchers), stop, display, folder)


def _follow(
    config: RunConfig, launchers: list[Launcher], port: int, stop: Stop, display: Display, *, verbose: bool
) -> None:
    """Show progress until the launchers have ended."""
    tails = [_Tail(launcher.log) for launcher in launchers] if verbose else []
    due = 0.0
    told = False

    def tick() -> None:
        nonlocal due, told
        if stop.signal is not None and not told:
            told = True
            display.say("stopping after a checkpoint ... (once more: at once, without one)")
        for tail in tails:
            tail.pass_on(display)
        if time.monotonic() >= due:
            display.show(fetch(port, config.job.uid, config.job.attempt))
            due = time.monotonic() + FETCH_EVERY_SECONDS

    processes.watch(launchers, processes.limits_of(config), stop, tick)
    for tail in tails:
        tail.pass_on(display)


def _save_and_end(config: RunConfig, launchers: list[Launcher], stop: Stop) -> None:
    """We cannot go on, with nobody to tell (the terminal may be gone): the ranks still get to save their work."""
    if stop.signal is None:
        stop(signal.SIGTERM)
    processes.watch(launchers, processes.limits_of(config), stop, lambda: None)


class _Tail:
    """What is new in a log, in whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def pass_on(self, display: Display) -> None:
        """Say the lines that have come since the last time."""
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self._offset += len(whole + newline)
        for line in whole.splitlines():
            display.say(line.decode(errors="replace"))


def _ended(outcome: Outcome, stop: Stop, display: Display, folder: Path) -> int:
    """Say how it ended; the command's exit code."""
    if outcome.code == ExitCode.DONE:
        report = workspace.finished(folder)
        if report is None:
            raise CommandError(
                f"the ranks ended well, but {folder} holds no whole adapter; see {outcome.log}"
            )
        return _succeeded(display, folder, report)
    if stop.signal is not None and outcome.code not in PERMANENT:
        display.say(_stopped(outcome, stop))
        return 128 + stop.signal
    hint = "" if outcome.code in PERMANENT else f"\n{GO_ON[0].upper()}{GO_ON[1:]}."
    raise CommandError(
        f"{processes.sentence(outcome.code, outcome.cause)}\nThe whole log: {outcome.log}{hint}", outcome.code
    )


def _stopped(outcome: Outcome, stop: Stop) -> str:
    if stop.again or outcome.report is None or outcome.code in COLLATERAL:
        return f"stopped at once; {GO_ON}"
    return f"stopped: {outcome.cause}; {GO_ON}"


def _succeeded(display: Display, folder: Path, report: Mapping[str, Any]) -> int:
    for line in result_lines(dict(report), folder / places.ADAPTER):
        display.say(line)
    return 0
