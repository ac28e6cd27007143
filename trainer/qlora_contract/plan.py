"""What `python -m qlora_trainer.plan` tells about a machine and a job, one JSON object on the last line of stdout.

The operator's side cannot read a model or data itself: that takes the trainer's packages.
"""

import math
from typing import Literal, Self

from pydantic import Field

from qlora_contract.base import ContractModel
from qlora_contract.memory import Checkpointing, Dtype, MemoryEstimate, ModelShape
from qlora_contract.run_config import IsaTier, Training

BUSY_SHARE = 0.75
"""Of the ranks: when fewer have something to do in a step, on average, it is told. An epoch's last step is short."""

FEW_STEPS = 20
"""Fewer hardly learn anything: the first of them only raise the learning rate."""


class Machine(ContractModel):
    """What a process may use of the machine it runs on."""

    tiers: list[IsaTier]
    """ISA tiers that the processor meets, the best first."""
    lacking: dict[IsaTier, list[str]]
    """What is missing for each of the others."""
    cpus: list[int]
    """CPUs, hardware threads of one core side by side."""
    quota: float | None = None
    """CPUs' worth of time; None: no quota."""
    clusters: int = 1
    """Ranks that ranksPerPod auto makes of the CPUs that can be at work at once: one for each NUMA cluster."""
    memory: int | None = None
    """Bytes: of the machine, or of the smallest limit of a control group; None: unknown."""
    free_memory: int | None = None
    """Bytes of it that can be had now, those of page caches among them; None: unknown."""

    @property
    def usable_cpus(self) -> int:
        """How many CPUs can be at work at once."""
        return len(self.cpus) if self.quota is None else max(1, min(len(self.cpus), int(self.quota)))


class BadRecords(ContractModel):
    """Records that were left out for one reason."""

    reason: str
    count: int
    places: list[str]
    """Where the first few of them are."""


class LengthBin(ContractModel):
    """How many of a split are so long."""

    up_to: int
    """At most so long, and longer than the bin before: half as long, at most."""
    count: int


class SourceStats(ContractModel):
    """What became of the records of one of several sources, of a split."""

    source: str
    """Its URI."""
    weight: float
    """How often its samples are trained on in an epoch."""
    sha256: str = ""
    """Of its files, of both splits; empty where they were not hashed."""
    format: str
    """What its records are, as dataset.format has it."""
    records: int
    bad: list[BadRecords] = Field(default=[])
    truncated: int = 0
    dropped: int = 0
    duplicates: int = 0
    """Records that say the same as an earlier one of this source."""
    overlap: int = 0
    """Records of an evaluation split that are trained on as well, from whatever source."""
    overlong: int = 0
    samples: int
    tokens: int = 0
    """Of the samples."""


class SplitStats(ContractModel):
    """The records of a split, and what became of them."""

    format: str = ""
    """What the records are, as dataset.format has it."""
    records: int
    bad: list[BadRecords] = Field(default=[])
    """Records beside these that were left out by dataset.onBadRecord, the most frequent reason first."""
    truncated: int
    """Samples whose end was cut off."""
    dropped: int
    """Samples that are left out: in which nothing is left to learn, or that are overlong."""
    left_out: int = 0
    """Samples beyond evaluation.maxTokens, which are not evaluated."""
    samples: int
    """Those that are used."""
    tokens: int
    """Of the samples that are used, as are the supervised ones."""
    supervised_tokens: int
    duplicates: int = 0
    """Records that say the same as an earlier one."""
    overlap: int = 0
    """Records of an evaluation split that are trained on as well."""
    overlong: int = 0
    """Samples that training.overlong leaves out."""
    raw: bool = False
    """Whether prompts and completions that are texts are among the records; they are learned as raw text."""
    label: str = ""
    """That a label beside the texts is not learned, and how it would be; empty where there is none."""
    lengths: list[LengthBin] = Field(default=[])
    """Of the samples."""
    sources: list[SourceStats] = Field(default=[])
    """What of it each of several sources gives; empty where there is one."""


