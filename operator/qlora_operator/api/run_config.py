"""From what users write to what ranks read: the only place that knows both forms."""

from typing import Any, TypeVar

from pydantic import BaseModel

from qlora_contract import run_config as wire
from qlora_contract.export import ExportForm, forms_of
from qlora_contract.identity import identity_fields, identity_hash
from qlora_contract.run_config import RUN_CONFIG_VERSION, RUN_CONFIG_VERSIONS, newer_than, oldest_version
from qlora_operator.api.pod_resources import stage_topology
from qlora_operator.api.quantity import parse_memory
from qlora_operator.api.v1alpha1 import Dataset, QLoRAJob, QLoRAJobSpec, Topology, Tracking

DEFAULT_NAMESPACE = "default"
NOTHING_FETCHED = wire.ResolvedRevisions()

Wire = TypeVar("Wire", bound=BaseModel)


def to_run_config(
    job: QLoRAJob,
    *,
    uid: str,
    attempt: int,
    isa: wire.IsaTier,
    stage: wire.RunStage = "train",
    fetched: wire.ResolvedRevisions = NOTHING_FETCHED,
) -> wire.RunConfig:
    """What every rank of an attempt gets, in the version of the job's first attempt.

    The first gets the oldest version that can say it, so that an image of the release before reads it, too.

    A job that `cannot_write` has a reason against must not be started with the result.

    Args:
        job: as the user wrote it, with its status.
        uid: of the job, from the API server, or of its folder with `qlora run`.
        attempt: from 0.
        isa: the tier that placement chose for all ranks.
        stage: what the attempt is to do.
        fetched: what the remote sources stand for, as far as that is known.
    """
    spec, fixed = job.spec, _fixed_version(job)
    run = wire.RunConfig(
        version=RUN_CONFIG_VERSION,
        stage=stage,
        fetched=fetched,
        job=wire.JobRef(
            name=job.metadata.name,
            namespace=job.metadata.namespace or DEFAULT_NAMESPACE,
            uid=uid,
            attempt=attempt,
        ),
        workspace=spec.workspace,
        model=carry_over(wire.ModelSource, spec.model),
        dataset=dataset(spec.dataset),
        adapter=carry_over(wire.Adapter, spec.adapter),
        quantization=carry_over(wire.Quantization, spec.quantization),
        training=carry_over(wire.Training, spec.training),
        evaluation=carry_over(wire.Evaluation, spec.evaluation),
        checkpoint=carry_over(wire.Checkpoint, spec.checkpoint),
        output=carry_over(wire.Output, spec.output),
        tracking=tracking(spec.tracking),
        distributed=carry_over(wire.Distributed, spec.distributed),
        layout=layout(stage_topology(spec.topology, stage)),
        isa=isa,
        termination_grace_period_seconds=spec.termination_grace_period_seconds,
        progress_deadline_seconds=spec.progress_deadline_seconds,
    )
    return run.model_copy(update={"version": fixed if fixed in RUN_CONFIG_VERSIONS else oldest_version(run)})


def dataset(written: Dataset) -> wire.Dataset:
    """The training data."""
    sources = None
    if written.sources is not None:
        sources = [
            carry_over(wire.DatasetSource, each, columns=carry_over(wire.Columns, each.columns))
            for each in written.sources
        ]
    return carry_over(
        wire.Dataset, written, columns=carry_over(wire.Columns, written.columns), sources=sources
    )


def export_forms(spec: QLoRAJobSpec) -> list[ExportForm]:
    """What output.formats asks for besides the adapter."""
    return forms_of(carry_over(wire.Output, spec.output))


def tracking(written: Tracking) -> wire.Tracking:
    """Where metrics go."""
    mlflow = written.mlflow
    return wire.Tracking(mlflow=None if mlflow is None else carry_over(wire.Mlflow, mlflow))


def layout(topology: Topology) -> wire.Layout:
    """The topology with its memory in bytes."""
    return carry_over(
        wire.Layout, topology, memory_per_rank=parse_memory(topology.memory_per_rank), ranks=None
    )


def carry_over(form: type[Wire], written: BaseModel, **others: Any) -> Wire:
    """An object of the wire form, from one of the API that has fields of the same names.

    Args:
        form: the class of the wire form.
        written: what the user wrote.
        others: fields that have another name or another meaning in the API, by their names in the wire form.
    """
    same = {name: getattr(written, name) for name in form.model_fields if name not in others}
    return form(**same, **others)


def config_hash(job: QLoRAJob) -> str:
    """The hash of the job's identity, which its folder in the workspace is marked with. The same in every release."""
    return identity_hash(identity_fields(_any_attempt(job)))


def initial_version(job: QLoRAJob) -> int:
    """The version of the RunConfig that a job's first attempt gets."""
    return _any_attempt(job).version


def cannot_write(job: QLoRAJob) -> str | None:
    """Why no further attempt can start, in a sentence; None when one can.

    Every attempt has the image of the first, and that reads the version of the RunConfig that status.provenance keeps.
    """
    version = _fixed_version(job)
    if version is None:
        return None
    if version not in RUN_CONFIG_VERSIONS:
        return (
            f"the job's image reads version {version} of the RunConfig, and this operator writes versions "
            f"{' and '.join(map(str, RUN_CONFIG_VERSIONS))}: run an operator that writes version {version}, "
            "or create another job"
        )
    if newer := newer_than(_any_attempt(job), version):
        return (
            f"the job's image reads version {version} of the RunConfig and does not know {', '.join(newer)}: "
            "remove it from the spec, or create another job"
        )
    return None


def _fixed_version(job: QLoRAJob) -> int | None:
    """The version that the first attempt's image reads; None before there was one."""
    return job.status.provenance.run_config_version if job.status and job.status.provenance else None


def _any_attempt(job: QLoRAJob) -> wire.RunConfig:
    return to_run_config(job, uid="any", attempt=0, isa=job.spec.isa.allowed[0])
