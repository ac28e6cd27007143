"""What users write: version v1alpha1 of the API.

The docstring under a field is its description in the CRD, in `kubectl explain` and in the field reference. An object
without its own docstring has that of its class. Ranks read another form, qlora_contract.run_config, which
qlora_operator.api.run_config makes from this one.
"""

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic.alias_generators import to_snake
from pydantic_core import PydanticCustomError

from qlora_contract.quantization import SCHEMES, SchemeName
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
    named_sources,
)
from qlora_contract.run_config import (
    CHAT_TEMPLATE_PATTERN,
    COLUMN_PATTERN,
    ISA_TIERS,
    MAX_EVAL_FRACTION,
    MAX_RANKS,
    MAX_SOURCES,
    MAX_VIRTUAL_TOKENS,
    MAX_WEIGHT,
    MIN_OWN_TOKENS,
    OF_EACH_SOURCE,
    TRACKING_URI_PATTERN,
    AdapterMethodName,
    GgufType,
    IsaTier,
    OutputFormat,
    RecordFormat,
)
from qlora_operator.api import names, quantity
from qlora_operator.api.cron import CRON_PATTERN, MAX_CRON, is_cron
from qlora_operator.api.rules import ApiModel, Rule
from qlora_operator.api.status import QLoRAJobStatus, StatusModel

MAX_SECONDS = 2_147_483_647
"""The longest time span: what Kubernetes' own int32 fields hold, 68 years."""
MAX_RESTARTS = 10_000
"""Keeps the number of an attempt well below the 10^6 that fits its name."""

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
TIME_ZONE_PATTERN = "^[A-Za-z][-A-Za-z0-9_+]*(/[A-Za-z0-9][-A-Za-z0-9_+]*)*$"
MAX_WINDOWS = 16
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
        "schedule",
        "tracking",
    }
)
"""Fields of spec that may change at any time."""
MUTABLE_WHILE_SUSPENDED = frozenset({"topology", "scheduling"})
"""Fields of spec that may change while the job is suspended, or with the change that suspends or resumes it."""

OPERATOR_ONLY = (
    "spec.model.credentialsSecret",
    "spec.dataset.credentialsSecret",
    "spec.dataset.sources.credentialsSecret",
    "spec.adapter.initialAdapterCredentialsSecret",
    "spec.output.credentialsSecret",
    "spec.tracking.mlflow.credentialsSecret",
    "spec.topology.minPods",
    "spec.isa.stepDownSeconds",
    "spec.scheduling",
    "spec.schedule",
    "spec.image",
    "spec.suspend",
    "spec.managedBy",
    "spec.ttlSecondsAfterFinished",
    "spec.activeDeadlineSeconds",
    "spec.backoffLimit",
    "spec.infrastructureBackoffLimit",
    "spec.pendingDeadlineSeconds",
)
"""Fields that only the operator uses: `qlora run` ignores them, and names those that a file sets."""


class ModelSource(ApiModel):
    """The base model: a Hugging Face folder with safetensors weights. No remote code is run."""

    source: str = Field(min_length=MIN_URI, max_length=MAX_URI, pattern=MODEL_PATTERN)
    """Folder with config.json, tokenizer files and *.safetensors: `pvc://claim/path`; or `hf://org/name` or
    `s3://bucket/path`, which is fetched into the workspace first."""
    revision: str = Field(default="main", min_length=1, max_length=128, pattern=REVISION_PATTERN)
    """Branch, tag or commit of a model on the Hub. The job keeps the commit that it resolves to at the first fetch."""
    credentials_secret: str | None = Field(default=None, min_length=1, max_length=253, pattern=SECRET_PATTERN)
    """Secret in the job's namespace to fetch the model with: key `token` for hf://; keys
    `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` for s3://. Unset: none, or the platform's workload
    identity."""


class Columns(ApiModel):
    """Where the data have other names for what a format reads. Unset: the format's own name."""

    messages: str | None = Field(default=None, min_length=1, max_length=128, pattern=COLUMN_PATTERN)
    """Column with the conversation, of the format chat."""
    prompt: str | None = Field(default=None, min_length=1, max_length=128, pattern=COLUMN_PATTERN)
    """Column with the prompt, of the format prompt-completion."""
    completion: str | None = Field(default=None, min_length=1, max_length=128, pattern=COLUMN_PATTERN)
    """Column with the completion, of the format prompt-completion."""
    instruction: str | None = Field(default=None, min_length=1, max_length=128, pattern=COLUMN_PATTERN)
    """Column with the instruction, of the format alpaca."""
    input: str | None = Field(default=None, min_length=1, max_length=128, pattern=COLUMN_PATTERN)
    """Column with what the instruction is about, of the format alpaca."""
    output: str | None = Field(default=None, min_length=1, max_length=128, pattern=COLUMN_PATTERN)
    """Column with the answer, of the format alpaca."""
    system: str | None = Field(default=None, min_length=1, max_length=128, pattern=COLUMN_PATTERN)
    """Column with the system message, of the formats chat and alpaca."""
    history: str | None = Field(default=None, min_length=1, max_length=128, pattern=COLUMN_PATTERN)
    """Column with earlier questions and answers, of the format alpaca."""
    tools: str | None = Field(default=None, min_length=1, max_length=128, pattern=COLUMN_PATTERN)
    """Column with what the assistant may call, of the formats chat and alpaca."""
    text: str | None = Field(default=None, min_length=1, max_length=128, pattern=COLUMN_PATTERN)
    """Column with the text, of the format text."""


_REVISION_OF_HUB = "requires an hf:// source"
_SECRET_OF_REMOTE = "requires an hf:// or s3:// source"  # noqa: S105 - no secret
_INSIDE = "must stay within its claim: the path may not contain `..`"


