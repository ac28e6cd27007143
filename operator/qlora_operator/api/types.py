"""What a user may write (QLoRAJobSpec), and what the operator answers (QLoRAJobStatus).

The docstring under a field is its description in the CRD, in `kubectl explain` and in the field reference.
The settings of training are defined and described in qlora_contract.run, and embedded here. An object without
a docstring of its own has that of its class.
"""

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from qlora_contract.base import ContractModel
from qlora_contract.remote import is_remote
from qlora_contract.run import (
    ISA_TIERS,
    MAX_RANKS,
    Adapter,
    Checkpoint,
    Dataset,
    Distributed,
    Evaluation,
    IsaTier,
    MemoryTier,
    ModelSource,
    Output,
    Pinning,
    PvcUri,
    Quantization,
    RanksPerPod,
    RunStage,
    Training,
)
from qlora_operator.api import names, quantity
from qlora_operator.api.rules import ApiModel, Rule

MAX_SECONDS = 2_147_483_647
"""The longest time span: what Kubernetes' own int32 fields hold, 68 years."""
MAX_RESTARTS = 10_000
"""Keeps the number of an attempt well below the 10^6 that fits its name."""
ATTEMPTS_SHOWN = 20
RANKS_SHOWN = 64
NODES_SHOWN = 64

DNS_LABEL_PATTERN = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
LABEL_KEY_PATTERN = (
    "^([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
    "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
)
LABEL_VALUE_PATTERN = "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
SUBDOMAIN_PATTERN = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
MANAGER_PATTERN = SUBDOMAIN_PATTERN.removesuffix("$") + "/[-A-Za-z0-9/._~%!$&'()*+,;=:]+$"
"""A controller's name as batch/v1 has it: a domain, a slash, a path."""
IMAGE_PATTERN = "^[A-Za-z0-9][-A-Za-z0-9._:/@]*$"
MAX_LABEL_KEY = 317
"""A prefix of 253 characters, a slash, a name of 63."""

MUTABLE = frozenset(
    {
        "suspend",
        "ttlSecondsAfterFinished",
        "activeDeadlineSeconds",
        "backoffLimit",
        "infrastructureBackoffLimit",
        "pendingDeadlineSeconds",
        "progressDeadlineSeconds",
    }
)
"""Fields of spec that may change at any time."""
MUTABLE_WHILE_SUSPENDED = frozenset({"topology", "scheduling"})
"""Fields of spec that may change while the job is suspended, or with the change that suspends or resumes
it."""

OPERATOR_ONLY = (
    "spec.model.credentialsSecret",
    "spec.dataset.credentialsSecret",
    "spec.output.credentialsSecret",
    "spec.isa.stepDownSeconds",
    "spec.scheduling",
    "spec.image",
    "spec.suspend",
    "spec.managedBy",
    "spec.ttlSecondsAfterFinished",
    "spec.activeDeadlineSeconds",
    "spec.backoffLimit",
    "spec.infrastructureBackoffLimit",
    "spec.pendingDeadlineSeconds",
    "spec.progressDeadlineSeconds",
)
"""Fields that mean something to the operator alone: `qlora run` ignores them, and names those that a file
sets."""


def _without_duplicates(tiers: list[IsaTier]) -> list[IsaTier]:
    twice = next((tier for i, tier in enumerate(tiers) if tier in tiers[:i]), None)
    if twice is not None:
        raise PydanticCustomError("rule", "names {tier} twice; each tier stands once", {"tier": twice})
    return tiers


def _stays_inside(uri: str) -> bool:
    return "/../" not in f"{uri}/"


def _revision_of_hub(name: str) -> Rule:
    """A revision is the Hub's."""
    return Rule(
        cel=f"self.{name}.revision == 'main' || self.{name}.source.startsWith('hf://')",
        holds=lambda spec: (
            getattr(spec, name).revision == "main" or getattr(spec, name).source.startswith("hf://")
        ),
        message="goes with a source hf://",
        field=(name, "revision"),
    )


def _secret_of_remote(name: str) -> Rule:
    """A claim needs no credentials."""
    return Rule(
        cel=f"!has(self.{name}.credentialsSecret) || !self.{name}.source.startsWith('pvc://')",
        holds=lambda spec: (
            getattr(spec, name).credentials_secret is None or is_remote(getattr(spec, name).source)
        ),
        message="goes with a source hf:// or s3://",
        field=(name, "credentialsSecret"),
    )


