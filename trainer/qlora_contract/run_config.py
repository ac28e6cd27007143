"""The wire form: run.json, everything a rank needs to know, fixed for an attempt.

What users write is qlora_operator.api.v1alpha1, where the settings of training are explained; `to_run_config` there is
the only way from one form to the other. Operators and trainer images of different releases meet here, so this form has
a version of its own, and defaults are left out of the text: a field that a release adds does not appear in the run.json
of a job that does not use it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from qlora_contract.base import ContractModel
from qlora_contract.quantization import SchemeName
from qlora_contract.remote import (
    DATASET_PATTERN,
    DESTINATION_PATTERN,
    MAX_URI,
    MIN_URI,
    MODEL_PATTERN,
    PVC_PATTERN,
    REVISION_PATTERN,
    SECRET_PATTERN,
    NamedSource,
    fetched_uri,
    is_remote,
    named_sources,
    parse_remote,
)

RunConfigVersion = Literal[1, 2]
RUN_CONFIG_VERSIONS: tuple[RunConfigVersion, ...] = (1, 2)
"""The versions that this release writes and reads.

1: release 0.1.0, whose trainer refuses any field that it does not know.
2: the trainer passes over unknown fields that say nothing (null, false, 0, "", [], {}).
"""
RUN_CONFIG_VERSION: RunConfigVersion = 2
"""The newest."""

MAX_EVAL_FRACTION = 0.5
COLUMN_PATTERN = r"^[^\x00-\x1f\x7f]+$"
"""A column of the data: any name without control characters."""

TRACKING_URI_PATTERN = (
    r"^https?://[A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?(:[0-9]{1,5})?(/[-A-Za-z0-9._~/]*)?$"
)
"""A server's address, without user, query or fragment."""

BUNDLED = "bundled:"
"""What dataset.chatTemplate begins with when it names one of the trainer's own templates."""
TEMPLATE_FILE = "file:"
"""What it begins with when it names a file of the data's folder, or of the model's."""
CHAT_TEMPLATE_PATTERN = (
    rf"^({BUNDLED}[a-z0-9-]+|{TEMPLATE_FILE}[A-Za-z0-9_][A-Za-z0-9._-]*\.jinja|[\s\S]*\{{[\s\S]*)$"
)

MAX_VIRTUAL_TOKENS = 4096
"""Of prompt and prefix tuning; published recipes have 8 to 256."""
MIN_OWN_TOKENS = 8
"""What maxSequenceLength leaves at least for a sample's own tokens."""

MAX_RANKS = 1024
"""Ranks of a job. Every rank holds a connection to every other."""

IsaTier = Literal["amx_bf16", "avx512_bf16", "avx512", "avx2"]
ISA_TIERS: tuple[IsaTier, ...] = ("amx_bf16", "avx512_bf16", "avx512", "avx2")
"""Best first."""
BF16_NATIVE: frozenset[str] = frozenset({"amx_bf16", "avx512_bf16"})
"""Tiers whose processors compute in bf16 natively; elsewhere it is emulated, 2-5 times slower than fp32."""

MAX_SOURCES = 32
"""Of a dataset. What all of them resolve to must fit into a termination message."""
MAX_WEIGHT = 100.0

RunStage = Literal["fetch", "train", "export", "publish"]
TRANSFERS: tuple[RunStage, ...] = ("fetch", "publish")
"""Stages that reach the network, and alone see credentials for it."""
RecordFormat = Literal["auto", "chat", "prompt-completion", "alpaca", "text"]
Pinning = Literal["strict", "best-effort"]
MemoryTier = Literal["any", "hbm"]
Overlong = Literal["truncate", "drop", "error"]
AdapterMethodName = Literal["lora", "prompt-tuning", "prefix-tuning"]
OutputFormat = Literal["adapter", "merged", "gguf"]
GgufType = Literal["f16", "q8_0", "q4_k_m", "lora"]
RanksPerPod = Annotated[int, Field(ge=1, le=64)] | Literal["auto"]