class DatasetSource(ApiModel):
    """One of several sources of training data."""

    source: str = Field(min_length=MIN_URI, max_length=MAX_URI, pattern=DATASET_PATTERN)
    """File or folder with records, as dataset.source names one."""
    weight: float = Field(default=1.0, gt=0.0, le=MAX_WEIGHT)
    """How often each of the source's samples is trained on in an epoch: 2, twice; 0.5, every other sample in one epoch
    and the rest in the next. 1, the default: the sources are put together as they are. Evaluation samples do not
    have it."""
    revision: str = Field(default="main", min_length=1, max_length=128, pattern=REVISION_PATTERN)
    """Branch, tag or commit of a dataset on the Hub. The job keeps the commit that it resolves to at the first
    fetch."""
    credentials_secret: str | None = Field(default=None, min_length=1, max_length=253, pattern=SECRET_PATTERN)
    """Secret in the job's namespace to fetch the source with, with the same keys as for the model."""
    format: RecordFormat = "auto"
    """What the source's records are, as dataset.format has it."""
    columns: Columns = Columns()
    """Where the source has other names for what a format reads."""
    train_split: str = Field(
        default="train", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$"
    )
    """Split to train on when the source is a folder."""
    eval_split: str | None = Field(
        default=None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$"
    )
    """Split to evaluate on when the source is a folder; without it, dataset.evalFraction of the source's training split
    is held out."""

    # has(), since an API server hands items out without defaults.
    rules = (
        Rule(
            cel="!(self.source + '/').contains('/../')",
            holds=lambda each: _stays_inside(each.source),
            message=_INSIDE,
            field=("source",),
        ),
        Rule(
            cel="!has(self.revision) || self.revision == 'main' || self.source.startsWith('hf://')",
            holds=lambda each: each.revision == "main" or each.source.startswith("hf://"),
            message=_REVISION_OF_HUB,
            field=("revision",),
        ),
        Rule(
            cel=(
                "!has(self.credentialsSecret) || self.source.startsWith('hf://') || self.source.startsWith('s3://')"
            ),
            holds=lambda each: each.credentials_secret is None or each.source.startswith(("hf://", "s3://")),
            message=_SECRET_OF_REMOTE,
            field=("credentialsSecret",),
        ),
    )


_SET_COLUMNS = " || ".join(f"has(self.columns.{name})" for name in Columns.model_fields)


class Dataset(ApiModel):
    """The training data, and the part of it that is held out for evaluation. Either source is given, or sources."""

    source: str | None = Field(default=None, min_length=MIN_URI, max_length=MAX_URI, pattern=DATASET_PATTERN)
    """File with records (JSONL, JSON, CSV, TSV, Parquet, Arrow, text), or folder in which split S is the file S.jsonl,
    the files S-00000-of-00004.parquet, or the folder S: `pvc://claim/path`; or `hf://datasets/org/name/path`,
    `s3://bucket/path` or the `https://host/path` of a file, which is fetched into the workspace first."""
    sources: list[DatasetSource] | None = Field(default=None, min_length=1, max_length=MAX_SOURCES)
    """Several sources in place of one, mixed in one order that the seed decides. Each has its own revision, Secret,
    format, columns and splits; all else here is for all of them."""
    revision: str = Field(default="main", min_length=1, max_length=128, pattern=REVISION_PATTERN)
    """Branch, tag or commit of a dataset on the Hub. The job keeps the commit that it resolves to at the first
    fetch."""
    credentials_secret: str | None = Field(default=None, min_length=1, max_length=253, pattern=SECRET_PATTERN)
    """Secret in the job's namespace to fetch the dataset with, with the same keys as for the model."""
    format: RecordFormat = "auto"
    """`chat`: {"messages": [{"role", "content"}, ...]}, or conversations as ShareGPT has them; `prompt-completion`:
    {"prompt", "completion"}; `alpaca`: {"instruction", "input", "output"}, written as a conversation; `text`:
    {"text"}, learned as a whole; `auto`: detected from the first record."""
    columns: Columns = Columns()
    """Where the data have other names for what a format reads: question and answer, say, for instruction and output."""
    train_split: str = Field(
        default="train", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$"
    )
    """Split to train on when the source is a folder."""
    eval_split: str | None = Field(
        default=None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$"
    )
    """Split to evaluate on when the source is a folder; without it, evalFraction of the training split is held out."""
    eval_fraction: float = Field(default=0.05, ge=0.0, le=MAX_EVAL_FRACTION)
    """Share of the records held out for evaluation, chosen by each record's hash, so that it does not
    change with the order of the file; at least one record. 0: no evaluation. Not used with evalSplit."""
    chat_template: str | None = Field(
        default=None, min_length=1, max_length=65_536, pattern=CHAT_TEMPLATE_PATTERN
    )
    """What writes conversations in place of the model's own chat template, and goes along with the adapter: the text of
    a template (Jinja); `file:NAME.jinja`, a file in the folder of the data or, if it is not there, in the model's;
    `bundled:NAME`, one of the trainer's; or `bundled:auto`, the one of these that fits the model, if its own cannot do
    as well."""
    chat_template_kwargs: dict[str, Annotated[str, Field(max_length=1024)]] = Field(default={}, max_length=32)
    """Variables of the chat template, such as `enable_thinking: "false"`. `true` and `false` are handed to it as
    booleans, whole numbers as numbers, all else as text."""
    train: Literal["all", "lastTurn"] = "all"
    """Which turns of the assistant are learned: `all`, or `lastTurn`, what it says after the last message of the
    user. A turn that the data exclude is never learned."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """What to do with a record that cannot be trained on: `fail` ends the job and names the first ten; `skip` leaves it
    out, and counts it in the log and in training_report.json."""
    max_bad_share: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of a split's records that onBadRecord `skip` leaves out at most, of each source; with more, the job
    fails."""

    rules = (
        Rule(
            cel="has(self.source) != has(self.sources)",
            holds=lambda dataset: (dataset.source is None) != (dataset.sources is None),
            message="exactly one of source and sources must be given",
        ),
        Rule(
            cel=(
                "!has(self.sources) || (self.revision == 'main' && !has(self.credentialsSecret) && "
                "self.format == 'auto' && self.trainSplit == 'train' && !has(self.evalSplit) && "
                f"(!has(self.columns) || !({_SET_COLUMNS})))"
            ),
            holds=lambda dataset: (
                dataset.sources is None
                or all(
                    getattr(dataset, name) == dataset.__class__.model_fields[name].default
                    for name in OF_EACH_SOURCE
                )
            ),
            message=(
                "with sources, revision, credentialsSecret, format, columns, trainSplit and evalSplit must be given "
                "for each of them"
            ),
        ),
    )

    @property
    def all_sources(self) -> list[DatasetSource]:
        """The sources, also where there is one."""
        if self.sources is not None:
            return self.sources
        assert self.source is not None, "one of the two is given"
        return [DatasetSource(source=self.source, **{name: getattr(self, name) for name in OF_EACH_SOURCE})]