class Topology(ApiModel):
    """How many ranks train, and what each of them gets. The loss curve does not depend on it, up to rounding.
    May change while the job is suspended."""

    pods: int = Field(default=1, ge=1, le=512)
    """Pods of an attempt. More than one need a workspace that many nodes can mount (ReadWriteMany)."""
    ranks_per_pod: RanksPerPod = 1
    """Ranks of a pod: processes that train together. `auto`: one for each NUMA node (with sub-NUMA clustering:
    each cluster) that the pod's CPUs belong to; cpusPerRank and memoryPerRank are then those of the whole pod, and
    its ranks share them."""
    cpus_per_rank: int = Field(default=4, ge=1, le=1024)
    """Whole CPUs of a rank, requested for it and bound to it; with ranksPerPod auto, of a pod."""
    memory_per_rank: str = Field(
        min_length=1, max_length=quantity.MAX_MEMORY_CHARACTERS, pattern=quantity.MEMORY_PATTERN
    )
    """Memory of a rank (with ranksPerPod auto, of a pod), such as `16Gi`: what `qlora plan` says. There is no
    default, since the operator cannot read a model on a claim. Suffixes Ki Mi Gi Ti Pi (powers of 1024) and
    k M G T P (powers of 1000)."""
    pinning: Pinning = "strict"
    """`strict`: each rank has its CPUs to itself, and the job waits, or is refused, where that cannot be;
    `best-effort`: ranks may share CPUs."""
    memory_tier: MemoryTier = "any"
    """`hbm`: high-bandwidth memory, as Xeon CPU Max processors have. In cache mode and HBM-only mode there is nothing
    to be done; in flat mode the ranks take it where the container may choose memory, else the job is refused with
    pinning strict, and goes on without it with best-effort. `any`: memory near the CPUs."""

    rules = (
        Rule(
            cel=f"type(self.ranksPerPod) != int || self.pods * self.ranksPerPod <= {MAX_RANKS}",
            holds=lambda topology: (
                topology.ranks_per_pod == "auto" or topology.pods * topology.ranks_per_pod <= MAX_RANKS
            ),
            message=f"pods times ranksPerPod may be at most {MAX_RANKS} ranks",
        ),
        Rule(
            cel=(
                "!isQuantity(self.memoryPerRank) || "
                f"(quantity(self.memoryPerRank).compareTo(quantity('{quantity.MIN_MEMORY}')) >= 0 && "
                f"quantity(self.memoryPerRank).compareTo(quantity('{quantity.MAX_MEMORY}')) <= 0)"
            ),
            holds=lambda topology: quantity.is_plausible_memory(topology.memory_per_rank),
            message=(
                f"must be from {quantity.MIN_MEMORY} to {quantity.MAX_MEMORY}; "
                "without a suffix the number means bytes"
            ),
            field=("memoryPerRank",),
        ),
    )


class Isa(ApiModel):
    """Which processors may train. All ranks of an attempt get the same tier, since the slowest sets the
    pace."""

    allowed: Annotated[list[IsaTier], AfterValidator(_without_duplicates)] = Field(
        default=list(ISA_TIERS),
        min_length=1,
        max_length=len(ISA_TIERS),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    """Instruction-set tiers, in order of preference: the first for which enough nodes have the processor, the
    CPUs and the memory is taken; NoMatchingNodes when there is none."""
    step_down_seconds: int = Field(default=300, ge=1, le=MAX_SECONDS)
    """Seconds that pods may wait for nodes of one tier before the next tier is tried. Time in a queue does
    not count."""


class Toleration(ApiModel):
    """A taint that the pods tolerate, spelled and meant as in core/v1."""

    key: str | None = Field(default=None, min_length=1, max_length=MAX_LABEL_KEY, pattern=LABEL_KEY_PATTERN)
    """Key of the taint. Unset, with operator Exists: every taint."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """`Equal`: key and value match the taint's; `Exists`: the key does, whatever the value."""
    value: str | None = Field(default=None, max_length=63, pattern=LABEL_VALUE_PATTERN)
    """Value of the taint, with operator Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. Unset: every effect."""
    toleration_seconds: int | None = Field(default=None, ge=0, le=MAX_SECONDS)
    """Seconds for which a NoExecute taint is tolerated. Unset: for ever."""

    rules = (
        Rule(
            cel="has(self.key) || self.operator == 'Exists'",
            holds=lambda toleration: toleration.key is not None or toleration.operator == "Exists",
            message="key is required unless operator is Exists",
        ),
        Rule(
            cel="!has(self.value) || self.value == '' || self.operator == 'Equal'",
            holds=lambda toleration: not toleration.value or toleration.operator == "Equal",
            message="operator Exists takes no value",
        ),
        Rule(
            cel="!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            holds=lambda toleration: (
                toleration.toleration_seconds is None or toleration.effect == "NoExecute"
            ),
            message="tolerationSeconds goes with effect NoExecute",
        ),
    )


