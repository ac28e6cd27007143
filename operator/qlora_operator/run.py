"""`qlora run`: a job on this machine, from its file to its adapter. `qlora fetch`: only what it needs for that."""

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from qlora_contract import places
from qlora_contract.exit_codes import COLLATERAL, PERMANENT, ExitCode
from qlora_contract.remote import is_remote
from qlora_contract.run import Fetched, IsaTier, RunConfig, RunStage
from qlora_operator import processes, workspace
from qlora_operator.api.types import QLoRAJob, ignored_by_run
from qlora_operator.desired.run_config import NOTHING_FETCHED, run_config
from qlora_operator.display import Display, fetch, result_lines
from qlora_operator.errors import CommandError
from qlora_operator.placement.local import choose_tier, launcher_cpus
from qlora_operator.processes import Launcher, Outcome, Stop

SHOW_EVERY_SECONDS = 0.5
GO_ON: dict[RunStage, str] = {
    "fetch": "run the same command again to go on from there",
    "train": "run the same command again to go on from the last checkpoint",
    "publish": "run the same command again to send it",
}
STOPPING: dict[RunStage, str] = {
    "fetch": "stopping ...",
    "train": "stopping after a checkpoint ... (once more: at once, without one)",
    "publish": "stopping ...",
}


def run(
    job: QLoRAJob,
    volumes: Mapping[str, Path],
    console: Console,
    *,
    verbose: bool = False,
    launcher: Sequence[str] = processes.LAUNCHER,
) -> int:
    """Fetch what is remote, train, send the adapter where it shall go. Returns 0, or 128 + a signal's number.

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
    with _opened(job, volumes, console, isa) as here:
        if ignored := ignored_by_run(job):
            only = "ignored, since only the operator knows what to do with them"
            here.display.say(f"{only}: {', '.join(ignored)}")
        if here.finished():
            here.display.say(f"{job.metadata.name} is done already")
        else:
            if code := here.fetch(verbose=verbose) or here.train(launcher, cpus, verbose=verbose):
                return code
        if code := here.publish(verbose=verbose):
            return code
        return here.tell_result()


def fetch_only(job: QLoRAJob, volumes: Mapping[str, Path], console: Console, *, verbose: bool = False) -> int:
    """Fetch what is remote, so that `qlora plan` can look at it. Returns and raises as `run` does."""
    with _opened(job, volumes, console, job.spec.isa.allowed[0]) as here:
        if code := here.fetch(verbose=verbose):
            return code
        here.display.say(f"{job.metadata.name} has all that it needs in {here.folder.parent.parent}")
        return 0


@contextmanager
def _opened(job: QLoRAJob, volumes: Mapping[str, Path], console: Console, isa: IsaTier) -> Iterator["_Here"]:
    """The job in its folder, which is locked meanwhile."""
    folder = places.job_folder(job.spec.workspace, job.metadata.name, dict(volumes)).absolute()
    stop = Stop()
    stop.listen()
    with workspace.locked(folder) as lock:
        yield _Here(job, isa, folder, volumes, lock, stop, Display(console, job.metadata.name))


@dataclass
class _Here:
    """A job in its folder on this machine."""

    job: QLoRAJob
    isa: IsaTier
    folder: Path
    volumes: Mapping[str, Path]
    lock: IO[str]
    stop: Stop
    display: Display
    fetched: Fetched = field(default_factory=Fetched)

    def config(self, stage: RunStage, fetched: Fetched = NOTHING_FETCHED) -> RunConfig:
        """The next attempt."""
        uid, attempt = workspace.next_attempt(self.folder)
        return run_config(self.job, uid=uid, attempt=attempt, isa=self.isa, stage=stage, fetched=fetched)

    def finished(self) -> bool:
        """Whether this very job is done. Raises WorkspaceError when the folder is another job's."""
        mine = workspace.check_identity(self.folder, self.config("train"))
        return mine and workspace.finished(self.folder) is not None

    def fetch(self, *, verbose: bool) -> int:
        """Fetch remote sources; 0, or the code to end with."""
        if not any(is_remote(uri) for uri in (self.job.spec.model.source, self.job.spec.dataset.source)):
            return 0
        outcome = self._do(self.config("fetch"), processes.TRANSFER, _any_cpus(), verbose=verbose)
        if (
            outcome.code == ExitCode.DONE
            and outcome.report is not None
            and outcome.report.fetched is not None
        ):
            self.fetched = outcome.report.fetched
            self.display.say(outcome.report.cause)
        return self._code(outcome, "fetch")

    def train(self, launcher: Sequence[str], cpus: Sequence[Sequence[int]], *, verbose: bool) -> int:
        """Train; 0, or the code to end with."""
        if code := self._asked_to_stop("train"):
            return code
        outcome = self._do(self.config("train", self.fetched), launcher, cpus, verbose=verbose)
        if outcome.code == ExitCode.DONE and workspace.finished(self.folder) is None:
            raise CommandError(
                f"the ranks ended well, but {self.folder} holds no whole adapter; see {outcome.log}"
            )
        return self._code(outcome, "train")

    def publish(self, *, verbose: bool) -> int:
        """Send the adapter to its destination, if it has one; 0, or the code to end with."""
        if self.job.spec.output.destination is None:
            return 0
        if code := self._asked_to_stop("publish"):
            return code
        outcome = self._do(self.config("publish"), processes.TRANSFER, _any_cpus(), verbose=verbose)
        if outcome.code == ExitCode.DONE and outcome.report is not None:
            self.display.say(f"published  {outcome.report.published_uri}")
        return self._code(outcome, "publish")

    def _asked_to_stop(self, stage: RunStage) -> int:
        """The code to end with before a stage, when a signal came too late for the one before it; else 0."""
        if self.stop.signal is None:
            return 0
        self.display.say(f"stopped; {GO_ON[stage]}")
        return 128 + self.stop.signal

    def _do(
        self, config: RunConfig, command: Sequence[str], cpus: Sequence[Sequence[int]], *, verbose: bool
    ) -> Outcome:
        """Start a stage's processes and see them end."""
        port = processes.free_port()
        launchers = processes.start(
            config, self.folder, cpus, self.volumes, self.lock.fileno(), port, command
        )
        try:
            with self.display:
                _follow(config, launchers, port, self.stop, self.display, verbose=verbose)
        except BaseException:
            _save_and_end(config, launchers, self.stop)
            raise
        return processes.conclude(launchers)

    def _code(self, outcome: Outcome, stage: RunStage) -> int:
        """0 to go on, or the code to end with because we were asked to. Raises CommandError for a failure."""
        if outcome.code == ExitCode.DONE:
            return 0
        if self.stop.signal is not None and outcome.code not in PERMANENT:
            self.display.say(_stopped(outcome, self.stop, stage))
            return 128 + self.stop.signal
        hint = "" if outcome.code in PERMANENT else f"\n{GO_ON[stage][0].upper()}{GO_ON[stage][1:]}."
        cause = processes.sentence(outcome.code, outcome.cause)
        raise CommandError(f"{cause}\nThe whole log: {outcome.log}{hint}", outcome.code)

    def tell_result(self) -> int:
        """Say what was achieved."""
        report: Mapping[str, Any] | None = workspace.finished(self.folder)
        assert report is not None, "asked only of a job that is done"
        for line in result_lines(dict(report), self.folder / places.ADAPTER):
            self.display.say(line)
        return 0


def _any_cpus() -> list[list[int]]:
    """For one process that waits for the network."""
    return [sorted(os.sched_getaffinity(0))]


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
            display.say(STOPPING[config.stage])
        for tail in tails:
            tail.pass_on(display)
        if time.monotonic() >= due:
            display.show(fetch(port, config.job.uid, config.job.attempt))
            due = time.monotonic() + SHOW_EVERY_SECONDS

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


def _stopped(outcome: Outcome, stop: Stop, stage: RunStage) -> str:
    if stop.again or outcome.report is None or outcome.code in COLLATERAL:
        return f"stopped at once; {GO_ON[stage]}"
    return f"stopped: {outcome.cause}; {GO_ON[stage]}"