_LORA_SETTINGS: tuple[tuple[str, str, Any], ...] = (
    ("rank", "self.rank == 16", 16),
    ("alpha", "self.alpha == 32.0", 32.0),
    ("dropout", "self.dropout == 0.0", 0.0),
    ("targetModules", "self.targetModules == ['all-linear']", ["all-linear"]),
    ("rslora", "!has(self.rslora) || !self.rslora", False),
    ("rankPattern", "!has(self.rankPattern) || size(self.rankPattern) == 0", {}),
    ("alphaPattern", "!has(self.alphaPattern) || size(self.alphaPattern) == 0", {}),
    ("loraPlusRatio", "!has(self.loraPlusRatio) || self.loraPlusRatio == 1.0", 1.0),
)
"""Settings that other methods do not have: name, its being at its default in CEL, and that default.

An API server puts rules to the section's own default, {}, as well, in which `method` is not set.
"""


def _of_lora(field: str, at_default: str, default: Any) -> Rule:
    name = to_snake(field)
    return Rule(
        cel=f"!has(self.method) || self.method == 'lora' || {at_default}",
        holds=lambda adapter: adapter.method == "lora" or getattr(adapter, name) == default,
        message="is a setting of method lora, which prompt-tuning and prefix-tuning do not have: leave it out",
        field=(field,),
    )


