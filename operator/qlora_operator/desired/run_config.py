"""The RunConfig of one attempt at a job: what its ranks are told."""

from qlora_contract.run import Fetched, IsaTier, JobRef, Layout, RunConfig, RunStage
from qlora_operator.api.quantity import parse_memory
from qlora_operator.api.types import QLoRAJob, Topology

DEFAULT_NAMESPACE = "default"
NOTHING_FETCHED = Fetched()


def run_config(
    job: QLoRAJob,
    *,
    uid: str,
    attempt: int,
    isa: IsaTier,
    stage: RunStage = "train",
    fetched: Fetched = NOTHING_FETCHED,
) -> RunConfig:
    """What every rank of an attempt gets.

    Args:
        job: as the user wrote it.
        uid: of the job, from the API server, or of its folder with `qlora run`.
        attempt: from 0.
        isa: the tier that placement chose for all ranks.
        stage: what the attempt is to do.
        fetched: what the remote sources stand for, as far as that is known.
    """
    spec = job.spec
    return RunConfig(
        stage=stage,
        fetched=fetched,
        job=JobRef(
            name=job.metadata.name,
            namespace=job.metadata.namespace or DEFAULT_NAMESPACE,
            uid=uid,
            attempt=attempt,
        ),
        workspace=spec.workspace,
        model=spec.model,
        dataset=spec.dataset,
        adapter=spec.adapter,
        quantization=spec.quantization,
        training=spec.training,
        evaluation=spec.evaluation,
        checkpoint=spec.checkpoint,
        output=spec.output,
        distributed=spec.distributed,
        layout=layout(spec.topology),
        isa=isa,
        termination_grace_period_seconds=spec.termination_grace_period_seconds,
    )


def layout(topology: Topology) -> Layout:
    """The topology with its memory in bytes."""
    return Layout(
        pods=topology.pods,
        ranks_per_pod=topology.ranks_per_pod,
        cpus_per_rank=topology.cpus_per_rank,
        memory_per_rank=parse_memory(topology.memory_per_rank),
        pinning=topology.pinning,
        memory_tier=topology.memory_tier,
    )
