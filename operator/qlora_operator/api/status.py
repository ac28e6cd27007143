"""What the operator reports: QLoRAJobStatus.

The docstring under a field is its description in the CRD, in `kubectl explain` and in the field reference.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from qlora_contract.base import ContractModel
from qlora_contract.export import EXPORT_FORMS
from qlora_contract.run_config import IsaTier, RunStage
from qlora_operator.api import names

ATTEMPTS_SHOWN = 20
RANKS_SHOWN = 64
NODES_SHOWN = 64


class StatusModel(ContractModel):
    """A part of the status. Unknown fields are ignored: a newer operator may have written them."""

    model_config = ConfigDict(extra="ignore")


Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
"""RFC 3339, UTC, as Kubernetes writes times."""


class Condition(StatusModel):
    """One aspect of the job's state, in the usual form of Kubernetes."""

    type: str
    """What the condition is about: Suspended, Initialized, QuotaReserved, DataChecked, Running, Restarting, Complete,
    Failed, or Finished, which is true when Complete or Failed is."""
    status: Literal["True", "False", "Unknown"]
    """True, False or Unknown."""
    observed_generation: int | None = None
    """The metadata.generation that the condition was computed from."""
    last_transition_time: Time
    """When status last changed."""
    reason: str = Field(description=f"Why, as one word for programs: {', '.join(names.Reason)}.")
    message: str
    """Why, as a sentence for people."""


class Restarts(StatusModel):
    """Restarts so far, by who caused them."""

    user: int = 0
    """Counted against backoffLimit."""
    infrastructure: int = 0
    """Restarts that the cluster caused."""
    forgiven: int | None = None
    """Those of them that no longer count against infrastructureBackoffLimit: they came before an attempt that made a
    new checkpoint."""


class Attempt(StatusModel):
    """One attempt at the job."""

    attempt: int
    """Number of the attempt, from 0."""
    stage: RunStage = "train"
    """What it does: `fetch` remote sources, `train`, `export` the adapter into output.formats, or `publish` it to
    output.destination."""
    pods: int | None = None
    """Its pods, if they are fewer than topology.pods, as topology.minPods allows."""
    start: Time | None = None
    """When its ranks were requested."""
    running: Time | None = None
    """When all of its ranks were up for the first time; unset until then."""
    end: Time | None = None
    """When its last pod was gone; unset until then."""
    reason: str | None = None
    """Why it ended, in one word."""
    message: str | None = None
    """Why it ended, in a sentence."""
    exit_codes: list[int] = Field(default=[], max_length=RANKS_SHOWN)
    """Exit codes of its pods, each once."""
    resumed_step: int | None = None
    """Steps that it began with, those of the checkpoint that it goes on from; unset until rank 0 has reported it."""
    step: int | None = None
    """Steps completed, as far as they were seen when the attempt ended."""
    checkpoint_step: int | None = None
    """Steps in the newest checkpoint, as far as it was known when the attempt ended."""
    job_uid: str | None = None
    """The uid of its batch/v1 Job, once seen: distinguishes a deleted Job from one that was never created."""
    placed: int | None = None
    """With reason Shrunk: how many of its pods had nodes; the next attempt has as many."""
    workload: str | None = None
    """With reason Requeued or Shrunk: Kueue's Workload of its Job, which the next attempt takes over with its place in
    the queue, or its quota. Unset: the next one is a new Workload."""
    node: str | None = None
    """The node of the pod that ended it, unless that was drained or preempted. The next attempts prefer others for an
    hour, if its kubelet refused the pod or another attempt ended there, too."""


class Placement(StatusModel):
    """Tier, data type and nodes of the current attempt."""

    isa: IsaTier | None = None
    """Tier that every rank must have."""
    dtype: str | None = None
    """Data type that the ranks compute in: bf16 or fp32. Fixed by the first completed step."""
    nodes: list[str] = Field(default=[], max_length=NODES_SHOWN)
    """Nodes of the pods, the first 64."""
    world_size: int | None = None
    """Number of ranks; with ranksPerPod auto, once rank 0 has reported it."""
    avoid: list[str] = Field(default=[], max_length=NODES_SHOWN)
    """Nodes whose processor lacks instructions that their labels advertise, the newest first."""