class Adapter(ApiModel):
    """The adapter that is trained."""

    method: AdapterMethodName = "lora"
    """`lora`: W x + (alpha / rank) B A x (Hu et al. 2021). `prompt-tuning`: trained rows before the embeddings of each
    sample (Lester et al. 2021). `prefix-tuning`: trained keys and values before those of each sample, in every layer
    (P-tuning v2, Liu et al. 2022). The last two learn at higher rates: set training.learningRate, 0.001 to 0.03."""
    rank: int = Field(default=16, ge=1, le=512)
    """Rows of A, columns of B."""
    alpha: float = Field(default=32.0, gt=0, le=4096)
    """Numerator of the scale alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability with which an input of A is zeroed while training."""
    target_modules: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default=["all-linear"], min_length=1, max_length=64
    )
    """Names of linear layers to adapt, by their last part (`q_proj`) or whole path;
    `all-linear`: every linear layer but the output head. The experts of a mixture are named as PEFT's target_parameters
    are, `experts.gate_up_proj` and `experts.down_proj`; no other name means them."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023): what an adapter adds then does not
    shrink as its rank grows. Off, as in PEFT."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=512)]] = Field(default={}, max_length=64)
    """Layers with a rank of their own, named as in targetModules: `{down_proj: 32}`. No layer may be named twice."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=4096)]] = Field(default={}, max_length=64)
    """Layers with an alpha of their own, as in rankPattern."""
    lora_plus_ratio: float = Field(default=1.0, ge=1.0, le=1024)
    """How many times learningRate the B matrices learn at: LoRA+ (Hayou et al. 2024), which recommends 16. 1: no
    difference, as in PEFT."""
    initial_adapter: str | None = Field(
        default=None, min_length=MIN_URI, max_length=MAX_URI, pattern=MODEL_PATTERN
    )
    """Adapter to go on from, with other data, say: a folder as PEFT writes it, `pvc://claim/path`, such as
    `jobs/<name>/adapter` of a workspace; or `hf://org/name` or `s3://bucket/path`, which is fetched into the workspace
    first. It must be of the same base, and method, ranks, alphas and layers, or the number of virtual tokens, must be
    those of this job. Unset: a new adapter; of method lora it changes nothing before the first step."""
    initial_adapter_revision: str | None = Field(
        default=None, min_length=1, max_length=128, pattern=REVISION_PATTERN
    )
    """Branch, tag or commit of an initial adapter on the Hub; unset: `main`. The job keeps the commit that it resolves
    to at the first fetch."""
    initial_adapter_credentials_secret: str | None = Field(
        default=None, min_length=1, max_length=253, pattern=SECRET_PATTERN
    )
    """Secret in the job's namespace to fetch the initial adapter with, with the same keys as for the model."""
    num_virtual_tokens: int | None = Field(default=None, ge=1, le=MAX_VIRTUAL_TOKENS)
    """Trained tokens before each sample, of prompt-tuning and prefix-tuning, which need it; 20 to 100 are usual. They
    count in maxSequenceLength and globalBatchTokens as the sample's own tokens do."""
    prompt_init: Literal["random", "text"] = "random"
    """What virtual tokens start as: `random`, as PEFT draws them, far from anything that the model knows; or `text`,
    the embeddings, or the keys and values, of promptInitText, from which few steps are enough. Not with
    prefixProjection."""
    prompt_init_text: str | None = Field(default=None, min_length=1, max_length=4096)
    """What the model is to do, in words. Repeated or cut off to numVirtualTokens tokens."""
    prefix_projection: bool = False
    """Whether an MLP makes the keys and values of prefix-tuning while it trains, which can help with few data; it is
    not part of the finished adapter."""
    encoder_hidden_size: int | None = Field(default=None, ge=1, le=65_536)
    """The hidden width of that MLP. Unset: that of a layer's keys, as in PEFT."""

    rules = (
        *(_of_lora(*setting) for setting in _LORA_SETTINGS),
        Rule(
            cel="has(self.numVirtualTokens) == (has(self.method) && self.method != 'lora')",
            holds=lambda adapter: (adapter.num_virtual_tokens is not None) == (adapter.method != "lora"),
            message="prompt-tuning and prefix-tuning need a number of virtual tokens, such as 32; lora has none",
            field=("numVirtualTokens",),
        ),
        Rule(
            cel="!has(self.promptInit) || self.promptInit == 'random' || (has(self.method) && self.method != 'lora' && "
            "!(has(self.prefixProjection) && self.prefixProjection))",
            holds=lambda adapter: (
                (adapter.method != "lora" and not adapter.prefix_projection)
                or adapter.prompt_init == "random"
            ),
            message="only virtual tokens can start as a text, and not those that prefixProjection makes: leave it out",
            field=("promptInit",),
        ),
        Rule(
            cel="has(self.promptInitText) == (has(self.promptInit) && self.promptInit == 'text')",
            holds=lambda adapter: (adapter.prompt_init_text is not None) == (adapter.prompt_init == "text"),
            message="belongs to promptInit text, which needs it",
            field=("promptInitText",),
        ),
        Rule(
            cel="(has(self.method) && self.method == 'prefix-tuning') || "
            "!has(self.prefixProjection) || !self.prefixProjection",
            holds=lambda adapter: adapter.method == "prefix-tuning" or not adapter.prefix_projection,
            message="is of method prefix-tuning alone: it makes keys and values",
            field=("prefixProjection",),
        ),
        Rule(
            cel="!has(self.encoderHiddenSize) || (has(self.prefixProjection) && self.prefixProjection)",
            holds=lambda adapter: adapter.encoder_hidden_size is None or adapter.prefix_projection,
            message="is the width of the MLP that prefixProjection asks for: set that to true, or leave this out",
            field=("encoderHiddenSize",),
        ),
        Rule(
            cel="!has(self.initialAdapter) || !((has(self.promptInit) && self.promptInit == 'text') || "
            "(has(self.prefixProjection) && self.prefixProjection))",
            holds=lambda adapter: (
                adapter.initial_adapter is None
                or (adapter.prompt_init == "random" and not adapter.prefix_projection)
            ),
            message="is what virtual tokens start as: leave out promptInit, and prefixProjection, whose MLP no "
            "finished adapter has",
            field=("initialAdapter",),
        ),
        Rule(
            cel="!has(self.initialAdapterRevision) || "
            "(has(self.initialAdapter) && self.initialAdapter.startsWith('hf://'))",
            holds=lambda adapter: (
                adapter.initial_adapter_revision is None
                or (adapter.initial_adapter or "").startswith("hf://")
            ),
            message="requires an initialAdapter of hf://",
            field=("initialAdapterRevision",),
        ),
        Rule(
            cel="!has(self.initialAdapterCredentialsSecret) || (has(self.initialAdapter) && "
            "(self.initialAdapter.startsWith('hf://') || self.initialAdapter.startsWith('s3://')))",
            holds=lambda adapter: (
                adapter.initial_adapter_credentials_secret is None
                or (adapter.initial_adapter or "").startswith(("hf://", "s3://"))
            ),
            message="requires an initialAdapter of hf:// or s3://",
            field=("initialAdapterCredentialsSecret",),
        ),
    )


class Quantization(ApiModel):
    """How the frozen base weights are stored."""

    scheme: SchemeName = Field(
        default="nf4",
        description="; ".join(f"`{name}`: {facts.description}" for name, facts in SCHEMES.items()) + ".",
    )
    block_size: Literal[64, 128] = 64
    """Weights that share one scale, of nf4 and fp4: the smaller, the nearer to the model."""
    double_quantization: bool = True
    """Quantize the scales of nf4 and fp4, too: saves 0.37 bit per weight with blocks of 64."""


class Training(ApiModel):
    """The training loop's settings. Exactly one of epochs and maxSteps is given."""

    epochs: int | None = Field(default=None, ge=1, le=10_000)
    """Passes over the training data."""
    max_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    """Optimizer steps, over as many passes as they take."""
    global_batch_tokens: int = Field(default=8192, ge=1, le=16_777_216)
    """Tokens of one optimizer step over all ranks, at most. The number of ranks never changes it."""
    micro_batch_tokens: int | None = Field(default=None, ge=1, le=16_777_216)
    """Tokens that a rank processes at once: it trades memory for speed and never changes the result. Unset: as many as
    fit memoryPerRank, at most the rank's share of a step."""
    max_sequence_length: int = Field(default=1024, ge=8, le=1_048_576)
    """Length of the longest sample, and of a bin of packed samples, in tokens."""
    packing: bool = True
    """Pack several samples into one bin; they do not attend to each other."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with a sample longer than maxSequenceLength: `truncate` cuts off its end; `drop` leaves it out, and
    counts it; `error` makes it a bad record, of which dataset.onBadRecord says what happens."""
    learning_rate: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: falls to 0 linearly, falls to 0 along a half cosine, or stays constant."""
    warmup_ratio: float = Field(default=0.03, ge=0.0, le=1.0)
    """Share of all steps in which the learning rate rises linearly to its peak. No step has a rate of 0."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0.0, le=1e6)
    """The gradient is scaled down to this norm when its norm is larger."""
    compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the processors of all ranks support it natively (AMX, AVX512-BF16), otherwise fp32."""
    gradient_checkpointing: Literal["auto", "none", "full"] = "auto"
    """`full` recomputes each layer in the backward pass: less memory, a third more time. `auto`: none if one bin fits
    memoryPerRank without it, otherwise full."""
    seed: int = Field(default=0, ge=0, le=4_294_967_295)
    """Seeds the adapter's initial weights, the order of the samples, and dropout."""

    @model_validator(mode="after")
    def _steps_given_once(self) -> Self:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("exactly one of epochs and maxSteps must be given")
        return self

    @model_validator(mode="after")
    def _a_bin_fits_a_step(self) -> Self:
        if self.global_batch_tokens < self.max_sequence_length:
            raise ValueError("globalBatchTokens must be at least maxSequenceLength")
        return self