class Steps(ContractModel):
    """How the samples make up steps."""

    per_epoch: int
    """Steps of the first epoch; later ones may differ by a few."""
    total: int
    epochs: float
    """Passes over the data that the steps are."""
    tokens_per_step: float
    """Mean of the first epoch."""
    fill: float
    """Mean share of a bin of the first epoch that is tokens, from 0 to 1."""

    def bins(self, training: Training) -> float:
        """Of the first epoch, each of which is run by one rank."""
        return self.per_epoch * self.tokens_per_step / (self.fill * training.max_sequence_length)


def too_few(total: int, training: Training) -> str | None:
    """That a job has too few steps to learn much; None where they are enough, or their number was asked for.

    Args:
        total: of the training.
        training: its settings.
    """
    if training.max_steps is not None or total >= FEW_STEPS:
        return None
    return f"{total:,} step(s) are too few to learn much"


def few_steps(steps: Steps, tokens: int, training: Training) -> list[str]:
    """That a job has too few steps, if it has, and what makes FEW_STEPS of them.

    Args:
        steps: of the training.
        tokens: of a pass over the data.
        training: its settings.
    """
    few = too_few(steps.total, training)
    if few is None:
        return []
    remedy = f"raise training.epochs to {math.ceil(steps.epochs * FEW_STEPS / steps.total):,}"
    smaller = batch_tokens(tokens * steps.epochs, training.max_sequence_length)
    now = training.global_batch_tokens
    if smaller < now:
        remedy = f"lower training.globalBatchTokens, now {now:,}, to {smaller:,}, or {remedy}"
    return [f"{few}: {remedy}"]


def batch_tokens(tokens: float, sample: int) -> int:
    """training.globalBatchTokens that makes FEW_STEPS steps at least of so many tokens: a power of two times a sample.

    Args:
        tokens: of all passes over the data.
        sample: of the longest sample, which a step must hold.
    """
    default: int = Training.model_fields["global_batch_tokens"].default
    size = sample
    while 2 * size <= min(default, tokens / FEW_STEPS):
        size *= 2
    return size


def ranks_without_work(bins: float, steps: int, ranks: int, training: Training) -> str | None:
    """That ranks have nothing to do in most steps, and what helps; None where nearly all have.

    Args:
        bins: of the first epoch. Each is run by one rank.
        steps: that they make.
        ranks: of the job.
        training: its settings.
    """
    per_step = bins / steps
    if per_step >= BUSY_SHARE * ranks:
        return None
    longest = training.max_sequence_length
    enough = math.ceil(training.global_batch_tokens * ranks / per_step / longest) * longest
    more = f"raise training.globalBatchTokens to {enough:,}, or " if steps > 1 else ""
    return (
        f"a step has {per_step:.1f} bins of maxSequenceLength {longest:,} for {ranks} ranks, and each is run by one of "
        f"them, so that the others wait: {more}have fewer ranks"
    )


class MemoryFigures(ContractModel):
    """A MemoryEstimate, in bytes."""

    parts: dict[str, int]
    total: int
    micro_batch_tokens: int
    checkpointing: Checkpointing

    @classmethod
    def of(cls, estimate: MemoryEstimate) -> Self:
        """Those of an estimate."""
        return cls(
            parts=estimate.parts(),
            total=estimate.total,
            micro_batch_tokens=estimate.micro_batch_tokens,
            checkpointing=estimate.checkpointing,
        )


class TextSpan(ContractModel):
    """A run of a sample's text."""

    text: str
    supervised: bool
    """Whether it counts in the loss."""


