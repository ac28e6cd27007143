"""RunConfig: everything a rank needs to know, fixed for an attempt.

The training settings are defined here, once. The API embeds these classes, so
that a job's fields, their defaults, bounds and descriptions cannot drift from
what the trainer reads.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from qlora_contract.base import ContractModel
from qlora_contract.remote import BUCKET, CLAIM, HUB_NAME, PATH, fetched_uri, is_remote, parse_remote

RUN_CONFIG_VERSION = 1

_PVC = f"pvc://{CLAIM}{PATH}"
_HUB = f"{HUB_NAME}/{HUB_NAME}"
_S3 = f"s3://{BUCKET}{PATH}"


def _uri(*forms: str, **more: Any) -> Any:
    """A field that holds a URI of one of these forms."""
    return Field(min_length=6, max_length=512, pattern=f"^({'|'.join(forms)})$", **more)


PvcUri = _uri(_PVC)
ModelUri = _uri(_PVC, f"hf://{_HUB}/?", _S3)
DatasetUri = _uri(_PVC, f"hf://datasets/{_HUB}{PATH}", _S3)
DestinationUri = _uri(f"hf://{_HUB}/?", _S3, default=None)
SecretName = Field(default=None, min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
Revision = Field(default="main", min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][-A-Za-z0-9._/]*$")
FetchedRevision = Field(default=None, max_length=128, pattern="^[A-Za-z0-9][-A-Za-z0-9._]*$")
"""The name of a folder, too."""

MAX_RANKS = 1024
"""Ranks of a job. Every rank holds a connection to every other."""
RanksPerPod = Annotated[int, Field(ge=1, le=64)] | Literal["auto"]
Pinning = Literal["strict", "best-effort"]
MemoryTier = Literal["any", "hbm"]

IsaTier = Literal["amx_bf16", "avx512_bf16", "avx512", "avx2"]
ISA_TIERS: tuple[IsaTier, ...] = ("amx_bf16", "avx512_bf16", "avx512", "avx2")
"""Best first."""
BF16_NATIVE: frozenset[str] = frozenset({"amx_bf16", "avx512_bf16"})
"""Tiers whose processors compute in bf16 natively; elsewhere it is emulated, 2-5 times slower than fp32."""


class ModelSource(ContractModel):
    """The base model: a Hugging Face folder with safetensors weights. No remote code is run."""

    source: str = ModelUri
    """Folder with config.json, tokenizer files and *.safetensors: `pvc://claim/path`, or `hf://org/name` or
    `s3://bucket/path`, which are fetched into the workspace first."""
    revision: str = Revision
    """Branch, tag or commit of a model of the Hub. The job keeps the commit that it stood for at the first
    fetch."""
    credentials_secret: str | None = SecretName
    """Secret, in the job's namespace, to fetch the model with: key `token` for hf://; keys
    `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` for s3://. Unset: none, or the platform's workload
    identity."""


class Dataset(ContractModel):
    """The training data, and what is held out of it for evaluation."""

    source: str = DatasetUri
    """JSONL file, or folder whose split S is the file S.jsonl: `pvc://claim/path`, or
    `hf://datasets/org/name/path` or `s3://bucket/path`, which are fetched into the workspace first."""
    revision: str = Revision
    """Branch, tag or commit of a dataset of the Hub. The job keeps the commit that it stood for at the first
    fetch."""
    credentials_secret: str | None = SecretName
    """Secret, in the job's namespace, to fetch the dataset with, as for the model."""
    format: Literal["auto", "chat", "prompt-completion"] = "auto"
    """`chat`: {"messages": [{"role", "content"}, ...]}; `prompt-completion`: {"prompt", "completion"};
    `auto`: told from the first record."""
    train_split: str = Field(
        default="train", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$"
    )
    """Split to train on when the source is a folder."""
    eval_split: str | None = Field(
        default=None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$"
    )
    """Split to evaluate on when the source is a folder; without it, evalFraction of the training split is held out."""
    eval_fraction: float = Field(default=0.05, ge=0.0, le=0.5)
    """Share of the records held out for evaluation, chosen by each record's hash, so that it does not
    change with the order of the file. 0: no evaluation. Not used with evalSplit."""


