"""What the trainer reports: live progress, and how it ended."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import ConfigDict, Field

from qlora_contract.base import ContractModel
from qlora_contract.run_config import ResolvedRevisions

Stage = Literal["Starting", "Fetching", "Training", "Evaluating", "Publishing", "Uploading", "Done"]


FIRST_STEP = "first step"
"""What a timeline calls the first step of an attempt; all before it is what a user waits for."""


def timeline_text(timeline: Mapping[str, float]) -> str:
    """Seconds by what they went into, as a sentence: `14.0 s to the end of the first step: imports 8.1 s, ...`.

    What took less than a twentieth of a second is left out.
    """
    names = list(timeline)
    start = names[: names.index(FIRST_STEP) + 1] if FIRST_STEP in timeline else []

    def parts(of: Sequence[str]) -> str:
        return ", ".join(f"{name} {timeline[name]:.1f} s" for name in of if timeline[name] >= 0.05)

    rest = parts(names[len(start) :])
    if not start:
        return rest
    until = f"{sum(timeline[name] for name in start):.1f} s to the end of the first step: {parts(start)}"
    return f"{until}; then {rest}" if rest else until


class _Report(ContractModel):
    """What a trainer image of another release may send. Its fields that this release does not know are ignored: a job
    must not lose its progress, or the cause of its end, for them."""

    model_config = ConfigDict(extra="ignore")


class CheckpointRef(_Report):
    """The newest valid checkpoint."""

    step: int
    time: str
    """RFC 3339, UTC."""
    uri: str


class RankFacts(_Report):
    """Where a rank runs and what it got."""

    rank: int
    host: str
    isa: str
    cpus: str
    """CPU list, such as `0-3,8`."""
    threads: int
    pod: int = 0
    """Completion index of its pod."""
    nodes: str = ""
    """NUMA nodes of its CPUs, such as `0-1`."""


class Work(_Report):
    """What a rank is at besides whole steps and transfers, and how far it is."""

    name: str
    """Follows the stage: `tokenizing`, `loading the model`, `evaluating the base`."""
    unit: Literal["records", "bytes", "tokens"]
    done: int = 0
    total: int | None = None
    """None: not known."""


class ProgressReport(_Report):
    """The body of `GET /progress` on rank 0."""

    version: Literal[1] = 1
    job_uid: str
    attempt: int
    stage: Stage
    step: int
    total_steps: int
    epoch: float
    """Epochs of the training data seen, with the fraction of the current one."""
    loss: float | None = None
    """Mean loss per supervised token of the last step."""
    learning_rate: float | None = None
    """Of the last step."""
    eval_loss: float | None = None
    """Newest evaluation; None before the first."""
    tokens_per_second: float | None = None
    """All tokens of all ranks, over the last steps."""
    eta_seconds: float | None = None
    """From the steps of this attempt; None before the first."""
    memory_estimate: int | None = None
    """Bytes a rank was estimated to need at most."""
    memory_peak: int | None = None
    """Bytes: the largest peak of any rank so far."""
    compute_dtype: str | None = None
    resumed_step: int | None = None
    """Steps that this attempt began with; None until its first step is about to be made."""
    checkpoint: CheckpointRef | None = None
    ranks: list[RankFacts] = Field(default_factory=list)
    bytes_done: int | None = None
    """Of what is fetched or uploaded."""
    bytes_total: int | None = None
    data: str | None = None
    """What the data are, and what of them is not trained on, in a sentence; None until it is known."""
    work: Work | None = None
    """None while steps are made, and of a trainer that does not report it."""
    advances: int | None = None
    """Grows with all that rank 0 gets done, however small: records tokenized, bytes of weights loaded, tokens
    evaluated or trained on. Only that it grows means something. None: a trainer that does not count."""
    waiting: str | None = None
    """Why a transfer is not getting on, and when it tries again; None while it is."""
    updated_time: str
    """RFC 3339, UTC."""


class TerminationReport(_Report):
    """The termination message of a pod: how its launcher ended, in at most 4,096 bytes."""

    version: Literal[1] = 1
    exit_code: int
    reason: str
    """The exit code's name, or `Signal` for a death by signal."""
    cause: str
    """One line: what was wrong, where, and what would be right."""
    rank: int | None = None
    """The rank that gave the cause; None when the launcher did."""
    host: str | None = None
    step: int | None = None
    """The last step completed; None before the first."""
    checkpoint_step: int | None = None
    not_bit_exact: str | None = None
    """Why a resume was not bit-exact; None when it was, or when nothing was resumed."""
    compute_dtype: str | None = None
    world_size: int | None = None
    """Ranks that the adapter was trained by."""
    base_eval_loss: float | None = None
    base_eval_loss_quantized: float | None = None
    eval_loss: float | None = None
    adapter_uri: str | None = None
    adapter_sha256: str | None = None
    energy_kwh: float | None = None
    """What the processors took over all attempts; None: not known."""
    fetched: ResolvedRevisions | None = None
    """Of a fetch: what the remote sources stood for."""
    data: str | None = None
    """Of a look at the data before there are ranks: what they are, in a sentence; None where nothing was found out."""
    published_uri: str | None = None
    """Of an upload: where the copy is, with its revision where there is one."""
