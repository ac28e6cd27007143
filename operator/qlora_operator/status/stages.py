"""The stages of a job: remote sources are fetched, the ranks train, the adapter is exported, and it is sent to
its destination.

Each stage is an attempt of its own, so that whatever holds for attempts (never two at a time, budgets, lost
nodes, suspension) holds for transfers as well.
"""

from qlora_contract.progress import ProgressReport
from qlora_contract.remote import is_remote
from qlora_contract.run_config import ResolvedRevisions, RunStage
from qlora_contract.units import format_bytes_done
from qlora_operator.api.names import Reason
from qlora_operator.api.run_config import export_forms
from qlora_operator.api.status import Provenance, QLoRAJobStatus
from qlora_operator.api.v1alpha1 import QLoRAJobSpec


def next_stage(spec: QLoRAJobSpec, status: QLoRAJobStatus) -> RunStage:
    """What a job that is not finished does next."""
    known = fetched(status)
    if any(is_remote(source.uri) and known.of(source) is None for source in spec.sources):
        return "fetch"
    if status.adapter is None:
        return "train"
    return "publish" if {*export_forms(spec)} <= {*(status.adapter.exports or ())} else "export"


def current_stage(spec: QLoRAJobSpec, status: QLoRAJobStatus) -> RunStage:
    """What the open attempt does, if it has no reason to end yet; else what the next one will."""
    last = status.attempts[-1] if status.attempts else None
    return next_stage(spec, status) if last is None or last.reason is not None else last.stage


def fetched(status: QLoRAJobStatus) -> ResolvedRevisions:
    """The revisions of the remote sources, as far as they are known."""
    known = status.provenance or Provenance()
    return ResolvedRevisions(
        model=known.model_revision,
        dataset=known.dataset_revision,
        sources=known.dataset_revisions,
        adapter=known.initial_adapter_revision,
    )


def describe(spec: QLoRAJobSpec, stage: RunStage) -> str:
    """What an attempt does, as a phrase that follows its number."""
    if stage == "fetch":
        first, *others = [source.uri for source in spec.sources if is_remote(source.uri)]
        if len(others) > 1:
            return f"fetches {first} and {len(others)} more sources"
        return f"fetches {' and '.join([first, *others])}"
    if stage == "export":
        return f"makes {', '.join(export_forms(spec))} of the adapter"
    return "starts" if stage == "train" else f"sends the adapter to {spec.output.destination}"


RUNNING: dict[RunStage, Reason] = {
    "fetch": Reason.FETCHING,
    "train": Reason.LOADING,
    "export": Reason.EXPORTING,
    "publish": Reason.UPLOADING,
}
"""The reason of the condition Running before an attempt has reported anything."""


def bytes_transferred(report: ProgressReport | None) -> str:
    """`: 1.21 of 7.40 GiB`, or nothing while that is unknown."""
    if report is None or report.bytes_done is None or not report.bytes_total:
        return ""
    return f": {format_bytes_done(report.bytes_done, report.bytes_total)}"
