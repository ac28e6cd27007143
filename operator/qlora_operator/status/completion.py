"""The end of an attempt whose Job is complete: its stage is done, if its report says so."""

from dataclasses import dataclass, field
from typing import Any

from qlora_contract.exit_codes import PERMANENT
from qlora_contract.export import EXPORT_FORMS
from qlora_contract.run_config import ResolvedRevisions
from qlora_operator.api import names
from qlora_operator.api.names import CHECK_CONTAINER, Reason
from qlora_operator.api.run_config import export_forms
from qlora_operator.api.status import AdapterStatus, Cost
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.status import progress_status, stages
from qlora_operator.status.checks import AttemptEnd, Budget
from qlora_operator.status.failure import EXIT_REASONS, check_report
from qlora_operator.status.observation import AttemptJob
from qlora_operator.status.view import JobView

_NO_REPORT = AttemptEnd(
    Reason.TRANSFER_FAILED,
    "the transfer succeeded but left no report of everything it did; it is repeated",
    Budget.USER,
)


_UNREAD = AttemptEnd(
    Reason.DISRUPTED,
    "the transfer succeeded, but its pod was removed before its report was read; it is repeated",
    Budget.INFRASTRUCTURE,
)


@dataclass(frozen=True)
class StageResult:
    """What comes of a complete Job."""

    end: AttemptEnd
    fields: dict[str, Any] = field(default_factory=dict)
    """Of the status, as they are now."""
    completes: str = ""
    """The message of the condition Complete, if this was the job's last stage."""
    data: str = ""
    """What a look at the data has found, if it has found them good."""


def is_done(view: JobView, job: AttemptJob) -> bool:
    """Whether the attempt has done what it was for, going by its Job; a fetch has even where the look at its data
    failed, whose container the Job counts as well: it was killed, or the image is too old to have that program.
    Read.PODS, where a fetch fails."""
    if job.complete or view.stage != "fetch" or job.failing is None:
        return job.complete
    return any(pod.exit_code == 0 and pod.finished for pod in view.pods)


def stage_result(view: JobView) -> StageResult:
    """What the Job of the open attempt has done, which is done. Read.PODS."""
    return {"fetch": _fetched, "train": _trained, "export": _exported, "publish": _published}[view.stage](
        view
    )


def _fetched(view: JobView) -> StageResult:
    report = progress_status.transfer_report(view.pods)
    found = (report.fetched if report is not None else None) or ResolvedRevisions()
    known = view.provenance
    # What is known stays: the job's data does not change when a branch moves.
    provenance = known.model_copy(
        update={
            "model_revision": known.model_revision or found.model,
            "dataset_revision": known.dataset_revision or found.dataset,
            "dataset_revisions": known.dataset_revisions or found.sources,
            "initial_adapter_revision": known.initial_adapter_revision or found.adapter,
        }
    )
    fields = {"provenance": provenance}
    if stages.next_stage(view.spec, view.status.model_copy(update=fields)) == "fetch":
        return StageResult(_without_report(view), fields)
    return _fetched_and_seen(view, fields)


def _fetched_and_seen(view: JobView, fields: dict[str, Any]) -> StageResult:
    """The end of a fetch whose sources are there, by what the container beside it has found of the data."""
    message = "the remote sources are in the workspace"
    seen = next((report for pod in view.pods if (report := check_report(pod)) is not None), None)
    job = view.attempt_job
    if seen is not None and seen.exit_code in PERMANENT:
        reason, budget = EXIT_REASONS[seen.exit_code]
        message = f"{message}, and ranks could not use them: {seen.cause}"
        return StageResult(AttemptEnd(reason, message, budget, (0,)), fields)
    data = (seen.data or "") if seen is not None else ""
    failed = job is not None and not job.complete
    if data:
        message = f"{message}: {data}"
    elif seen is not None or failed:
        why = seen.cause if seen is not None else f"the container {CHECK_CONTAINER} failed"
        message = f"{message}; the data are not checked before the ranks read them: {why}"
    return StageResult(AttemptEnd(Reason.FETCHED, message, Budget.NONE, (0,)), fields, data=data)