class Scheduling(ApiModel):
    """Where the pods may go, besides what isa and topology ask for. May change while the job is suspended."""

    node_selector: dict[str, Annotated[str, Field(max_length=63, pattern=LABEL_VALUE_PATTERN)]] = Field(
        default={}, max_length=32, json_schema_extra={"x-kubernetes-map-type": "atomic"}
    )
    """Labels that a node must have."""
    tolerations: list[Toleration] = Field(default=[], max_length=32)
    """Taints that the pods tolerate."""
    priority_class_name: str | None = Field(
        default=None, min_length=1, max_length=253, pattern=SUBDOMAIN_PATTERN
    )
    """PriorityClass of the pods. Unset: the cluster's default."""
    queue_name: str | None = Field(default=None, min_length=1, max_length=63, pattern=SUBDOMAIN_PATTERN)
    """LocalQueue of Kueue, in the job's namespace, in which each attempt waits to be let in. Unset: attempts
    do not wait for a queue."""

    rules = (
        Rule(
            # has(), since an API server tries the rule on scheduling's own default, {}, too.
            cel=(
                "!has(self.nodeSelector) || self.nodeSelector.all(key, "
                f"size(key) <= {MAX_LABEL_KEY} && key.matches('{LABEL_KEY_PATTERN}'))"
            ),
            holds=lambda scheduling: all(
                len(key) <= MAX_LABEL_KEY and re.fullmatch(LABEL_KEY_PATTERN[1:-1], key)
                for key in scheduling.node_selector
            ),
            message="every key must be the name of a label, such as kubernetes.io/hostname",
            field=("nodeSelector",),
        ),
    )