class Evaluation(ApiModel):
    """When to evaluate, and what the result must be. The base and the finished adapter are always evaluated."""

    every_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    """Also evaluate each time this many steps are done."""
    require_improvement: bool = True
    """Fail the job when the adapter's eval loss is not below that of the quantized base, and of initialAdapter."""
    max_tokens: int = Field(default=65_536, ge=1, le=1_000_000_000)
    """Evaluate on at most so many tokens: samples are chosen by a hash of their tokens, the same ones each time, and at
    least one. The default takes about as long as three steps of the default size."""
    prompts: int = Field(default=3, ge=0, le=1000)
    """Prompts of the held-out data that the base and the finished adapter answer at the end, side by side in the
    report in the workspace, which is never uploaded. A minute is spent on each at most. 0: none. The default shows
    whether the adapter does what was meant, which no loss tells, and takes less than an evaluation as a rule: they
    are answered together, in 32 tokens each."""
    keep_best: bool = False
    """Publish the adapter as it was at the evaluation with the lowest loss, in place of the last one, and keep that
    step's checkpoint until then. Requires everySteps. Off: the last step is published, as in transformers."""
    early_stopping_patience: int | None = Field(default=None, ge=1, le=10_000)
    """End training once so many evaluations in a row have found no lower loss. Requires keepBest. Unset: train to the
    last step."""

    rules = (
        Rule(
            cel="!has(self.keepBest) || !self.keepBest || has(self.everySteps)",
            holds=lambda evaluation: not evaluation.keep_best or evaluation.every_steps is not None,
            message="requires everySteps: the best of one evaluation is the last step",
            field=("keepBest",),
        ),
        Rule(
            cel="!has(self.earlyStoppingPatience) || (has(self.keepBest) && self.keepBest)",
            holds=lambda evaluation: evaluation.early_stopping_patience is None or evaluation.keep_best,
            message="requires keepBest: true, or what is published is what training got worse to",
            field=("earlyStoppingPatience",),
        ),
    )


class Checkpoint(ApiModel):
    """When to save the state that a restart needs."""

    every_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    """Also save each time this many steps are done."""
    every_seconds: int = Field(default=600, ge=1, le=86_400)
    """Save when this many seconds have passed since the last checkpoint."""
    keep: int = Field(default=2, ge=1, le=100)
    """Number of checkpoints to keep, the newest."""


class Output(ApiModel):
    """Where the finished adapter goes, besides the workspace, and what else is made of it."""

    destination: str | None = Field(
        default=None, min_length=MIN_URI, max_length=MAX_URI, pattern=DESTINATION_PATTERN
    )
    """`hf://org/name`, `s3://bucket/path` or, as an OCI artifact, `oci://registry/name:tag` to which a copy of the
    adapter is uploaded. Unset: it stays in the workspace only."""
    credentials_secret: str | None = Field(default=None, min_length=1, max_length=253, pattern=SECRET_PATTERN)
    """Secret in the job's namespace to upload the copy with; the keys are those of model.credentialsSecret; for oci://
    it is of type kubernetes.io/dockerconfigjson."""
    formats: list[OutputFormat] = Field(default=["adapter"], min_length=1, max_length=3)
    """What is made once training is done: `adapter`, in PEFT's format, always; `merged`, the original weights with the
    adapter in them, which every program loads that loads the base; `gguf`, files for llama.cpp and Ollama. They are in
    `jobs/<name>/exports`, each opened again and compared with the trained model before it gets its name. A pod
    of one rank makes them when the ranks have left their nodes; it has what each of them had."""
    gguf_types: list[GgufType] = Field(default=["q8_0"], min_length=1, max_length=4)
    """Which GGUF files `gguf` makes: `f16`, `q8_0` and `q4_k_m` are the whole model, of 2, 1.1 and 0.6 bytes a weight;
    `lora` is the adapter alone, for a base that is in GGUF already. The default is half the size of `f16`, and hardly
    differs from it."""


class Mlflow(ApiModel):
    """The MLflow tracking server that gets the metrics: one run for all attempts of the job. Training goes on when the
    server is down."""

    uri: str = Field(min_length=8, max_length=512, pattern=TRACKING_URI_PATTERN)
    """Address of the server, such as `http://mlflow.tracking.svc:5000`; the cluster's administrator must allow it."""
    experiment: str = Field(default="qlora", min_length=1, max_length=256, pattern=COLUMN_PATTERN)
    """Name of the experiment, which is created if there is none."""
    credentials_secret: str | None = Field(default=None, min_length=1, max_length=253, pattern=SECRET_PATTERN)
    """Secret in the job's namespace for the server: keys `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`, or
    `MLFLOW_TRACKING_TOKEN`. It is mounted in the pods that train, and rank 0 reads it. Unset: the server must take
    metrics from the job's pods without. `qlora run` reads the variables of these names instead."""


class Tracking(ApiModel):
    """Where metrics go besides the workspace, which always holds them for `qlora report` and for TensorBoard."""

    mlflow: Mlflow | None = None
    """MLflow tracking server. Unset: none."""