PvcUri = Annotated[str, Field(min_length=MIN_URI, max_length=MAX_URI, pattern=PVC_PATTERN)]
ModelUri = Annotated[str, Field(min_length=MIN_URI, max_length=MAX_URI, pattern=MODEL_PATTERN)]
DatasetUri = Annotated[str, Field(min_length=MIN_URI, max_length=MAX_URI, pattern=DATASET_PATTERN)]
DestinationUri = Annotated[str, Field(min_length=MIN_URI, max_length=MAX_URI, pattern=DESTINATION_PATTERN)]
SecretName = Annotated[str, Field(min_length=1, max_length=253, pattern=SECRET_PATTERN)]
Revision = Annotated[str, Field(min_length=1, max_length=128, pattern=REVISION_PATTERN)]
ResolvedRevision = Annotated[str, Field(max_length=128, pattern="^[A-Za-z0-9][-A-Za-z0-9._]*$")]
"""Also the name of a folder."""
RevisionOrNone = Annotated[str, Field(max_length=128, pattern="^([A-Za-z0-9][-A-Za-z0-9._]*)?$")]
"""Empty: none."""
Split = Annotated[str, Field(min_length=1, max_length=64, pattern="^[A-Za-z0-9][-A-Za-z0-9_.]*$")]
ColumnName = Annotated[str, Field(min_length=1, max_length=128, pattern=COLUMN_PATTERN)]
Steps = Annotated[int, Field(ge=1, le=100_000_000)]
Tokens = Annotated[int, Field(ge=1, le=16_777_216)]


class ModelSource(ContractModel):
    """The base model."""

    source: ModelUri
    revision: Revision = "main"
    credentials_secret: SecretName | None = None


class Columns(ContractModel):
    """Where the data have other names for what a format reads."""

    messages: ColumnName | None = None
    prompt: ColumnName | None = None
    completion: ColumnName | None = None
    instruction: ColumnName | None = None
    input: ColumnName | None = None
    output: ColumnName | None = None
    system: ColumnName | None = None
    history: ColumnName | None = None
    tools: ColumnName | None = None
    text: ColumnName | None = None


OF_EACH_SOURCE = ("revision", "credentials_secret", "format", "columns", "train_split", "eval_split")
"""Fields of a dataset that with `sources` stand in each of them."""


class DatasetSource(ContractModel):
    """One of several sources of training data."""

    source: DatasetUri
    weight: float = Field(default=1.0, gt=0.0, le=MAX_WEIGHT)
    revision: Revision = "main"
    credentials_secret: SecretName | None = None
    format: RecordFormat = "auto"
    columns: Columns = Columns()
    train_split: Split = "train"
    eval_split: Split | None = None


