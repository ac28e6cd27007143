"""What a job's output.formats asks for, made once its adapter is finished: by a process that the one rank of the stage
`export` starts."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from qlora_contract import entry_points
from qlora_contract.exit_codes import ExitCode
from qlora_contract.export import ExportForm, ExportRequest, export_events, forms_of
from qlora_contract.files import read_json
from qlora_contract.job_folder import EXPORT_REPORT, EXPORTS, TRAINING_REPORT, is_exported
from qlora_contract.paths import resolve
from qlora_contract.plan import PlanError
from qlora_contract.run_config import Adapter
from qlora_trainer.errors import ModelError, Terminated, TrainerError
from qlora_trainer.host.process import processor_seconds
from qlora_trainer.storage.atomic import write_atomically
from qlora_trainer.telemetry.progress import Progress
from qlora_trainer.training.context import RankContext

log = logging.getLogger(__name__)

EXPORTER = (sys.executable, "-m", entry_points.EXPORT)
POLL_SECONDS = 1.0
"""Between two looks whether the export is done, or to be stopped."""


def check(forms: Sequence[ExportForm], model: Path, adapter: Adapter) -> None:
    """Raise ModelError, before anything is trained, when model or adapter cannot take one of the forms."""
    if forms:
        from qlora_trainer.modeling.families import EXPERTS

        if on_experts := [target for target in adapter.target_modules if EXPERTS in target.split(".")]:
            raise ModelError(
                f"output.formats has {forms[0].partition('-')[0]}, which has no place for adapters on experts: leave "
                f"it out, or {on_experts[0]} of adapter.targetModules"
            )
        from qlora_trainer.export.exporting import check_forms

        check_forms(forms, model)


def space(forms: Sequence[ExportForm], model: Path) -> int:
    """About how many bytes of the workspace the forms will take."""
    if not forms:
        return 0
    from qlora_trainer.export.exporting import bytes_needed

    return bytes_needed(forms, model)


def export(context: RankContext, command: Sequence[str] = EXPORTER) -> None:
    """Make of the finished adapter what is not made of it yet.

    Args:
        context: of the only rank; its job is finished.
        command: the exporter's command line.

    Raises:
        Terminated: the rank was asked to stop; what is finished stays.
        TrainerError: an export failed. The adapter stays.
    """
    forms = _missing(context)
    if not forms:
        return
    context.progress.update(stage="Publishing")
    process = Exporter(command, _request(context, forms), context.progress)
    try:
        while process.runs(POLL_SECONDS):
            if process.worked():
                context.progress.advance(0)
            if context.stop.is_set():
                raise Terminated(
                    "asked to stop while exporting; the adapter is finished, and what was exported is kept"
                )
    finally:
        process.stop()
    context.progress.begin(None)
    failure = process.failure()
    if failure is not None:
        error = TrainerError(
            f"{failure.cause}; the adapter is finished, and stays in {context.folder.adapter}"
        )
        error.exit_code, error.agreed = ExitCode(failure.code), True
        raise error
    report(context)


def _missing(context: RankContext) -> list[ExportForm]:
    """The forms that the job asks for and does not have."""
    forms = forms_of(context.run.output)
    if not forms:
        return []
    digest, folder = context.folder.report()["adapter_sha256"], context.folder.path / EXPORTS
    return [form for form in forms if not is_exported(folder / form, digest)]


def _request(context: RankContext, forms: Sequence[ExportForm]) -> ExportRequest:
    provenance = context.folder.report().get("provenance", {})
    return ExportRequest(
        name=context.run.job.name,
        model=str(resolve(context.run.model_uri, context.volumes)),
        adapter=str(context.folder.adapter),
        output=str(context.folder.path / EXPORTS),
        forms=list(forms),
        weights_sha256=provenance.get("weights_sha256") or None,
        run=context.run,
        job_folder=str(context.folder.path),
    )


def report(context: RankContext) -> None:
    """Tell in training_report.json how each export compares with the trained model."""
    folder = context.folder.path / EXPORTS
    reports = {form: read_json(folder / form / EXPORT_REPORT) for form in forms_of(context.run.output)}
    whole = {**context.folder.report(), "exports": reports, "cost": context.books.cost()}
    context.folder.check_fence()
    write_atomically(context.folder.path / TRAINING_REPORT, json.dumps(whole, indent=1))
    for form, made in reports.items():
        log.info("exported %s: KL divergence %.2g nats", folder / form, made["proof"]["kl_divergence"])


class Exporter:
    """The exporting process, and a thread that carries what it tells into the live report.

    Args:
        command: its command line.
        request: what it is asked.
        progress: of the live report.
    """

    def __init__(self, command: Sequence[str], request: ExportRequest, progress: Progress) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(request.model_dump_json(by_alias=True))
        self._process.stdin.close()
        self._error: PlanError | None = None
        self._processor_seconds = 0.0
        self._listener = threading.Thread(
            target=self._listen, args=(self._process.stdout, progress), daemon=True
        )
        self._listener.start()

    def _listen(self, lines: IO[str], progress: Progress) -> None:
        with lines:
            for event in export_events(lines):
                if event.work is not None:
                    progress.begin(event.work)
                if event.advanced is not None:
                    progress.advance(event.advanced)
                if event.error is not None:
                    self._error = event.error

    def worked(self) -> bool:
        """Whether it took processor time since this was asked last."""
        before, self._processor_seconds = self._processor_seconds, processor_seconds(self._process.pid)
        return self._processor_seconds != before

    def runs(self, seconds: float) -> bool:
        """Whether it still runs after so many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def stop(self) -> None:
        """End it, if it still runs: it removes what is not finished."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        self._listener.join()

    def failure(self) -> PlanError | None:
        """Why it ended early; None if it did not."""
        code = self._process.returncode
        if code == 0:
            return None
        if self._error is not None and self._error.code in set(ExitCode):
            return self._error
        hint = "; the machine, or the pod, may have run out of memory" if code == -9 else ""
        return PlanError(
            code=int(ExitCode.UNEXPECTED), cause=f"the exporting process ended with code {code}{hint}"
        )
