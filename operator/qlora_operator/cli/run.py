"""`qlora run`: a job on this machine, from its file to its adapter. `qlora fetch`: only what it needs for that."""

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from qlora_contract.cost import Price
from qlora_contract.exit_codes import COLLATERAL, PERMANENT, ExitCode
from qlora_contract.export import forms_of
from qlora_contract.job_folder import ADAPTER, EXPORTS, REPORT_PAGE, finished_report, is_exported, job_path
from qlora_contract.plan import Machine, too_few
from qlora_contract.progress import ProgressReport
from qlora_contract.remote import is_remote
from qlora_contract.run_config import IsaTier, ResolvedRevisions, RunConfig, RunStage, Training
from qlora_operator.api.pod_resources import stage_topology
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob, ignored_by_run
from qlora_operator.cli import job_folder, processes
from qlora_operator.cli.cpu_locks import CpuLocks, holder_text, lock_file
from qlora_operator.cli.display import Display, printable, result_lines
from qlora_operator.cli.log_tail import LogTail
from qlora_operator.cli.outcome import Outcome, error_message, summarize
from qlora_operator.cli.progress_client import fetch_progress
from qlora_operator.cli.supervision import StopRequest, limits_of, supervise
from qlora_operator.cli.trainer_query import compile_kernels, query_trainer
from qlora_operator.errors import CommandError
from qlora_operator.placement.local import (
    PlacementError,
    all_memory,
    choose_tier,
    idle_cpus,
    launcher_cpus,
    less_promised,
    memory_shortage,
    on_this_machine,
    promises,
    with_topology,
    without,
)

PROGRESS_SECONDS = 0.5
"""Between two looks at rank 0's progress."""
RESUME_HINT: dict[RunStage, str] = {
    "fetch": "run the same command again to continue from there",
    "train": "run the same command again to continue from the last checkpoint",
    "export": "run the same command again to make what is missing",
    "publish": "run the same command again to upload the adapter",
}
FIRST: dict[RunStage, str] = {
    "fetch": "Connecting",
    "train": "Importing",
    "export": "Importing",
    "publish": "Connecting",
}
"""What a stage's processes do before they can report."""
STOPPING: dict[RunStage, str] = {
    "fetch": "stopping ...",
    "train": "stopping after a checkpoint ... (press Ctrl-C again to stop immediately, without one)",
    "export": "stopping ...",
    "publish": "stopping ...",
}


def run(
    job: QLoRAJob,
    volumes: Mapping[str, Path],
    console: Console,
    *,
    verbose: bool = False,
    price: Price | None = None,
    launcher: Sequence[str] = processes.LAUNCHER,
) -> int:
    """Fetch what is remote, train, export, and upload the adapter. Returns 0, or 128 + a signal's number.

    Args:
        job: what to train.
        volumes: claim -> directory, for every claim of the job.
        console: where progress goes.
        verbose: show the ranks' own output, too.
        price: of a CPU's hour, for the report.
        launcher: command line of the process to start for each pod.

    Raises:
        CommandError: the job cannot be started here, or failed; with the exit code.
    """
    machine = query_trainer().machine
    assert machine is not None, "without arguments, the planner answers with the machine"
    isa = choose_tier(job.spec.isa.allowed, machine)
    check_room(job, machine)
    with _local_run(job, volumes, console, isa, verbose=verbose, price=price) as local:
        if ignored := ignored_by_run(job):
            local.display.print(f"ignored, because only the operator acts on it: {', '.join(ignored)}")
        if finished := local.is_finished():
            local.display.print(f"{job.metadata.name} is already finished")
        if not finished or local.lacks_exports():
            compile_kernels(local.display.print)
            with local.own_cpus(machine, "export" if finished else "train") as cpus:
                code = local.fetch() or (0 if finished else local.train(launcher, cpus))
                if code := code or local.export(launcher, cpus):
                    return code
        if code := local.publish():
            return code
        local.print_result()
        return 0


def check_room(job: QLoRAJob, machine: Machine) -> None:
    """Raise PlacementError where this machine has too few CPUs or too little memory, whatever else runs on it."""
    topology = on_this_machine(job.spec.topology, machine)
    launcher_cpus(topology, machine)
    if shortage := memory_shortage(topology, machine):
        raise PlacementError(shortage, ExitCode.INVALID_CONFIGURATION)


def say(console: Console, text: str | None) -> None:
    """Print a line as it is, if there is one."""
    if text:
        console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def result(folder: Path, code: int) -> dict[str, Any]:
    """What `qlora run -o json` prints of a job, by its folder and its exit code."""
    report = finished_report(folder)
    exports = folder / EXPORTS
    return {
        "name": folder.name,
        "folder": str(folder),
        "exitCode": code,
        "adapter": None if report is None else str(folder / ADAPTER),
        "exports": sorted(str(each) for each in exports.iterdir()) if report and exports.is_dir() else [],
        "report": report,
    }