class Dataset(ContractModel):
    """The training data, and what is held out of it. Either source is given, or sources."""

    source: DatasetUri | None = None
    sources: list[DatasetSource] | None = Field(default=None, min_length=1, max_length=MAX_SOURCES)
    revision: Revision = "main"
    credentials_secret: SecretName | None = None
    format: RecordFormat = "auto"
    columns: Columns = Columns()
    train_split: Split = "train"
    eval_split: Split | None = None
    eval_fraction: float = Field(default=0.05, ge=0.0, le=MAX_EVAL_FRACTION)
    chat_template: str | None = Field(
        default=None, min_length=1, max_length=65_536, pattern=CHAT_TEMPLATE_PATTERN
    )
    chat_template_kwargs: dict[str, Annotated[str, Field(max_length=1024)]] = Field(default={}, max_length=32)
    train: Literal["all", "lastTurn"] = "all"
    on_bad_record: Literal["fail", "skip"] = "fail"
    max_bad_share: float = Field(default=0.01, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _one_source_or_several(self) -> Self:
        if (self.source is None) == (self.sources is None):
            raise ValueError("exactly one of source and sources must be given")
        if self.sources is not None:
            changed = self.model_dump(exclude_defaults=True)
            if said := [
                str(type(self).model_fields[name].alias) for name in OF_EACH_SOURCE if name in changed
            ]:
                raise ValueError(f"with sources, {' and '.join(said)} must be given for each of them")
        return self

    @property
    def all_sources(self) -> list[DatasetSource]:
        """The sources, also where there is one."""
        if self.sources is not None:
            return self.sources
        assert self.source is not None, "one of the two is given"
        return [DatasetSource(source=self.source, **{name: getattr(self, name) for name in OF_EACH_SOURCE})]


class Adapter(ContractModel):
    """The adapter that is trained."""

    method: AdapterMethodName = "lora"
    rank: int = Field(default=16, ge=1, le=512)
    alpha: float = Field(default=32.0, gt=0, le=4096)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default=["all-linear"], min_length=1, max_length=64
    )
    rslora: bool = False
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=512)]] = Field(default={}, max_length=64)
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=4096)]] = Field(default={}, max_length=64)
    lora_plus_ratio: float = Field(default=1.0, ge=1.0, le=1024)
    initial_adapter: ModelUri | None = None
    initial_adapter_revision: Revision | None = None
    initial_adapter_credentials_secret: SecretName | None = None
    num_virtual_tokens: int | None = Field(default=None, ge=1, le=MAX_VIRTUAL_TOKENS)
    prompt_init: Literal["random", "text"] = "random"
    prompt_init_text: str | None = Field(default=None, min_length=1, max_length=4096)
    prefix_projection: bool = False
    encoder_hidden_size: int | None = Field(default=None, ge=1, le=65_536)

    @property
    def virtual_tokens(self) -> int:
        """Tokens that stand before each sample and count in its length; 0 with LoRA."""
        return self.num_virtual_tokens or 0

    @model_validator(mode="after")
    def _has_what_its_method_needs(self) -> Self:
        if (self.num_virtual_tokens is None) != (self.method == "lora"):
            raise ValueError("numVirtualTokens belongs to prompt-tuning and prefix-tuning, which need it")
        if (self.prompt_init_text is None) != (self.prompt_init == "random"):
            raise ValueError("promptInitText belongs to promptInit: text, which needs it")
        if self.initial_adapter is not None and (self.prompt_init == "text" or self.prefix_projection):
            raise ValueError("initialAdapter goes with neither promptInit: text nor prefixProjection")
        return self


class Quantization(ContractModel):
    """How the frozen base weights are stored."""

    scheme: SchemeName = "nf4"
    block_size: Literal[64, 128] = 64
    double_quantization: bool = True


class Training(ContractModel):
    """The training loop's settings. Exactly one of epochs and max_steps is given."""

    epochs: int | None = Field(default=None, ge=1, le=10_000)
    max_steps: Steps | None = None
    global_batch_tokens: Tokens = 8192
    micro_batch_tokens: Tokens | None = None
    max_sequence_length: int = Field(default=1024, ge=8, le=1_048_576)
    packing: bool = True
    overlong: Overlong = "truncate"
    learning_rate: float = Field(default=2e-4, gt=0.0, le=1.0)
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0.0, le=1.0)
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0, le=1e6)
    compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: Literal["auto", "none", "full"] = "auto"
    seed: int = Field(default=0, ge=0, le=4_294_967_295)

    @model_validator(mode="after")
    def _ends_and_fits(self) -> Self:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("exactly one of epochs and maxSteps must be given")
        if self.global_batch_tokens < self.max_sequence_length:
            raise ValueError("globalBatchTokens must be at least maxSequenceLength")
        return self


NOTHING_HELD_OUT = (
    "evaluation.requireImprovement needs data to evaluate on: set dataset.evalFraction above 0 or name a "
    "dataset.evalSplit, or set requireImprovement to false"
)
"""Why a job is refused that has none."""