class Adapter(ContractModel):
    """The adapter that is trained."""

    method: Literal["lora"] = "lora"
    """`lora`: W x + (alpha / rank) B A x (Hu et al. 2021)."""
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
    `all-linear`: every linear layer but the output head."""


class Quantization(ContractModel):
    """How the frozen base weights are stored."""

    scheme: Literal["nf4", "none"] = "nf4"
    """`nf4`: 4-bit NormalFloat (Dettmers et al. 2023), bytes equal to bitsandbytes'; `none`: plain LoRA."""
    block_size: Literal[64] = 64
    """Weights that share one scale."""
    double_quantization: bool = True
    """Quantise the scales too: 0.37 bit per weight less."""


class Training(ContractModel):
    """The training loop's settings. Exactly one of epochs and maxSteps is given."""

    epochs: int | None = Field(default=None, ge=1, le=10_000)
    """Passes over the training data."""
    max_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    """Optimiser steps, over as many passes as they take."""
    global_batch_tokens: int = Field(default=8192, ge=1, le=16_777_216)
    """Tokens of one optimiser step over all ranks, at most. The number of ranks never changes it."""
    micro_batch_tokens: int | None = Field(default=None, ge=1, le=16_777_216)
    """Tokens a rank runs at once: a memory knob, never a change of the result. Unset: as many as fit memoryPerRank,
    at most the rank's share of a step."""
    max_sequence_length: int = Field(default=1024, ge=8, le=1_048_576)
    """Longest sample, and longest bin of packed samples, in tokens."""
    packing: bool = True
    """Put several samples into one bin; they never see each other."""
    overlong: Literal["truncate"] = "truncate"
    """What to do with a sample longer than maxSequenceLength: cut its end off."""
    learning_rate: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: to 0 in a line, to 0 in half a cosine, or unchanged."""
    warmup_ratio: float = Field(default=0.03, ge=0.0, le=1.0)
    """Share of all steps in which the learning rate rises in a line from 0."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0.0, le=1e6)
    """The gradient is scaled down to this norm when it is longer."""
    compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the processor computes in it natively (AMX, AVX512-BF16), else fp32."""
    gradient_checkpointing: Literal["auto", "none", "full"] = "auto"
    """`full` recomputes each layer in the backward pass: less memory, a third more time. `auto`: none if one bin fits
    memoryPerRank without it, else full."""
    seed: int = Field(default=0, ge=0, le=4_294_967_295)
    """Seeds the adapter's start, the order of the samples and dropout."""

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


class Evaluation(ContractModel):
    """When to evaluate, and what must come of it. The base and the finished adapter are always evaluated."""

    every_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    """Also evaluate every so many steps."""
    require_improvement: bool = True
    """Fail the job when the adapter's eval loss is not below that of the quantised base."""


class Checkpoint(ContractModel):
    """When to save what a restart needs."""

    every_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    """Save every so many steps, too."""
    every_seconds: int = Field(default=600, ge=1, le=86_400)
    """Save when so many seconds have passed since the last checkpoint."""
    keep: int = Field(default=2, ge=1, le=100)
    """Newest checkpoints to keep."""


class Output(ContractModel):
    """Where the finished adapter goes, besides the workspace."""

    destination: str | None = DestinationUri
    """`hf://org/name` or `s3://bucket/path` that gets a copy of the adapter. Unset: it stays in the
    workspace only."""
    credentials_secret: str | None = SecretName
    """Secret, in the job's namespace, to write the copy with; its keys are those of model.credentialsSecret."""


class Distributed(ContractModel):
    """How the ranks talk to each other."""

    backend: Literal["gloo", "ccl", "mpi"] = "gloo"
    """What the ranks exchange numbers with: `gloo`, which torch has itself; `ccl`, Intel's oneCCL; `mpi`, Intel
    MPI. The result does not depend on it, up to rounding."""
    timeout_seconds: int = Field(default=300, ge=5, le=86_400)
    """A rank that gives no sign of life for so long is lost."""
    rendezvous_timeout_seconds: int = Field(default=1800, ge=5, le=86_400)
    """How long ranks wait for each other at the start."""


class JobRef(ContractModel):
    """Which job, and which attempt at it."""

    name: str = Field(min_length=1, max_length=50)
    namespace: str = Field(default="default", max_length=63)
    uid: str = Field(min_length=1, max_length=64)
    attempt: int = Field(ge=0)


