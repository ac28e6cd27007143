"""`qlora export`: what is made of a finished job's adapter, by a process of the trainer's."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from qlora_contract import entry_points
from qlora_contract.exit_codes import ExitCode
from qlora_contract.export import ExportForm, ExportRequest, export_events
from qlora_contract.files import read_json
from qlora_contract.job_folder import ADAPTER, EXPORT_REPORT, EXPORTS, finished_report
from qlora_contract.paths import InvalidUriError, resolve
from qlora_contract.plan import PlanError
from qlora_contract.progress import ProgressReport, Work
from qlora_contract.remote import fetched_uri, is_remote, parse_remote
from qlora_contract.units import now
from qlora_operator.cli import job_folder, report
from qlora_operator.cli.display import Display
from qlora_operator.cli.outcome import error_message
from qlora_operator.cli.processes import OFFLINE, ProcessError, environment
from qlora_operator.cli.supervision import POLL_SECONDS, StopRequest
from qlora_operator.errors import CommandError

EXPORTER = (sys.executable, "-m", entry_points.EXPORT)


def export(
    folder: Path,
    forms: Sequence[ExportForm],
    volumes: Mapping[str, Path],
    console: Console,
    *,
    model: Path | None = None,
    output: Path | None = None,
    command: Sequence[str] = EXPORTER,
) -> int:
    """Make the forms that are not there yet. Returns 0, or 128 + the number of the signal that ended it.

    Args:
        folder: the job's.
        forms: what to make.
        volumes: claim -> directory.
        console: where progress goes.
        model: the base model's folder; None: as the job's report says.
        output: gets a folder of each form; None: `exports` of the job's folder, which is locked meanwhile.
        command: the exporter's command line.

    Raises:
        CommandError: the job is not finished, its base model is not found, or the export failed; with the exit code.
    """
    facts = finished_report(folder)
    if facts is None:
        raise CommandError(f"{folder} has no complete adapter: run the job to its end first")
    request = ExportRequest(
        name=folder.name,
        model=str((model or base_model(folder, facts, volumes)).absolute()),
        adapter=str(folder / ADAPTER),
        output=str((output or folder / EXPORTS).absolute()),
        forms=list(forms),
        weights_sha256=facts.get("provenance", {}).get("weights_sha256") or None,
    )
    stop = StopRequest()
    stop.listen()
    with _writable(folder, locked=output is None):
        failure = _run(request, volumes, Display(console, folder.name), stop, command)
    if failure is not None and stop.signal is not None:
        print_line(console, "stopped; run the same command again to make what is missing")
        return 128 + stop.signal
    if failure is not None:
        raise CommandError(error_message(failure.code, failure.cause), failure.code)
    for form in forms:
        print_line(
            console, f"exported   {Path(request.output) / form}{_distance(Path(request.output) / form)}"
        )
    if output is None:
        try:
            print_line(console, f"report     {report.write(folder, None)}")
        except CommandError as error:  # what was exported is there all the same
            print_line(console, f"the report was not written: {error}")
    return 0


def print_line(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _writable(folder: Path, *, locked: bool) -> Iterator[None]:
    if not locked:
        yield
        return
    with job_folder.locked(folder):
        yield


def base_model(folder: Path, report: Mapping[str, Any], volumes: Mapping[str, Path]) -> Path:
    """The folder of the model that a job was trained on.

    Args:
        folder: the job's, `jobs/<name>` of its workspace, which also holds what was fetched.
        report: training_report.json.
        volumes: claim -> directory.

    Raises:
        CommandError: it is not known, or on a claim without a directory.
    """
    try:
        source, revision = report["provenance"]["model_source"], report["provenance"]["model_revision"]
        if is_remote(source):
            uri = fetched_uri("pvc://workspace", parse_remote(source), revision)
            return resolve(uri, {"workspace": folder.parent.parent})
        # Without any, `resolve` would look where pods have them.
        return resolve(source, volumes or {"no claim": folder})
    except (KeyError, TypeError, InvalidUriError) as error:
        raise CommandError(
            f"the base model of {folder} is not found ({error}): give its folder with --model, or the directory of "
            "its claim with --volume"
        ) from error


def _run(
    request: ExportRequest,
    volumes: Mapping[str, Path],
    display: Display,
    stop: StopRequest,
    command: Sequence[str],
) -> PlanError | None:
    """Run the exporter and show its progress; why it failed, or None."""
    try:
        process = subprocess.Popen(
            command,
            env=environment(volumes) | OFFLINE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise ProcessError(f"{command[0]} could not be started: {error.strerror}") from error
    assert process.stdin is not None
    assert process.stdout is not None
    told = _Told()
    listener = threading.Thread(target=told.listen, args=(process.stdout,), daemon=True)
    listener.start()
    try:
        with display:
            process.stdin.write(request.model_dump_json(by_alias=True))
            process.stdin.close()
            while process.poll() is None:
                if stop.signal is not None:
                    process.terminate()
                display.show(told.progress())
                time.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
        listener.join()
    if process.returncode == 0:
        return None
    cause = f"the exporting process ended with code {process.returncode}"
    return told.error or PlanError(code=int(ExitCode.UNEXPECTED), cause=cause)


class _Told:
    """What the exporter has told so far."""

    def __init__(self) -> None:
        self.error: PlanError | None = None
        self._work: Work | None = None
        self._done = 0

    def listen(self, lines: IO[str]) -> None:
        """Read its events to the end."""
        with lines:
            for event in export_events(lines):
                if event.work is not None:
                    self._work, self._done = event.work, 0
                self._done += event.advanced or 0
                self.error = event.error or self.error

    def progress(self) -> ProgressReport | None:
        """For the display; None before anything is begun."""
        if self._work is None:
            return None
        work = self._work.model_copy(update={"done": self._done})
        return ProgressReport(
            job_uid="",
            attempt=0,
            stage="Publishing",
            step=0,
            total_steps=0,
            epoch=0.0,
            updated_time=now(),
            work=work,
        )


def _distance(folder: Path) -> str:
    """How far an export is the trained model, from its report."""
    try:
        proof = read_json(folder / EXPORT_REPORT)["proof"]
        return (
            f": KL divergence {proof['kl_divergence']:.2g} nats (base {proof['base_kl_divergence']:.2g}), "
            f"the same next token {proof['greedy_agreement']:.0%} of the time"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ""