def fetch_only(job: QLoRAJob, volumes: Mapping[str, Path], console: Console, *, verbose: bool = False) -> int:
    """Fetch what is remote, so that `qlora plan` can read it. Returns and raises as `run` does."""
    with _local_run(job, volumes, console, job.spec.isa.allowed[0], verbose=verbose) as local:
        if code := local.fetch():
            return code
        local.display.print(f"everything that {job.metadata.name} needs is in {local.folder.parent.parent}")
        return 0


@contextmanager
def _local_run(
    job: QLoRAJob,
    volumes: Mapping[str, Path],
    console: Console,
    isa: IsaTier,
    *,
    verbose: bool,
    price: Price | None = None,
) -> Iterator["LocalRun"]:
    """The job with its folder, which is locked meanwhile, and signals handled."""
    folder = job_path(job.spec.workspace, job.metadata.name, volumes).absolute()
    stop = StopRequest()
    stop.listen()
    with job_folder.locked(folder) as lock:
        display = Display(console, job.metadata.name)
        yield LocalRun(job, isa, folder, volumes, lock, stop, display, verbose, price)


@dataclass
class LocalRun:
    """A job on this machine. Each stage returns 0 to continue, or the code to exit with."""

    job: QLoRAJob
    isa: IsaTier
    folder: Path
    volumes: Mapping[str, Path]
    lock: IO[str]
    stop: StopRequest
    display: Display
    verbose: bool
    price: Price | None = None
    fetched: ResolvedRevisions = field(default_factory=ResolvedRevisions)
    cpu_locks: CpuLocks | None = None
    """What holds the job's CPUs, once it has some."""
    data_said: bool = False
    few_steps_said: bool = False

    @contextmanager
    def own_cpus(self, machine: Machine, stage: RunStage) -> Iterator[list[list[int]]]:
        """The CPUs of each launcher of a stage and those after it, which no other `qlora run` takes meanwhile; nor does
        one take the memory.

        Raises:
            PlacementError: other jobs leave too few CPUs, and pinning is strict, or too little memory.
        """
        written = stage_topology(self.job.spec.topology, stage)
        with ExitStack() as held:
            try:
                locks = CpuLocks(lock_file())
            except OSError as error:
                self.display.print(f"CPUs are not kept from other jobs: {lock_file()}: {error.strerror}")
                topology, busy = on_this_machine(written, machine), {}
                cpus = launcher_cpus(topology, machine)
            else:
                held.callback(locks.close)
                with locks.choosing():
                    busy, promised = locks.busy(machine.cpus), locks.promised_memory()
                    topology = on_this_machine(written, less_promised(without(machine, busy), promised))
                    cpus = launcher_cpus(topology, machine, busy)
                    if shortage := memory_shortage(topology, machine, promised):
                        raise PlacementError(shortage, ExitCode.INVALID_CONFIGURATION)
                    holder = holder_text(self.job.metadata.name)
                    locks.take({cpu for part in cpus for cpu in part}, holder)
                    locks.promise_memory(all_memory(topology), holder)
                self.cpu_locks = locks
                for note in promises(promised):
                    self.display.print(note)
            for note in idle_cpus(topology, machine, cpus, busy):
                self.display.print(note)
            self.job = with_topology(self.job, topology)
            yield cpus
            self.cpu_locks = None

    def next_config(self, stage: RunStage) -> RunConfig:
        """The RunConfig of the next attempt."""
        uid, attempt = job_folder.next_attempt(self.folder)
        return to_run_config(
            self.job, uid=uid, attempt=attempt, isa=self.isa, stage=stage, fetched=self.fetched
        )

    def is_finished(self) -> bool:
        """Whether this very job is done. Raises WorkspaceError when the folder belongs to another spec."""
        ours = job_folder.belongs_to(self.folder, self.next_config("train"))
        return ours and finished_report(self.folder) is not None

    def lacks_exports(self) -> bool:
        """Whether something that output.formats asks for was not made of the finished adapter yet."""
        report = finished_report(self.folder) or {}
        forms = forms_of(self.next_config("train").output)
        return not all(
            is_exported(self.folder / EXPORTS / form, str(report.get("adapter_sha256"))) for form in forms
        )

    def fetch(self) -> int:
        """Fetch remote sources into the workspace."""
        if not any(is_remote(source.uri) for source in self.job.spec.sources):
            return 0
        outcome = self._run_stage(self.next_config("fetch"), processes.TRANSFER, _any_cpus())
        report = outcome.report
        if outcome.code == ExitCode.DONE and report is not None and report.fetched is not None:
            self.fetched = report.fetched
            self.display.print(report.cause)
        return self._exit_code(outcome, "fetch")

    def train(self, launcher: Sequence[str], cpus: Sequence[Sequence[int]]) -> int:
        """Train the adapter."""
        if code := self._stopped_before("train"):
            return code
        outcome = self._run_stage(self.next_config("train"), launcher, cpus)
        if outcome.code == ExitCode.DONE and finished_report(self.folder) is None:
            raise CommandError(
                f"training ended without an error, but {self.folder} has no complete adapter; see {outcome.log}"
            )
        return self._exit_code(outcome, "train")

    def export(self, launcher: Sequence[str], cpus: Sequence[Sequence[int]]) -> int:
        """Make of the adapter what output.formats asks for."""
        if not self.lacks_exports():
            return 0
        if code := self._stopped_before("export"):
            return code
        return self._exit_code(self._run_stage(self.next_config("export"), launcher, cpus[:1]), "export")

    def publish(self) -> int:
        """Upload the adapter to its destination, if it has one."""
        if self.job.spec.output.destination is None:
            return 0
        if code := self._stopped_before("publish"):
            return code
        outcome = self._run_stage(self.next_config("publish"), processes.TRANSFER, _any_cpus())
        if outcome.code == ExitCode.DONE and outcome.report is not None:
            self.display.print(f"published  {outcome.report.published_uri}")
        return self._exit_code(outcome, "publish")

    def print_result(self) -> None:
        """Show what a finished job has achieved."""
        report = finished_report(self.folder)
        assert report is not None, "asked only of a finished job"
        for line in result_lines(report, self.folder / ADAPTER):
            self.display.print(line)
        if (page := self.folder / REPORT_PAGE).exists():
            self.display.print(f"report     {page}")
        for form in forms_of(self.next_config("train").output):
            self.display.print(f"exported   {self.folder / EXPORTS / form}")

    def _stopped_before(self, stage: RunStage) -> int:
        """The code to exit with when a signal came too late for the stage before; else 0."""
        if self.stop.signal is None:
            return 0
        self.display.print(f"stopped; {RESUME_HINT[stage]}")
        return 128 + self.stop.signal

    def _run_stage(self, config: RunConfig, command: Sequence[str], cpus: Sequence[Sequence[int]]) -> Outcome:
        """Start a stage's processes, and show progress until all have ended."""
        port = processes.free_port()
        locks = [self.lock.fileno()]
        if self.cpu_locks is not None:
            locks.append(self.cpu_locks.fileno())
        launchers = processes.start(config, self.folder, cpus, self.volumes, locks, port, command, self.price)
        limits = limits_of(config)
        tails = [LogTail(launcher.log) for launcher in launchers] if self.verbose else []
        next_look, announced = 0.0, False
        try:
            with self.display.starting(FIRST[config.stage]):
                for _ in supervise(launchers, limits, self.stop):
                    if self.stop.signal is not None and not announced:
                        announced = True
                        self.display.print(STOPPING[config.stage])
                    self._print_logs(tails)
                    if time.monotonic() >= next_look:
                        report = fetch_progress(port, config.job.uid, config.job.attempt)
                        self.display.show(report)
                        self._say_of_data(report, config.training)
                        next_look = time.monotonic() + PROGRESS_SECONDS
                self._print_logs(tails)
        except BaseException:
            # Nothing can be shown any more; perhaps the terminal is gone. The ranks still get to save their work.
            if self.stop.signal is None:
                self.stop(signal.SIGTERM)
            for _ in supervise(launchers, limits, self.stop):
                pass
            raise
        return summarize(launchers)

    def _say_of_data(self, report: ProgressReport | None, training: Training) -> None:
        """Say once what the data are and what of them is not learned; and that the steps that they make are too few."""
        if report is not None and report.data is not None and not self.data_said:
            self.data_said = True
            self.display.print(report.data)
        if self.few_steps_said or report is None or report.total_steps == 0:
            return
        if few := too_few(report.total_steps, training):
            self.few_steps_said = True
            self.display.print(f"{few}; `qlora plan` says what makes more of them")

    def _print_logs(self, tails: Sequence[LogTail]) -> None:
        for tail in tails:
            for line in tail.new_lines():
                self.display.print(line)

    def _exit_code(self, outcome: Outcome, stage: RunStage) -> int:
        """0 to continue, or the code to exit with because we were asked to stop.

        Raises:
            CommandError: the stage failed. A permanent failure counts as such even while stopping.
        """
        if outcome.code == ExitCode.DONE:
            return 0
        permanent = outcome.code in PERMANENT
        if self.stop.signal is not None and not permanent:
            at_once = self.stop.forced or outcome.report is None or outcome.code in COLLATERAL
            how = "stopped immediately" if at_once else f"stopped: {outcome.cause}"
            self.display.print(f"{how}; {RESUME_HINT[stage]}")
            return 128 + self.stop.signal
        message = f"{error_message(outcome.code, outcome.cause)}\nFull log: {outcome.log}"
        if not permanent:
            message += f"\n{RESUME_HINT[stage][0].upper()}{RESUME_HINT[stage][1:]}."
        raise CommandError(message, outcome.code)


def _any_cpus() -> list[list[int]]:
    """For the one process of a transfer, which mostly waits for the network."""
    return [sorted(os.sched_getaffinity(0))]