class Distributed(ApiModel):
    """How the ranks talk to each other."""

    backend: Literal["gloo", "ccl", "mpi"] = "gloo"
    """Collective communication backend: `gloo`, which is part of torch; `ccl`, Intel's oneCCL; `mpi`, Intel MPI. The
    result does not depend on it, up to rounding."""
    timeout_seconds: int = Field(default=300, ge=5, le=86_400)
    """A rank that is silent for this long counts as lost."""
    rendezvous_timeout_seconds: int = Field(default=1800, ge=5, le=86_400)
    """Seconds that the ranks wait for each other at the start; also the limit for transfers that make no progress."""


def _without_duplicates(tiers: list[IsaTier]) -> list[IsaTier]:
    twice = next((tier for i, tier in enumerate(tiers) if tier in tiers[:i]), None)
    if twice is not None:
        raise PydanticCustomError("rule", "lists {tier} twice", {"tier": twice})
    return tiers


def _stays_inside(uri: str) -> bool:
    return "/../" not in f"{uri}/"


def _no_source(name: str) -> str:
    """Data without a source have several, each with rules of its own."""
    return f"!has(self.{name}.source) || " if name == "dataset" else ""


def _is_no_path(*field: str) -> Rule:
    """What the pattern refuses, too, in words for those who apply a file that was written for `qlora run`."""

    def holds(spec: Any) -> bool:
        for name in field:
            spec = getattr(spec, name)
        return spec is None or "://" in spec

    return Rule(
        cel=f"{_no_source(field[0])}self.{'.'.join(field)}.contains('://')",
        holds=holds,
        message="a path of one machine is for `qlora run` alone: put what it names on a claim, and write "
        "pvc://CLAIM/PATH",
        field=field,
    )


def _revision_of_hub(name: str) -> Rule:
    """A revision is the Hub's."""
    return Rule(
        cel=f"self.{name}.revision == 'main' || {_no_source(name)}self.{name}.source.startsWith('hf://')",
        holds=lambda spec: (
            getattr(spec, name).revision == "main"
            or getattr(spec, name).source is None
            or getattr(spec, name).source.startswith("hf://")
        ),
        message=_REVISION_OF_HUB,
        field=(name, "revision"),
    )


def _secret_of_remote(name: str) -> Rule:
    """A claim needs no credentials."""
    return Rule(
        cel=(
            f"!has(self.{name}.credentialsSecret) || {_no_source(name)}"
            f"self.{name}.source.startsWith('hf://') || self.{name}.source.startsWith('s3://')"
        ),
        holds=lambda spec: (
            getattr(spec, name).credentials_secret is None
            or getattr(spec, name).source is None
            or getattr(spec, name).source.startswith(("hf://", "s3://"))
        ),
        message=_SECRET_OF_REMOTE,
        field=(name, "credentialsSecret"),
    )