class QLoRAJobSpec(ApiModel):
    """What to train, on what, and how. Immutable but for suspend, the deadlines and the limits, and for
    topology and scheduling while the job is suspended."""

    workspace: str = PvcUri
    """`pvc://claim/path` of the folder that the job works in: caches, checkpoints, and the finished adapter
    under `jobs/<name>`. Jobs may share one. The claim must be ReadWriteMany when there is more than one
    pod."""
    model: ModelSource
    dataset: Dataset
    adapter: Adapter = Adapter()
    quantization: Quantization = Quantization()
    training: Training
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    output: Output = Output()
    topology: Topology
    isa: Isa = Isa()
    distributed: Distributed = Distributed()
    scheduling: Scheduling = Scheduling()
    image: str | None = Field(default=None, min_length=1, max_length=512, pattern=IMAGE_PATTERN)
    """Trainer image: one of those that the cluster's administrator allows. Unset: the administrator's
    default. The first attempt fixes it for the later ones."""
    suspend: bool = False
    """Hold the job: its pods stop after a checkpoint. Back to false, it goes on from there, at no cost to any
    limit. The condition Suspended follows."""
    managed_by: str | None = Field(default=None, min_length=1, max_length=63, pattern=MANAGER_PATTERN)
    """Controller of the job, as in batch/v1. Unset, or `qlora.dev/qlora-operator`: this operator. A job of
    another one, such as `kueue.x-k8s.io/multikueue`, is left alone."""
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0, le=MAX_SECONDS)
    """Delete the job so many seconds after it finished; the workspace stays. Unset: never."""
    active_deadline_seconds: int | None = Field(default=None, ge=1, le=MAX_SECONDS)
    """Fail the job with DeadlineExceeded when it has been active for so many seconds, restarts included.
    Starts anew when the job is resumed. Unset: no limit."""
    backoff_limit: int = Field(default=3, ge=0, le=MAX_RESTARTS)
    """Restarts for failures of the job's own making; one more fails it with BackoffLimitExceeded. Few, since
    such failures tend to repeat. What cannot get better, such as bad data, is never retried."""
    infrastructure_backoff_limit: int = Field(default=20, ge=0, le=MAX_RESTARTS)
    """Restarts for the cluster's failures: drained, preempted or lost nodes; one more fails the job with
    InfrastructureBackoffLimitExceeded. Many, since each loses at most one checkpoint interval of work."""
    pending_deadline_seconds: int | None = Field(default=None, ge=1, le=MAX_SECONDS)
    """Fail the job with PendingDeadlineExceeded when an attempt has not had all its ranks for so many
    seconds. Unset: it waits for nodes for ever."""
    progress_deadline_seconds: int = Field(default=1800, ge=1, le=MAX_SECONDS)
    """Restart the ranks, with reason ProgressDeadlineExceeded and at the cost of one of backoffLimit, when
    they have completed no step for so many seconds. Must exceed the longest step, and loading the model."""
    termination_grace_period_seconds: int = Field(default=300, ge=1, le=86_400)
    """Seconds between asking the ranks to stop and killing them: enough for a step and a checkpoint."""

    rules = (
        Rule(
            cel="has(self.training.epochs) != has(self.training.maxSteps)",
            holds=lambda spec: (spec.training.epochs is None) != (spec.training.max_steps is None),
            message="exactly one of epochs and maxSteps must be given",
            field=("training",),
        ),
        Rule(
            cel="self.training.globalBatchTokens >= self.training.maxSequenceLength",
            holds=lambda spec: spec.training.global_batch_tokens >= spec.training.max_sequence_length,
            message="globalBatchTokens must be at least maxSequenceLength",
            field=("training",),
        ),
        Rule(
            cel="!(self.workspace + '/').contains('/../')",
            holds=lambda spec: _stays_inside(spec.workspace),
            message="may not leave its claim: a path has no `..`",
            field=("workspace",),
        ),
        Rule(
            cel="!(self.model.source + '/').contains('/../')",
            holds=lambda spec: _stays_inside(spec.model.source),
            message="may not leave its claim: a path has no `..`",
            field=("model", "source"),
        ),
        Rule(
            cel="!(self.dataset.source + '/').contains('/../')",
            holds=lambda spec: _stays_inside(spec.dataset.source),
            message="may not leave its claim: a path has no `..`",
            field=("dataset", "source"),
        ),
        Rule(
            cel="!has(self.output.destination) || !(self.output.destination + '/').contains('/../')",
            holds=lambda spec: spec.output.destination is None or _stays_inside(spec.output.destination),
            message="may not leave its bucket: a path has no `..`",
            field=("output", "destination"),
        ),
        *(_revision_of_hub(name) for name in ("model", "dataset")),
        *(_secret_of_remote(name) for name in ("model", "dataset")),
        Rule(
            cel="!has(self.output.credentialsSecret) || has(self.output.destination)",
            holds=lambda spec: spec.output.credentials_secret is None or spec.output.destination is not None,
            message="goes with a destination",
            field=("output", "credentialsSecret"),
        ),
    )


def held_fields(spec: QLoRAJobSpec) -> str:
    """A hash of MUTABLE_WHILE_SUSPENDED. Defaults are left out: a field that a newer operator adds must not
    change the hash of the jobs that run."""
    fields = spec.model_dump(mode="json", include={"topology", "scheduling"}, exclude_defaults=True)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


class Observed(ContractModel):
    """A part of the status. Unknown fields are passed over: a newer operator may have written them."""

    model_config = ConfigDict(extra="ignore")


Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
"""RFC 3339, UTC, as Kubernetes writes times."""