class Progress(StatusModel):
    """Progress of training, as rank 0 last reported it; written at most every 15 seconds."""

    step: int | None = None
    """Optimizer steps completed."""
    total_steps: int | None = None
    """Optimizer steps in total."""
    percent: int | None = None
    """Share of the steps completed, rounded down."""
    epoch: float | None = None
    """Passes over the training data, including the fraction of the current one."""
    loss: float | None = None
    """Mean loss per supervised token of the last step."""
    eval_loss: float | None = None
    """Eval loss of the newest evaluation."""
    tokens_per_second: float | None = None
    """Training speed, summed over all ranks."""
    eta_seconds: int | None = None
    """Estimated seconds until the last step is done."""
    memory_estimate: int | None = None
    """Estimated peak memory of a rank, in bytes."""
    memory_peak: int | None = None
    """Largest peak memory of any rank so far, in bytes."""
    attempt: int | None = None
    """The attempt whose rank 0 reported this."""
    step_time: Time | None = None
    """When the operator last saw a step completed."""
    advances: int | None = None
    """What rank 0 counts of any work: records tokenized, weights loaded, tokens evaluated or trained on."""
    advance_time: Time | None = None
    """When the operator last saw that count, or a step, advance."""
    updated_time: Time | None = None
    """When rank 0 reported this."""


class RankStatus(StatusModel):
    """Where one rank runs."""

    index: int
    """The rank."""
    pod: str | None = None
    """Its pod."""
    node: str | None = None
    """Its node."""
    isa: str | None = None
    """The tier of its processor."""
    cpus: str | None = None
    """The CPUs that it is bound to, such as `0-3,8`."""
    numa_nodes: str | None = None
    """The NUMA nodes of these CPUs, such as `0-1`."""


class CheckpointStatus(StatusModel):
    """The newest valid checkpoint."""

    step: int | None = None
    """Optimizer steps completed when it was taken."""
    time: Time | None = None
    """When it was taken."""
    uri: str | None = None
    """Where it is."""


class AdapterStatus(StatusModel):
    """The finished adapter."""

    uri: str | None = None
    """Where it is: a folder in PEFT's format."""
    sha256: str | None = None
    """sha256 of adapter_model.safetensors, in hexadecimal."""
    base_eval_loss: float | None = None
    """Eval loss of the base model without the adapter."""
    eval_loss: float | None = None
    """Eval loss with the adapter, measured after reading it back from uri."""
    exports: list[str] | None = Field(default=None, max_length=len(EXPORT_FORMS))
    """What was made of it besides, each in `jobs/<name>/exports`: `merged`, `gguf-q8_0`. Unset: nothing."""
    published_uri: str | None = None
    """Where its copy at output.destination is, with the revision if there is one."""


class Cost(StatusModel):
    """What the attempts that have ended and trained or exported cost; what transfers cost is not counted."""

    core_hours: float | None = None
    """CPUs of all ranks times hours, from when all ranks were up to when the last pod was gone."""
    queue_seconds: int | None = None
    """Seconds that attempts waited, in a queue and for nodes, until all of their ranks were up."""
    lost_steps: int | None = None
    """Optimizer steps that were seen done and that a later attempt made again, since the checkpoint that it went on
    from did not have them."""
    energy_kwh: float | None = None
    """Energy of the processors, in kWh, other work on the same machine included. Unset: unknown, as wherever the
    processors' counters cannot be read, and with more than one pod."""
    money: float | None = None
    """coreHours times the administrator's price. Unset: there is none."""
    currency: str | None = None
    """Currency of money, as the administrator has set it."""