class Topology(ApiModel):
    """How many ranks train, and what each of them gets. The loss curve does not depend on it, up to rounding.
    May change while the job is suspended."""

    pods: int = Field(default=1, ge=1, le=512)
    """Pods of an attempt. More than one require a workspace that several nodes can mount (ReadWriteMany)."""
    min_pods: int | None = Field(default=None, ge=1, le=512)
    """How many pods will do where there are no nodes for all: once isa.stepDownSeconds have passed, an attempt starts
    with as many as have nodes, and the next one asks for all again. A step then takes longer, and gives the same
    result, up to rounding. Unset: all or none."""
    ranks_per_pod: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = 1
    """Ranks of a pod: processes that train together. `auto`: one for each NUMA node (with sub-NUMA clustering:
    each cluster) that the pod's CPUs belong to; cpusPerRank and memoryPerRank are then those of the whole pod, and
    its ranks share them."""
    cpus_per_rank: int = Field(default=4, ge=1, le=1024)
    """Whole CPUs that a rank requests and is bound to; with ranksPerPod auto, of a pod. `qlora run` on one machine
    uses all its CPUs where the file leaves this out."""
    memory_per_rank: str = Field(
        min_length=1, max_length=quantity.MAX_MEMORY_CHARACTERS, pattern=quantity.MEMORY_PATTERN
    )
    """Memory of a rank (with ranksPerPod auto, of a pod), such as `16Gi`; `qlora plan` estimates it. It has no
    default, since the operator cannot read a model on a claim. Suffixes Ki Mi Gi Ti Pi (powers of 1024) and
    k M G T P (powers of 1000)."""
    pinning: Literal["strict", "best-effort"] = "strict"
    """`strict`: each rank has its CPUs to itself, and the job waits or is refused where that is impossible;
    `best-effort`: ranks may share CPUs."""
    memory_tier: Literal["any", "hbm"] = "any"
    """`hbm`: high-bandwidth memory, as Xeon CPU Max processors have. Cache mode and HBM-only mode need no
    setting. In flat mode the ranks use it if the container may choose its memory; if it may not, the job is refused
    with pinning strict, and runs without it with best-effort. `any`: memory near the CPUs."""

    rules = (
        Rule(
            cel=f"type(self.ranksPerPod) != int || self.pods * self.ranksPerPod <= {MAX_RANKS}",
            holds=lambda topology: (
                topology.ranks_per_pod == "auto" or topology.pods * topology.ranks_per_pod <= MAX_RANKS
            ),
            message=f"pods times ranksPerPod may be at most {MAX_RANKS} ranks",
        ),
        Rule(
            cel="!has(self.minPods) || self.minPods <= self.pods",
            holds=lambda topology: topology.min_pods is None or topology.min_pods <= topology.pods,
            message="may be at most pods",
            field=("minPods",),
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
    """Which processors may train. All ranks of an attempt get the same tier, since the slowest sets the pace."""

    allowed: Annotated[list[IsaTier], AfterValidator(_without_duplicates)] = Field(
        default=list(ISA_TIERS),
        min_length=1,
        max_length=len(ISA_TIERS),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    """Instruction-set tiers, in order of preference: the first for which enough nodes have the processor, the
    CPUs and the memory is used. If there is none, the job waits with reason NoMatchingNodes."""
    step_down_seconds: int = Field(default=300, ge=1, le=MAX_SECONDS)
    """Seconds that pods may wait for nodes of one tier before another tier is tried that has other nodes, if there is
    one. Time spent in a queue does not count."""


class Toleration(ApiModel):
    """A taint that the pods tolerate, as in core/v1."""

    key: str | None = Field(default=None, min_length=1, max_length=MAX_LABEL_KEY, pattern=LABEL_KEY_PATTERN)
    """Key of the taint. Unset, with operator Exists: every taint."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """`Equal`: key and value match the taint's; `Exists`: the key does, whatever the value."""
    value: str | None = Field(default=None, max_length=63, pattern=LABEL_VALUE_PATTERN)
    """Value of the taint, with operator Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. Unset: every effect."""
    toleration_seconds: int | None = Field(default=None, ge=0, le=MAX_SECONDS)
    """Seconds for which a NoExecute taint is tolerated. Unset: forever."""

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
            message="tolerationSeconds requires effect NoExecute",
        ),
    )


class Scheduling(ApiModel):
    """Where the pods may run, besides what isa and topology require. May change while the job is suspended."""

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
    """LocalQueue of Kueue, in the job's namespace, in which each attempt waits to be admitted. Unset: the one that the
    job's label `kueue.x-k8s.io/queue-name` names; without that, attempts wait only if Kueue holds them by itself."""

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


def _is_cron(field: str, may_be_unset: str = "") -> Rule:
    """A rule, not a pattern: whoever breaks it would read all of that."""
    return Rule(
        cel=f"{may_be_unset}self.{field}.matches('{CRON_PATTERN}')",
        holds=lambda window: getattr(window, field) is None or is_cron(getattr(window, field)),
        message=(
            "must be five fields as cron has them, such as `0 20 * * MON-FRI`: minute (0-59), hour (0-23), day of the "
            "month (1-31), month (1-12 or JAN-DEC), day of the week (0-7 or SUN-SAT)"
        ),
        field=(field,),
    )


class Window(ApiModel):
    """A time in which the job may run: from its start until its end, or for a duration."""

    start: str = Field(min_length=9, max_length=MAX_CRON)
    """When the window opens, as cron has it: minute, hour, day of the month, month, day of the week. `0 20 * * MON-FRI`
    is eight in the evening of every working day. A range may go round: `22-5`, `FRI-MON`."""
    end: str | None = Field(default=None, min_length=9, max_length=MAX_CRON)
    """When it closes, in the same form: the first such time after each start. By the clock, whatever the hours between
    are."""
    duration_seconds: int | None = Field(default=None, ge=60, le=31 * 86_400)
    """In place of end: seconds after which it closes."""

    rules = (
        _is_cron("start"),
        _is_cron("end", "!has(self.end) || "),
        Rule(
            cel="has(self.end) != has(self.durationSeconds)",
            holds=lambda window: (window.end is None) != (window.duration_seconds is None),
            message="exactly one of end and durationSeconds must be given",
        ),
    )


class Schedule(ApiModel):
    """When the job may run. Outside its windows it is suspended: its pods stop after a checkpoint, and it goes on in
    the next window, at no cost to any limit. May change at any time."""

    time_zone: str | None = Field(default=None, min_length=1, max_length=64, pattern=TIME_ZONE_PATTERN)
    """Time zone of the windows' clock, by its name in the IANA database, such as `Europe/Berlin`. A time that the clock
    skips in spring comes when it has skipped it; one that comes twice in autumn counts the first time. Unset: UTC."""
    windows: list[Window] = Field(min_length=1, max_length=MAX_WINDOWS)
    """The times in which the job may run. They may overlap."""


class QLoRAJobSpec(ApiModel):
    """What to train, on what, and how. Immutable except for suspend, schedule, the deadlines and the limits, and for
    topology and scheduling while suspend is true."""

    workspace: str = Field(min_length=MIN_URI, max_length=MAX_URI, pattern=PVC_PATTERN)
    """Folder that the job works in, as `pvc://claim/path`: fetched sources, and under `jobs/<name>` its checkpoints
    and the finished adapter. Jobs may share one. With more than one pod the claim must be ReadWriteMany."""
    model: ModelSource
    dataset: Dataset
    adapter: Adapter = Adapter()
    quantization: Quantization = Quantization()
    training: Training
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    output: Output = Output()
    tracking: Tracking = Tracking()
    topology: Topology
    isa: Isa = Isa()
    distributed: Distributed = Distributed()
    scheduling: Scheduling = Scheduling()
    schedule: Schedule | None = None
    image: str | None = Field(default=None, min_length=1, max_length=512, pattern=IMAGE_PATTERN)
    """Trainer image, which the cluster's administrator must allow. Unset: the administrator's default. The first
    attempt fixes it for the later ones."""
    suspend: bool = False
    """Suspend the job: its pods stop after a checkpoint. Once this is false again it resumes from there; this does not
    count as a restart. The condition Suspended follows."""
    managed_by: str | None = Field(default=None, min_length=1, max_length=63, pattern=MANAGER_PATTERN)
    """Controller of the job, as in batch/v1. Unset, or `qlora.dev/qlora-operator`: this operator. The operator ignores
    jobs of another controller, such as `kueue.x-k8s.io/multikueue`."""
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0, le=MAX_SECONDS)
    """Seconds after which a finished job is deleted; the workspace stays. Unset: never."""
    active_deadline_seconds: int | None = Field(default=None, ge=1, le=MAX_SECONDS)
    """Seconds, restarts included, after which an active job fails with DeadlineExceeded. The time starts over when the
    job is resumed, and stands still outside the windows of schedule. A trained adapter is sent to output.destination
    however long that takes. Unset: no limit."""
    backoff_limit: int = Field(default=3, ge=0, le=MAX_RESTARTS)
    """Restarts after failures that the job itself caused; one more fails it with BackoffLimitExceeded. The default
    is low, since such failures tend to repeat. Permanent failures, such as bad data, are never retried."""
    infrastructure_backoff_limit: int = Field(default=20, ge=0, le=MAX_RESTARTS)
    """Restarts after failures that the cluster caused: drained, preempted or lost nodes; one more fails the job with
    InfrastructureBackoffLimitExceeded. An attempt that makes a new checkpoint ends the count of those before it. The
    default is high, since each loses at most one checkpoint interval of
    work."""
    pending_deadline_seconds: int | None = Field(default=None, ge=1, le=MAX_SECONDS)
    """Seconds that the job may wait for all ranks of an attempt before it fails with PendingDeadlineExceeded; not while
    a trained adapter waits to be sent. Unset: it waits for nodes indefinitely."""
    progress_deadline_seconds: int = Field(default=1800, ge=1, le=MAX_SECONDS)
    """Seconds without any advance after which the ranks are restarted, with reason ProgressDeadlineExceeded and against
    backoffLimit. Records tokenized, weights loaded, and tokens evaluated or trained on all count, within a step too.
    Must exceed the longest write of a checkpoint, and, with an image of release 0.1.0, which reports steps alone, the
    longest step, load and evaluation."""
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
            cel="!has(self.adapter.numVirtualTokens) || "
            "self.adapter.numVirtualTokens + 8 <= self.training.maxSequenceLength",
            holds=lambda spec: (
                spec.adapter.num_virtual_tokens is None
                or spec.adapter.num_virtual_tokens + MIN_OWN_TOKENS <= spec.training.max_sequence_length
            ),
            message="maxSequenceLength counts virtual tokens, too: it must be at least 8 more than numVirtualTokens",
            field=("adapter", "numVirtualTokens"),
        ),
        Rule(
            cel="self.adapter.method == 'lora' || !has(self.output.formats) || "
            "self.output.formats.all(form, form == 'adapter')",
            holds=lambda spec: spec.adapter.method == "lora" or set(spec.output.formats) <= {"adapter"},
            message="only an adapter of method lora can become part of the weights, as merged and gguf need it: leave "
            "formats out",
            field=("output", "formats"),
        ),
        Rule(
            cel="!(self.workspace + '/').contains('/../')",
            holds=lambda spec: _stays_inside(spec.workspace),
            message=_INSIDE,
            field=("workspace",),
        ),
        Rule(
            cel="!(self.model.source + '/').contains('/../')",
            holds=lambda spec: _stays_inside(spec.model.source),
            message=_INSIDE,
            field=("model", "source"),
        ),
        Rule(
            cel="!has(self.dataset.source) || !(self.dataset.source + '/').contains('/../')",
            holds=lambda spec: spec.dataset.source is None or _stays_inside(spec.dataset.source),
            message=_INSIDE,
            field=("dataset", "source"),
        ),
        Rule(
            cel="!has(self.adapter.initialAdapter) || !(self.adapter.initialAdapter + '/').contains('/../')",
            holds=lambda spec: (
                spec.adapter.initial_adapter is None or _stays_inside(spec.adapter.initial_adapter)
            ),
            message=_INSIDE,
            field=("adapter", "initialAdapter"),
        ),
        Rule(
            cel="!has(self.output.destination) || !(self.output.destination + '/').contains('/../')",
            holds=lambda spec: spec.output.destination is None or _stays_inside(spec.output.destination),
            message="must stay within its bucket: the path may not contain `..`",
            field=("output", "destination"),
        ),
        *(_is_no_path(*path) for path in (("workspace",), ("model", "source"), ("dataset", "source"))),
        *(_revision_of_hub(name) for name in ("model", "dataset")),
        *(_secret_of_remote(name) for name in ("model", "dataset")),
        Rule(
            cel="!has(self.output.credentialsSecret) || has(self.output.destination)",
            holds=lambda spec: spec.output.credentials_secret is None or spec.output.destination is not None,
            message="requires a destination",
            field=("output", "credentialsSecret"),
        ),
    )

    @property
    def sources(self) -> list[NamedSource]:
        """All that the job reads, the model first."""
        return named_sources(
            self.model, self.dataset.all_sources, self.adapter, listed=self.dataset.sources is not None
        )

    @property
    def read_uris(self) -> list[str]:
        """The URIs of all that training reads."""
        return [source.uri for source in self.sources]