class Condition(Observed):
    """One side of the job's state, in the form that all of Kubernetes uses."""

    type: str
    """What the condition is about: Suspended, Initialized, QuotaReserved, Running, Restarting, Complete,
    Failed, or Finished, which is true with either of the two before it."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    observed_generation: int | None = None
    """The metadata.generation that this was said of."""
    last_transition_time: Time
    """When status last changed."""
    reason: str = Field(description=f"Why, in one word, for programs: {', '.join(names.Reason)}.")
    message: str
    """Why, in a sentence, for people."""


class Restarts(Observed):
    """Restarts so far, by whose doing they were."""

    user: int = 0
    """Counted against backoffLimit."""
    infrastructure: int = 0
    """Counted against infrastructureBackoffLimit."""


class Attempt(Observed):
    """How one attempt went."""

    attempt: int
    """Its number; the first is 0."""
    stage: RunStage = "train"
    """What it was to do: `fetch` remote sources, `train`, or `publish` the adapter to output.destination."""
    start: Time | None = None
    """When its ranks were asked for."""
    end: Time | None = None
    """When its last pod was gone; unset while it lasts."""
    reason: str | None = None
    """Why it ended, in one word."""
    message: str | None = None
    """Why it ended, in a sentence."""
    exit_codes: list[int] = Field(default=[], max_length=RANKS_SHOWN)
    """Exit codes of its pods, without repetition."""
    job_uid: str | None = None
    """The uid of its batch/v1 Job, once that was seen: a Job that is gone is not one that was never there."""


class Placement(Observed):
    """What the current attempt was given."""

    isa: IsaTier | None = None
    """Tier that every rank must have."""
    dtype: str | None = None
    """Data type that the ranks compute in: bf16 or fp32. Fixed by the first completed step."""
    nodes: list[str] = Field(default=[], max_length=NODES_SHOWN)
    """Nodes of the pods, the first 64."""
    world_size: int | None = None
    """Ranks; with ranksPerPod auto, once rank 0 has told."""
    avoid: list[str] = Field(default=[], max_length=NODES_SHOWN)
    """Nodes whose processor turned out to lack what their labels promise."""


class Progress(Observed):
    """How far training is, as rank 0 last told; written at most every 15 seconds."""

    step: int | None = None
    """Optimiser steps completed."""
    total_steps: int | None = None
    """Optimiser steps in all."""
    percent: int | None = None
    """Share of the steps completed, rounded down."""
    epoch: float | None = None
    """Passes over the training data, with the fraction of the current one."""
    loss: float | None = None
    """Mean loss per supervised token of the last step."""
    eval_loss: float | None = None
    """The newest evaluation."""
    tokens_per_second: float | None = None
    """Tokens of all ranks."""
    eta_seconds: int | None = None
    """Seconds that the remaining steps will take."""
    memory_estimate: int | None = None
    """Bytes that a rank was estimated to need at most."""
    memory_peak: int | None = None
    """Bytes: the largest peak of any rank so far."""
    step_time: Time | None = None
    """When a step was last seen to have been completed."""
    updated_time: Time | None = None
    """When rank 0 told this."""


class RankStatus(Observed):
    """Where one rank runs."""

    index: int
    """The rank."""
    pod: str | None = None
    """Its pod."""
    node: str | None = None
    """Its node."""
    isa: str | None = None
    """The tier that it found."""
    cpus: str | None = None
    """The CPUs that it is bound to, such as `0-3,8`."""
    numa_nodes: str | None = None
    """The NUMA nodes of these CPUs, such as `0-1`."""


class CheckpointStatus(Observed):
    """The newest valid checkpoint."""

    step: int | None = None
    """Optimiser steps completed when it was taken."""
    time: Time | None = None
    """When it was taken."""
    uri: str | None = None
    """Where it is."""


class AdapterStatus(Observed):
    """The finished adapter."""

    uri: str | None = None
    """Where it is: a folder in PEFT's format."""
    sha256: str | None = None
    """Of adapter_model.safetensors, in hexadecimal."""
    base_eval_loss: float | None = None
    """Eval loss of the base model without the adapter."""
    eval_loss: float | None = None
    """Eval loss with the adapter, read back from where it is."""
    published_uri: str | None = None
    """Where output.destination has its copy, with the revision where there is one."""


class Provenance(Observed):
    """What the adapter was made from."""

    model_revision: str | None = None
    """What a remote model.source stood for at the first fetch, and for every attempt: a commit of the Hub, or
    a hash over the bucket's listing."""
    dataset_revision: str | None = None
    """As modelRevision, of dataset.source."""
    dataset_sha256: str | None = None
    """Of the dataset's files, in hexadecimal."""
    image: str | None = None
    """Trainer image of every attempt: fixed by the first one."""
    image_digest: str | None = None
    """Digest of the trainer image that rank 0's node reports."""
    run_config_version: int | None = None
    """Version of the RunConfig of every attempt: fixed by the first one."""
    seed: int | None = None
    """training.seed."""
    config_hash: str | None = None
    """sha256 of the fields of spec that shape the result, in hexadecimal."""