class Layout(ContractModel):
    """Pods, ranks and what each rank has.

    With `auto` the launchers make a rank of each NUMA cluster of their pod's CPUs, and `cpus_per_rank` and
    `memory_per_rank` are the pod's. `settled` tells what came of it.
    """

    pods: int = Field(default=1, ge=1, le=512)
    ranks_per_pod: RanksPerPod = 1
    cpus_per_rank: int = Field(default=4, ge=1, le=1024)
    memory_per_rank: int = Field(ge=1)
    """Bytes."""
    pinning: Pinning = "strict"
    memory_tier: MemoryTier = "any"
    ranks: int | None = Field(default=None, ge=1)
    """Ranks of all pods, where `auto` is settled."""

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
            raise ValueError("ranksPerPod is auto: the launchers settle the number of ranks")
        return self.pods * self.ranks_per_pod

    def settled(self, counts: Sequence[int]) -> Self:
        """The layout once each pod's number of ranks is known: all ranks get what those of the fullest pod get."""
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


RunStage = Literal["fetch", "train", "publish"]


class Fetched(ContractModel):
    """What the remote sources stood for when they were fetched; unset for those on a claim."""

    model: str | None = FetchedRevision
    """Commit of the Hub, or hash over a bucket's listing."""
    dataset: str | None = FetchedRevision
    """As for the model."""


class RunConfig(ContractModel):
    """run.json: one attempt at a job, the same for every pod of it."""

    version: Literal[1] = 1
    stage: RunStage = "train"
    """What the attempt does: fetch remote sources into the workspace, train, or send the adapter to
    output.destination."""
    job: JobRef
    fetched: Fetched = Fetched()
    """Revisions to train on; for the stage `fetch`, those that are known already."""
    workspace: str = PvcUri
    model: ModelSource
    dataset: Dataset
    adapter: Adapter = Adapter()
    quantization: Quantization = Quantization()
    training: Training
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    output: Output = Output()
    distributed: Distributed = Distributed()
    layout: Layout
    isa: IsaTier
    """The tier every rank must have."""
    termination_grace_period_seconds: int = Field(default=300, ge=1, le=86_400)
    """Seconds between SIGTERM and SIGKILL."""

    @property
    def model_uri(self) -> str:
        """`pvc://` URI of the model's folder: as given, or where the fetch has put it."""
        return _local(self.model.source, self.fetched.model, self.workspace)

    @property
    def dataset_uri(self) -> str:
        """`pvc://` URI of the dataset: as given, or where the fetch has put it."""
        return _local(self.dataset.source, self.fetched.dataset, self.workspace)

    def to_json(self) -> str:
        """The text of run.json."""
        return self.model_dump_json(by_alias=True, indent=2)


def _local(source: str, revision: str | None, workspace: str) -> str:
    if not is_remote(source):
        return source
    if revision is None:
        raise ValueError(f"{source} was not fetched")
    return fetched_uri(workspace, parse_remote(source), revision)


MEMORY_KNOBS = frozenset({"microBatchTokens", "gradientCheckpointing"})
"""Training fields that never change the result (up to rounding)."""


def shaping_fields(
    model: ModelSource,
    dataset: Dataset,
    adapter: Adapter,
    quantization: Quantization,
    training: Training,
    evaluation: Evaluation,
) -> dict[str, Any]:
    """The fields that shape the result: they identify what a job folder holds."""
    fields = {
        "model": model.model_dump(by_alias=True),
        "dataset": dataset.model_dump(by_alias=True),
        "adapter": adapter.model_dump(by_alias=True),
        "quantization": quantization.model_dump(by_alias=True),
        "training": training.model_dump(by_alias=True),
        "evaluation": evaluation.model_dump(by_alias=True),
    }
    for knob in MEMORY_KNOBS:
        del fields["training"][knob]
    for source in (fields["model"], fields["dataset"]):
        del source["credentialsSecret"]
        if not source["source"].startswith("hf://"):
            del source["revision"]
    return fields


def run_shaping_fields(run: RunConfig) -> dict[str, Any]:
    """shaping_fields of a whole RunConfig."""
    return shaping_fields(run.model, run.dataset, run.adapter, run.quantization, run.training, run.evaluation)


def config_hash(fields: dict[str, Any]) -> str:
    """sha256 over the canonical JSON of shaping_fields, in hexadecimal."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any) -> str:
    """What differs between two shaping_fields: `training.seed: 0, now 1`, the first five."""
    return ", ".join(list(_differences(old, new, ""))[:5])


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new:
        yield f"{path}: {json.dumps(old)}, now {json.dumps(new)}"