class Evaluation(ContractModel):
    """When to evaluate, and what must come of it."""

    every_steps: Steps | None = None
    require_improvement: bool = True
    max_tokens: int = Field(default=65_536, ge=1, le=1_000_000_000)
    prompts: int = Field(default=3, ge=0, le=1000)
    keep_best: bool = False
    early_stopping_patience: int | None = Field(default=None, ge=1, le=10_000)


class Checkpoint(ContractModel):
    """When to save what a restart needs."""

    every_steps: Steps | None = None
    every_seconds: int = Field(default=600, ge=1, le=86_400)
    keep: int = Field(default=2, ge=1, le=100)


class Output(ContractModel):
    """Where the finished adapter goes, besides the workspace, and what else is made of it."""

    destination: DestinationUri | None = None
    credentials_secret: SecretName | None = None
    formats: list[OutputFormat] = Field(default=["adapter"], min_length=1, max_length=3)
    gguf_types: list[GgufType] = Field(default=["q8_0"], min_length=1, max_length=4)


class Mlflow(ContractModel):
    """The MLflow tracking server that gets the metrics."""

    uri: str = Field(min_length=8, max_length=512, pattern=TRACKING_URI_PATTERN)
    experiment: str = Field(default="qlora", min_length=1, max_length=256, pattern=COLUMN_PATTERN)
    credentials_secret: SecretName | None = None


class Tracking(ContractModel):
    """Where metrics go besides the workspace."""

    mlflow: Mlflow | None = None


class Distributed(ContractModel):
    """How the ranks talk to each other."""

    backend: Literal["gloo", "ccl", "mpi"] = "gloo"
    timeout_seconds: int = Field(default=300, ge=5, le=86_400)
    rendezvous_timeout_seconds: int = Field(default=1800, ge=5, le=86_400)


class JobRef(ContractModel):
    """Which job, and which attempt at it."""

    name: str = Field(min_length=1, max_length=50)
    namespace: str = Field(default="default", max_length=63)
    uid: str = Field(min_length=1, max_length=64)
    attempt: int = Field(ge=0)