class Columns(Observed):
    """Ready-made text for `kubectl get`, which can neither join two fields nor round a number."""

    ranks: str | None = None
    """Ranks that are ready, of all: `2/2`."""
    step: str | None = None
    """Steps completed, of all: `120/400`."""
    loss: str | None = None
    """progress.loss, rounded: `1.83`."""
    tokens_per_second: str | None = None
    """progress.tokensPerSecond, rounded: `412`."""
    eta: str | None = None
    """progress.etaSeconds for people: `9m`."""
    restarts: str | None = None
    """Restarts of both kinds: `0`."""


class QLoRAJobStatus(Observed):
    """What became of the job. Written by the operator alone."""

    observed_generation: int | None = None
    """The metadata.generation that this status is about."""
    phase: Annotated[names.Phase, Field(strict=False)] | None = None
    """One word for the conditions, from which it is derived."""
    message: str | None = None
    """What the job waits for, or why it ended, in a sentence."""
    conditions: list[Condition] = Field(
        default=[],
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    """The state in full. Initialized is false with NameConflict when another's object has the name of a
    child, and with NoMatchingNodes when no tier of isa.allowed has enough nodes."""
    attempt: int | None = None
    """Number of the current or last attempt; the first is 0."""
    restarts: Restarts | None = None
    """Restarts so far."""
    attempts: list[Attempt] = Field(default=[], max_length=ATTEMPTS_SHOWN)
    """The newest attempts, the oldest of them first."""
    placement: Placement | None = None
    """What the current attempt was given."""
    progress: Progress | None = None
    """How far training is."""
    ranks: list[RankStatus] = Field(default=[], max_length=RANKS_SHOWN)
    """Where the ranks run, the first 64."""
    checkpoint: CheckpointStatus | None = None
    """The newest valid checkpoint."""
    adapter: AdapterStatus | None = None
    """The finished adapter."""
    provenance: Provenance | None = None
    """What the adapter was made from."""
    columns: Columns | None = None
    """Text for `kubectl get`, derived from the rest."""
    start_time: Time | None = None
    """When the job was first active: unsuspended, and let in by its queue. Set anew when it is resumed."""
    completion_time: Time | None = None
    """When it finished, either way."""


class Metadata(Observed):
    """An ObjectMeta, as far as the project reads it."""

    name: str = Field(min_length=1, max_length=names.MAX_JOB_NAME, pattern=names.JOB_NAME_PATTERN)
    """The job's name: the names of its pods and its folder in the workspace begin with it."""
    namespace: str | None = Field(default=None, min_length=1, max_length=63, pattern=DNS_LABEL_PATTERN)
    """The job's namespace."""
    uid: str | None = None
    """Given by the API server."""
    resource_version: str | None = None
    """Given by the API server."""
    generation: int | None = None
    """Given by the API server: counts the changes of spec."""
    creation_timestamp: str | None = None
    """Given by the API server."""
    deletion_timestamp: str | None = None
    """Given by the API server, once the job is being deleted."""
    labels: dict[str, str] = Field(default={})
    """Labels."""
    annotations: dict[str, str] = Field(default={})
    """Annotations."""


class QLoRAJob(ApiModel):
    """One fine-tuning job: a base model and a dataset in, a verified LoRA adapter out."""

    api_version: Literal["qlora.dev/v1alpha1"]
    """Version of this form: qlora.dev/v1alpha1."""
    kind: Literal["QLoRAJob"]
    """QLoRAJob."""
    metadata: Metadata
    """Name, namespace, labels and annotations."""
    spec: QLoRAJobSpec
    status: QLoRAJobStatus | None = None


def ignored_by_run(job: QLoRAJob) -> list[str]:
    """The paths of OPERATOR_ONLY that the job's file sets, in the order of the schema."""
    return [path for path in OPERATOR_ONLY if _is_set(job, path.split("."))]


def _is_set(model: Any, path: list[str]) -> bool:
    fields = {info.alias: name for name, info in type(model).model_fields.items()}
    name = fields[path[0]]
    return name in model.model_fields_set and (len(path) == 1 or _is_set(getattr(model, name), path[1:]))