def topology_hash(spec: QLoRAJobSpec) -> str:
    """A hash of MUTABLE_WHILE_SUSPENDED, which an AttemptJob carries in TOPOLOGY_HASH_ANNOTATION.

    Defaults are left out, so that a field that a release adds does not change the hash of jobs that run. The names in
    it are those of release 0.1.0: a field that is renamed here must keep its name there.
    """
    fields = spec.model_dump(mode="json", include={"topology", "scheduling"}, exclude_defaults=True)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


class Metadata(StatusModel):
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

    @property
    def queue_name(self) -> str | None:
        """The queue that the user names: in spec, or by Kueue's own label, as for other kinds of jobs."""
        return self.spec.scheduling.queue_name or self.metadata.labels.get(names.QUEUE_LABEL) or None


def ignored_by_run(job: QLoRAJob) -> list[str]:
    """The paths of OPERATOR_ONLY that the job's file sets, in the order of the schema."""
    return [path for path in OPERATOR_ONLY if _is_set(job, path.split("."))]


def _is_set(model: Any, path: list[str]) -> bool:
    if isinstance(model, list):
        return any(_is_set(each, path) for each in model)
    fields = {info.alias: name for name, info in type(model).model_fields.items()}
    name = fields[path[0]]
    value = getattr(model, name)
    if name not in model.model_fields_set or value is None:
        return False
    return len(path) == 1 or _is_set(value, path[1:])