class PlanReport(ContractModel):
    """What a job will do."""

    compute_dtype: Dtype
    stored_in: str = ""
    """What the model's weights are stored in, for people."""
    shape: ModelShape
    memory: MemoryFigures
    training: SplitStats
    evaluation: SplitStats | None = None
    """None: there is no evaluation."""
    steps: Steps
    sample: list[TextSpan]
    """The first sample that is trained on."""
    warnings: list[str] = Field(default=[])
    """What of the data may not be as it was meant."""


class ModelSize(ContractModel):
    """What can be known of a model without its weights."""

    compute_dtype: Dtype
    shape: ModelShape
    download: int | None = None
    """Bytes of its weights in files; None: unknown."""
    basis: str
    """What was read for that."""


class TimeEstimate(ContractModel):
    """How long a job is expected to take, once its pods run."""

    seconds: float
    training_seconds: float
    evaluation_seconds: float
    start_seconds: float
    answers_seconds: float = 0.0
    """Of base and adapter answering held-out prompts, while other ranks wait."""
    exports_seconds: float = 0.0
    """Of making output.formats, with the CPUs of one rank."""
    core_hours: float
    flops_per_token: float
    """Of training."""
    tokens_per_second: float
    """Of all ranks, while training."""
    basis: str
    """What it rests on."""


class DataFile(ContractModel):
    """A file of the data."""

    name: str
    content: str
    """What it is, such as `a JSON array`."""


class CheckReport(ContractModel):
    """What `qlora check` tells of data."""

    files: list[DataFile]
    """Those that are trained on."""
    unread: list[str] = Field(default=[])
    """Columns that nothing reads, by the first record of each source."""
    unit: Literal["tokens", "characters"]
    """Of lengths; characters, and no tokens, where no model is known."""
    training: SplitStats
    evaluation: SplitStats | None = None
    steps: Steps | None = None
    """None: no model is known."""
    time: TimeEstimate | None = None
    """How long that would take; None: no config.json of a model that can be trained is known."""
    samples: list[list[TextSpan]]
    """A few of them."""
    problems: list[str]
    """Why a job would refuse the data."""
    warnings: list[str]
    """What may not be as it was meant."""
    told: str = ""
    """What ranks will tell of these data; empty where no model is known."""
    first: int | None = None
    """How many records were looked at, where there are more; None: all."""

    def sentence(self) -> str:
        """What there is to say before ranks start, in a line."""
        first, *others = self.files
        files = f"{first.name} and {len(others):,} more files" if others else first.name
        parts = [
            "" if self.first is None else f"by the first {self.first:,} records, and there are more: ",
            f"{files} ({first.content}{' first' if others else ''}): {self.told}",
            f"; {self.steps.total:,} steps of {self.steps.tokens_per_step:,.0f} tokens" if self.steps else "",
            *(f"; warning: {warning}" for warning in self.warnings),
        ]
        return "".join(parts)


class RankPlan(ContractModel):
    """Where a rank runs. CPUs and nodes are lists such as 0-3,8; empty: none."""

    cpus: str
    """A thread computes on each, where the pod has CPUs of its own."""
    threads: int
    helpers: str
    """CPUs for its threads that do not compute, if they have others than `cpus`."""
    nodes: str
    """NUMA nodes of its CPUs."""
    memory_node: int | None = None
    """NUMA node whose memory it prefers; None: what is near."""


class PodPlan(ContractModel):
    """Where the ranks of a pod run."""

    ranks: list[RankPlan]
    bound: bool
    """Whether each has CPUs of its own; otherwise they move among all the CPUs shown."""
    unused: str
    """CPUs on whose core nothing runs."""
    notes: list[str]
    """What is not as one might expect, and why."""


class PlanError(ContractModel):
    """Why a job cannot run: the exit code its ranks would have, and the same sentence."""

    code: int
    cause: str


class PlanResponse(ContractModel):
    """What was asked for, or the error."""

    machine: Machine | None = None
    plan: PlanReport | None = None
    pods: list[PodPlan] | None = None
    check: CheckReport | None = None
    size: ModelSize | None = None
    error: PlanError | None = None