def _trained(view: JobView) -> StageResult:
    spec, placement = view.spec, view.placement
    uri = f"{spec.workspace.rstrip('/')}/jobs/{view.job.metadata.name}/adapter"
    adapter = progress_status.adapter(view.pods) or AdapterStatus(uri=uri)
    # Ranks of a short job may not have reported how many they are before they are done.
    world_size = placement.world_size or progress_status.world_size(view.pods)
    fields: dict[str, Any] = {
        "adapter": adapter,
        "progress": progress_status.finished(view.status.progress),
        "placement": placement.model_copy(update={"world_size": world_size}),
    }
    if energy := progress_status.energy_kwh(view.pods):
        fields["cost"] = (view.status.cost or Cost()).model_copy(update={"energy_kwh": energy})
    return _finished(view, adapter, fields, Reason.TRAINED, "every rank is done")


def _exported(view: JobView) -> StageResult:
    known = view.status.adapter or AdapterStatus()
    adapter = known.model_copy(update={"exports": [*export_forms(view.spec)]})
    return _finished(view, adapter, {"adapter": adapter}, Reason.EXPORTED, "the exports are made")


def exported_since(job: QLoRAJob, adapter: AdapterStatus) -> AdapterStatus:
    """A finished job's adapter, with the forms that `kubectl qlora export` says it has made. Anything else that the
    annotation holds is passed over."""
    said = job.metadata.annotations.get(names.EXPORTED_ANNOTATION, "").split(",")
    known = adapter.exports or []
    new = [form for form in EXPORT_FORMS if form in said and form not in known]
    return adapter.model_copy(update={"exports": [*known, *new]}) if new else adapter


def _finished(
    view: JobView, adapter: AdapterStatus, fields: dict[str, Any], reason: Reason, done: str
) -> StageResult:
    """The end of an attempt after which there is an adapter: of the job, unless something is still to be done with it.

    Args:
        view: the job.
        adapter: as it is now.
        fields: of the status, as they are now.
        reason: why the attempt ended if the job goes on.
        done: what is done if it does not.
    """
    spec = view.spec
    if stages.next_stage(spec, view.status.model_copy(update={"adapter": adapter})) == "export":
        message = f"the adapter is in {adapter.uri}; {', '.join(export_forms(spec))} of it are made next"
    elif spec.output.destination is not None:
        message = f"the adapter is in {adapter.uri}; it is sent to {spec.output.destination} next"
    else:
        end = AttemptEnd(Reason.SUCCEEDED, done, Budget.NONE, (0,))
        return StageResult(end, fields, completes=_complete(adapter))
    return StageResult(AttemptEnd(reason, message, Budget.NONE, (0,)), fields)


def _published(view: JobView) -> StageResult:
    report = progress_status.transfer_report(view.pods)
    if report is None or report.published_uri is None:
        return StageResult(_without_report(view))
    known = view.status.adapter or AdapterStatus()
    adapter = known.model_copy(update={"published_uri": report.published_uri})
    end = AttemptEnd(Reason.SUCCEEDED, "the adapter is sent", Budget.NONE, (0,))
    return StageResult(end, {"adapter": adapter}, completes=_complete(adapter))


def _without_report(view: JobView) -> AttemptEnd:
    """What is not the job's doing costs it nothing: pods that have ended are removed, as with their node."""
    return _NO_REPORT if view.pods else _UNREAD


def _complete(adapter: AdapterStatus) -> str:
    places = f"{adapter.uri} and {adapter.published_uri}" if adapter.published_uri else adapter.uri
    if adapter.eval_loss is None or adapter.base_eval_loss is None:
        return f"the adapter is in {places}"
    return (
        f"the adapter is in {places}: eval loss {adapter.eval_loss:.4g}, "
        f"that of the base {adapter.base_eval_loss:.4g}"
    )
