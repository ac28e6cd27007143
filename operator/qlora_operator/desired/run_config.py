"""The RunConfig of one attempt at a job: what its ranks are told."""

from qlora_contract.run import IsaTier, JobRef, Layout, RunConfig
from qlora_operator.api.quantity import parse_memory
from qlora_operator.api.types import QLoRAJob, Topology

DEFAULT_NAMESPACE = "default"


def run_config(job: QLoRAJob, *, uid: str, attempt: int, isa: IsaTier) -> RunConfig:
    """What every rank of an attempt gets.

    Args:
        job: as the user wrote it.
        uid: of the job, from the API server, or of its folder with `qlora run`.
        attempt: from 0.
        isa: the tier that placement chose for all ranks.
    """
    spec = job.spec
    return RunConfig(
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
    )