class Layout(ContractModel):
    """Pods, ranks and what each rank has.

    With `auto` the launchers make a rank of each NUMA cluster of their pod's CPUs, and `cpus_per_rank` and
    `memory_per_rank` are the pod's. `with_rank_counts` gives the layout that results.
    """

    pods: int = Field(default=1, ge=1, le=512)
    ranks_per_pod: RanksPerPod = 1
    cpus_per_rank: int = Field(default=4, ge=1, le=1024)
    memory_per_rank: int = Field(ge=1)
    """Bytes."""
    pinning: Pinning = "strict"
    memory_tier: MemoryTier = "any"
    ranks: int | None = Field(default=None, ge=1)
    """Ranks of all pods, once the launchers know how many `auto` makes."""

    @property
    def pod_cpus(self) -> int:
        """CPUs of a pod."""
        return self.cpus_per_rank * (1 if self.ranks_per_pod == "auto" else self.ranks_per_pod)

    @property
    def world_size(self) -> int:
        """Ranks of all pods. Raises ValueError while the launchers have yet to agree on it."""
        if self.ranks is not None:
            return self.ranks
        if self.ranks_per_pod == "auto":
            raise ValueError("ranksPerPod is auto: the launchers have not yet agreed on the number of ranks")
        return self.pods * self.ranks_per_pod

    def with_rank_counts(self, counts: Sequence[int]) -> Self:
        """The layout with what `auto` means: every rank gets what a rank of the fullest pod gets.

        Args:
            counts: ranks of each pod, as the launchers agreed on.
        """
        if self.ranks_per_pod != "auto":
            return self
        most = max(counts)
        return self.model_copy(
            update={
                "ranks": sum(counts),
                "ranks_per_pod": most,
                "cpus_per_rank": max(1, self.cpus_per_rank // most),
                "memory_per_rank": self.memory_per_rank // most,
            }
        )


class ResolvedRevisions(ContractModel):
    """What the remote sources stood for when they were fetched; unset for those on a claim."""

    model: ResolvedRevision | None = None
    """Commit of the Hub, or hash over a bucket's listing."""
    dataset: ResolvedRevision | None = None
    """As for the model."""
    sources: list[RevisionOrNone] | None = Field(default=None, max_length=MAX_SOURCES)
    """The same of each of dataset.sources; empty for those on a claim. None: nothing is known of any."""
    adapter: ResolvedRevision | None = None
    """As for the model, of adapter.initialAdapter."""

    def of(self, source: NamedSource) -> str | None:
        """What a source resolved to; None while that is not known."""
        if source.number is None:
            return {"model": self.model, "dataset": self.dataset, "adapter": self.adapter}[source.role]
        known = self.sources or []
        return (known[source.number] or None) if source.number < len(known) else None

    @classmethod
    def from_sources(cls, found: Sequence[tuple[NamedSource, str | None]]) -> Self:
        """Of all sources of a job, and what each resolved to."""
        listed = [revision or "" for source, revision in found if source.number is not None]
        single = {source.role: revision for source, revision in found if source.number is None}
        return cls(**single, sources=listed if any(listed) else None)


class RunConfig(ContractModel):
    """run.json: one attempt at a job, the same for every pod of it."""

    version: RunConfigVersion = RUN_CONFIG_VERSION
    """The version that the job's image reads: `to_json` writes that one."""
    stage: RunStage = "train"
    """What the attempt does: fetch remote sources into the workspace, train, make output.formats of the finished
    adapter, or send them to output.destination."""
    job: JobRef
    fetched: ResolvedRevisions = ResolvedRevisions()
    """Revisions to train on; for the stage `fetch`, those that are known already."""
    workspace: PvcUri
    model: ModelSource
    dataset: Dataset
    adapter: Adapter = Adapter()
    quantization: Quantization = Quantization()
    training: Training
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    output: Output = Output()
    tracking: Tracking = Tracking()
    distributed: Distributed = Distributed()
    layout: Layout
    isa: IsaTier
    """The tier every rank must have."""
    termination_grace_period_seconds: int = Field(default=300, ge=1, le=86_400)
    """Seconds between SIGTERM and SIGKILL."""
    progress_deadline_seconds: int = Field(default=1800, ge=1, le=2_147_483_647)
    """Seconds without anything done after which the ranks are restarted."""

    @model_validator(mode="after")
    def _fits_its_method(self) -> Self:
        if self.adapter.virtual_tokens + MIN_OWN_TOKENS > self.training.max_sequence_length:
            raise ValueError(
                "maxSequenceLength counts virtual tokens, too: it must be at least 8 more than numVirtualTokens"
            )
        if self.adapter.method != "lora" and set(self.output.formats) != {"adapter"}:
            raise ValueError(
                "only an adapter of method lora can become part of the weights: leave formats out"
            )
        return self

    @property
    def own_tokens(self) -> int:
        """Of the longest sample: maxSequenceLength without the virtual tokens before it."""
        return self.training.max_sequence_length - self.adapter.virtual_tokens

    @property
    def sources(self) -> list[NamedSource]:
        """All that the job reads, the model first."""
        return named_sources(
            self.model, self.dataset.all_sources, self.adapter, listed=self.dataset.sources is not None
        )

    @property
    def model_uri(self) -> str:
        """`pvc://` URI of the model's folder: as given, or where the fetch has put it. Raises ValueError when a remote
        one was not fetched."""
        return _local(self.model.source, self.fetched.model, self.workspace)

    @property
    def dataset_uris(self) -> list[str]:
        """`pvc://` URI of each source of the dataset, as for the model."""
        return [
            _local(source.uri, self.fetched.of(source), self.workspace)
            for source in self.sources
            if source.role == "dataset"
        ]

    @property
    def initial_adapter_uri(self) -> str | None:
        """`pvc://` URI of the initial adapter's folder, as for the model; None without one."""
        initial = self.adapter.initial_adapter
        return None if initial is None else _local(initial, self.fetched.adapter, self.workspace)

    def to_json(self, indent: int | None = 2) -> str:
        """The text of run.json, without the fields that have their default.

        Release 0.1.0 wrote all of them, and reads a text without them just as well.
        """
        fields = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        separators = (",", ":") if indent is None else None
        return json.dumps(
            {"version": self.version} | fields, ensure_ascii=False, indent=indent, separators=separators
        )


def _local(source: str, revision: str | None, workspace: str) -> str:
    if not is_remote(source):
        return source
    if revision is None:
        raise ValueError(f"{source} was not fetched")
    return fetched_uri(workspace, parse_remote(source), revision)


SINCE: Mapping[str, int] = {
    "adapter.alphaPattern": 2,
    "adapter.encoderHiddenSize": 2,
    "adapter.initialAdapter": 2,
    "adapter.initialAdapterCredentialsSecret": 2,
    "adapter.initialAdapterRevision": 2,
    "adapter.loraPlusRatio": 2,
    "adapter.method=prefix-tuning": 2,
    "adapter.method=prompt-tuning": 2,
    "adapter.numVirtualTokens": 2,
    "adapter.prefixProjection": 2,
    "adapter.promptInit": 2,
    "adapter.promptInitText": 2,
    "adapter.rankPattern": 2,
    "adapter.rslora": 2,
    **dict.fromkeys((f"dataset.columns.{name}" for name in Columns.model_fields), 2),
    "dataset.chatTemplate": 2,
    "dataset.chatTemplateKwargs": 2,
    "dataset.format=alpaca": 2,
    "dataset.format=text": 2,
    "dataset.maxBadShare": 2,
    "dataset.onBadRecord": 2,
    "dataset.source=https://": 2,
    "dataset.sources": 2,
    "dataset.train": 2,
    "evaluation.earlyStoppingPatience": 2,
    "evaluation.keepBest": 2,
    "evaluation.maxTokens": 2,
    "progressDeadlineSeconds": 2,
    "evaluation.prompts": 2,
    "tracking": 2,
    "tracking.mlflow": 2,
    "tracking.mlflow.credentialsSecret": 2,
    "tracking.mlflow.experiment": 2,
    "tracking.mlflow.uri": 2,
    "training.overlong=drop": 2,
    "training.overlong=error": 2,
    "output.destination=oci://": 2,
    "output.formats": 2,
    "output.ggufTypes": 2,
    "quantization.blockSize=128": 2,
    "quantization.scheme=fp4": 2,
    "quantization.scheme=int8": 2,
}
"""The version that brought a field (`training.someField`) or a value (`quantization.scheme=int8`), or a
scheme of a URI (`output.destination=oci://`): every field and value is of version 1 unless it stands here. A trainer of
an earlier version must not get what it does not know."""


def newer_than(run: RunConfig, version: int) -> list[str]:
    """The fields and values of SINCE that a run uses and a trainer of this version does not know."""
    used = _leaves(run.model_dump(mode="json", by_alias=True, exclude_defaults=True), "")
    return [what for what in used if SINCE.get(what, version) > version]


def oldest_version(run: RunConfig) -> RunConfigVersion:
    """The oldest version that knows all that a run uses: what most trainer images can read."""
    return next(version for version in RUN_CONFIG_VERSIONS if not newer_than(run, version))


def _leaves(fields: Mapping[str, Any], path: str) -> Iterator[str]:
    """The paths of what is set, and those of values with their values; a map is a value of its path, too."""
    for name, value in fields.items():
        yield f"{path}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}={value}"
            if isinstance(value, str) and "://" in value:
                yield f"{path}{name}={value.partition('://')[0]}://"