class Provenance(StatusModel):
    """What the adapter was made from."""

    model_revision: str | None = None
    """What a remote model.source resolved to at the first fetch: a commit of the Hub, or a hash over the bucket's
    listing. Every attempt uses it."""
    dataset_revision: str | None = None
    """The same for dataset.source."""
    dataset_revisions: list[str] | None = None
    """The same for each of dataset.sources; empty for one on a claim."""
    initial_adapter_revision: str | None = None
    """The same for adapter.initialAdapter."""
    dataset_sha256: str | None = None
    """sha256 of the dataset's files, in hexadecimal."""
    image: str | None = None
    """Trainer image of every attempt, fixed by the first."""
    image_digest: str | None = None
    """Digest of the trainer image that rank 0's node reports."""
    run_config_version: int | None = None
    """Version of the RunConfig that this image reads: that of every attempt, fixed by the first."""
    seed: int | None = None
    """training.seed."""
    config_hash: str | None = None
    """sha256 of the fields of spec that shape the result, in hexadecimal: the same in every release."""


class WindowStatus(StatusModel):
    """Whether a window of spec.schedule is open."""

    open: bool
    """Whether the job may run."""
    until: Time | None = None
    """When that changes. Unset: not for more than a week, if it is open; never, if it is not."""


class Columns(StatusModel):
    """Ready-made text for `kubectl get`, which can neither join two fields nor round a number."""

    ranks: str | None = None
    """Ready ranks of all: `2/2`."""
    step: str | None = None
    """Completed steps of all: `120/400`."""
    loss: str | None = None
    """progress.loss, rounded: `1.83`."""
    tokens_per_second: str | None = None
    """progress.tokensPerSecond, rounded: `412`."""
    eta: str | None = None
    """progress.etaSeconds for people: `9m`."""
    restarts: str | None = None
    """Restarts of both kinds: `0`."""
    window: str | None = None
    """window, by the clock of spec.schedule: `closed until 2026-12-01T20:00:00+01:00`."""


class QLoRAJobStatus(StatusModel):
    """The state of the job. Only the operator writes it."""

    observed_generation: int | None = None
    """The metadata.generation that this status was computed from."""
    phase: Annotated[names.Phase, Field(strict=False)] | None = None
    """The conditions, summarized in one word."""
    message: str | None = None
    """What the job is waiting for, or why it ended, in a sentence."""
    conditions: list[Condition] = Field(
        default=[],
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    """The state in full. Initialized is false with reason NameConflict when an object that does not belong to the job
    has the name of one of its children, and with NoMatchingNodes when no tier of isa.allowed has enough nodes."""
    attempt: int | None = None
    """Number of the current or last attempt; the first is 0."""
    restarts: Restarts | None = None
    """Restarts so far."""
    attempts: list[Attempt] = Field(default=[], max_length=ATTEMPTS_SHOWN)
    """The most recent attempts, oldest first."""
    placement: Placement | None = None
    """Tier, data type and nodes of the current attempt."""
    progress: Progress | None = None
    """Progress of training."""
    ranks: list[RankStatus] = Field(default=[], max_length=RANKS_SHOWN)
    """Where the ranks run, the first 64."""
    checkpoint: CheckpointStatus | None = None
    """The newest valid checkpoint."""
    adapter: AdapterStatus | None = None
    """The finished adapter."""
    provenance: Provenance | None = None
    """What the adapter was made from."""
    cost: Cost | None = None
    """What the job has cost."""
    window: WindowStatus | None = None
    columns: Columns | None = None
    """Text for `kubectl get`, derived from the other fields."""
    start_time: Time | None = None
    """When the job was first active: not suspended, and admitted by its queue. Reset when it is resumed."""
    notified: list[str] | None = Field(default=None, max_length=8)
    """What the receiver of notifications was told: what happened, and when. Unset: nothing."""
    completion_time: Time | None = None
    """When it finished, successfully or not."""
