"""The training of one job on one rank, top to bottom.

Ranks differ only in which bins they run; every decision below is made from the
same facts on each of them, or agreed on through the group.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_contract import memory, places
from qlora_contract.memory import Dtype, MemoryEstimate
from qlora_contract.progress import CheckpointRef
from qlora_trainer import checkpoint, export, kernels, packing, schedule, storage
from qlora_trainer.adapter import ALIGNMENT, AdapterParameters, Dropout, attach_adapters
from qlora_trainer.batch import collate, row_multiple
from qlora_trainer.checkpoint import LoopState
from qlora_trainer.data import LoadedData
from qlora_trainer.errors import (
    ConfigurationError,
    DataError,
    Diverged,
    ModelError,
    NoImprovement,
    Terminated,
)
from qlora_trainer.evaluate import evaluate
from qlora_trainer.inputs import first_dtype, load_inputs
from qlora_trainer.metrics_log import MetricsLog, read
from qlora_trainer.model import BaseModel, Scheme, fingerprint, load_model, target_layers, weight_files
from qlora_trainer.packing import Plan
from qlora_trainer.session import Session, Stopping
from qlora_trainer.shape import model_shape
from qlora_trainer.storage import job_uri
from qlora_trainer.training_report import base_model, training_report

log = logging.getLogger(__name__)

DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Job:
    """What `prepare` made: everything the loop works on."""

    model_folder: Path
    model: BaseModel
    parameters: AdapterParameters
    dropout: Dropout | None
    optimizer: torch.optim.Optimizer
    data: LoadedData
    plan: Plan
    memory: MemoryEstimate
    dtype: Dtype
    state: LoopState
    supervised: Any
    """Supervised tokens of each training sample."""


def train(session: Session) -> dict[str, Any]:
    """Train, verify and publish the job's adapter; return training_report.json.

    Raises:
        TrainerError: one of its kinds, for every foreseen end but success.
    """
    try:
        job = prepare(session)
    except Stopping:
        raise Terminated("asked to stop before the first step") from None
    try:
        run_steps(session, job)
    except Stopping:
        save(session, job)
        session.group.barrier()
        raise Terminated(f"asked to stop; a checkpoint holds all up to step {job.state.step}") from None
    return finish(session, job)


# --- before the first step


def prepare(session: Session) -> Job:
    """Load everything, check that all ranks agree, measure the base, resume where an attempt left off."""
    run = session.run
    session.progress.update(stage="Starting")
    model_folder = places.resolve(run.model_uri, session.volumes)
    shape = model_shape(model_folder, run.adapter)
    _, data = load_inputs(run, session.volumes)
    resumed, state = find_checkpoint(session)
    dtype = choose_dtype(session, state)
    chosen = memory.choose(shape, run, dtype)
    conditions = bit_conditions(session, chosen, dtype)
    not_bit_exact = checkpoint.not_bit_exact(state.conditions, conditions) if resumed else None
    check_equal_everywhere(session, model_folder, data)
    check_resumed_data(resumed, state, data)
    if session.leads:
        session.folder.check_space((run.checkpoint.keep + 2) * shape.adapter_weights * 12 + 2**20)
    plan = Plan(data.train.lengths(), run.training)
    session.progress.update(
        total_steps=plan.total_steps, memory_estimate=chosen.total, compute_dtype=dtype, step=state.step
    )
    log_start(session, chosen, dtype, plan)

    if resumed is None:
        state.base_eval_loss = evaluate_unquantised(session, model_folder, data, chosen)
    model = load_model(model_folder, scheme_of(session), DTYPES[dtype])
    model.graph.train()
    if chosen.checkpointing == "full":
        model.checkpoint_layers()
    dropout = Dropout(run.adapter.dropout, run.training.seed) if run.adapter.dropout else None
    parameters = attach_adapters(
        target_layers(model.linears, run.adapter.target_modules),
        rank=run.adapter.rank,
        alpha=run.adapter.alpha,
        dropout=dropout,
        seed=run.training.seed,
    )
    optimizer = torch.optim.AdamW(
        [parameters.flat], lr=run.training.learning_rate, weight_decay=run.training.weight_decay, fused=True
    )
    if resumed is not None:
        state = checkpoint.load(resumed, parameters, optimizer)
        state.not_bit_exact = "; ".join(filter(None, (state.not_bit_exact, not_bit_exact))) or None
        report_resume(session, state, not_bit_exact)
    state.conditions, state.dataset_sha256 = conditions, data.sha256
    job = Job(
        model_folder, model, parameters, dropout, optimizer, data, plan, chosen, dtype, state,
        data.train.supervised_counts(),
    )  # fmt: skip
    if resumed is None and data.evaluation is not None:
        # B is zero: this is the base as it is trained on
        state.base_eval_loss_quantized = evaluate(session, model, data.evaluation, chosen.micro_batch_tokens)
    return job


def find_checkpoint(session: Session) -> tuple[Path | None, LoopState]:
    """The newest valid checkpoint, as rank 0 found it, and its state; a fresh state without one."""
    found = checkpoint.newest_valid(session.folder) if session.leads else None
    name = session.group.all_gather_object(found.name if found else None)[0]
    if name is None:
        return None, LoopState()
    path = session.folder.checkpoints / name
    return path, checkpoint.read_state(path)


def choose_dtype(session: Session, state: LoopState) -> Dtype:
    """As asked for; else what the first completed step used; else what the processor computes in natively."""
    used: Dtype | None = state.conditions.get("compute_dtype")
    asked_for = session.run.training.compute_dtype != "auto"
    return first_dtype(session.run) if asked_for or used is None else used


def bit_conditions(session: Session, chosen: MemoryEstimate, dtype: Dtype) -> dict[str, Any]:
    """All that decides in which order numbers are added up."""
    return {
        "world_size": session.world.size,
        "backend": session.run.distributed.backend,
        "compute_dtype": dtype,
        "kernels": kernels.name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "alignment": ALIGNMENT,
        "micro_batch_tokens": chosen.micro_batch_tokens,
        "checkpointing": chosen.checkpointing,
        "torch": torch.__version__,
    }


def check_equal_everywhere(session: Session, model_folder: Path, data: LoadedData) -> None:
    """Ranks that read different files must not train together."""
    facts = {"model": fingerprint(model_folder), "data": data.train.digest(), "torch": torch.__version__}
    everyone = session.group.all_gather_object(facts)
    for rank, theirs in enumerate(everyone):
        for key, value in theirs.items():
            if value != everyone[0][key]:
                raise ConfigurationError(
                    f"rank {rank} has another {key} than rank 0: {value} and {everyone[0][key]}"
                )


def check_resumed_data(resumed: Path | None, state: LoopState, data: LoadedData) -> None:
    """A data position means nothing in other data."""
    if resumed is not None and state.dataset_sha256 != data.sha256:
        raise DataError(
            f"the data changed since {resumed.name} was written (sha256 {state.dataset_sha256[:12]}, now "
            f"{data.sha256[:12]}); put the old data back, or start a job of another name"
        )


def scheme_of(session: Session) -> Scheme:
    """How this job keeps its linear weights."""
    quantization = session.run.quantization
    if quantization.scheme == "none":
        return "none"
    return "nf4-double" if quantization.double_quantization else "nf4"


def evaluate_unquantised(
    session: Session, folder: Path, data: LoadedData, chosen: MemoryEstimate
) -> float | None:
    """The fp32 base's loss; None without evaluation data, or where its weights do not fit memoryPerRank.

    The weights are used from their mapped files; their size is held against
    memoryPerRank all the same, since a model that does not fit would be read
    from disk again for every micro-batch.
    """
    if data.evaluation is None:
        return None
    weights = sum(file.stat().st_size for file in weight_files(folder))
    if chosen.runtime + chosen.scratch + weights > session.run.layout.memory_per_rank:
        return None
    base = load_model(folder, "as-stored", torch.float32)
    return evaluate(session, base, data.evaluation, chosen.micro_batch_tokens)


def log_start(session: Session, chosen: MemoryEstimate, dtype: Dtype, plan: Plan) -> None:
    """Say once what was chosen and why it may be slow or fast."""
    log.info(
        "rank %d of %d: isa %s, %s, %d thread(s), kernels %s, micro-batch %d tokens, checkpointing %s, %d steps, "
        "estimated memory %.2f GiB",
        session.world.rank, session.world.size, session.isa, dtype, torch.get_num_threads(), kernels.name(),
        chosen.micro_batch_tokens, chosen.checkpointing, plan.total_steps, chosen.total / 2**30,
    )  # fmt: skip


def report_resume(session: Session, state: LoopState, not_bit_exact: str | None) -> None:
    """Say from where, and whether bit-exactly."""
    if session.leads:
        exactness = f"not bit-exact: {not_bit_exact}" if not_bit_exact else "bit-exact"
        log.info("resumed after step %d (%s)", state.step, exactness)


# --- the loop


def run_steps(session: Session, job: Job) -> None:
    """Every step up to the last. Raises Stopping after a whole step, Diverged before a bad one is applied."""
    state = job.state
    metrics = MetricsLog(session.folder.path / places.METRICS, state.step) if session.leads else None
    if metrics and state.step == 0:
        metrics.write(step=0, loss=None, eval_loss=state.base_eval_loss_quantized)
    saved_at = time.monotonic()
    while state.step < job.plan.total_steps:
        session.progress.update(stage="Training")
        line, stopping = one_step(session, job)
        try:
            if evaluation_due(session, job) and not stopping:
                line["eval_loss"] = evaluate_between(session, job)
        except Stopping:
            stopping = True
        if metrics:
            session.folder.check_fence()
            metrics.write(**line)
        show(session, job, line)
        if stopping:
            raise Stopping
        if checkpoint_due(session, state.step, job.plan.total_steps, saved_at):
            save(session, job)
            saved_at = time.monotonic()


def evaluation_due(session: Session, job: Job) -> bool:
    """Whether to evaluate after the step just done; the last one is followed by the final evaluation."""
    every, step = session.run.evaluation.every_steps, job.state.step
    return every is not None and step % every == 0 and step < job.plan.total_steps


def evaluate_between(session: Session, job: Job) -> float | None:
    """The eval loss in the middle of training; None without evaluation data."""
    if job.data.evaluation is None:
        return None
    session.progress.update(stage="Evaluating")
    return evaluate(session, job.model, job.data.evaluation, job.memory.micro_batch_tokens)


def show(session: Session, job: Job, line: dict[str, Any]) -> None:
    """Put a step's line into the live report."""
    session.rate.step(line["tokens"], line["seconds"])
    session.progress.count_tokens(line["tokens"])
    session.progress.update(
        **{key: line[key] for key in ("step", "epoch", "loss", "eval_loss", "memory_peak") if key in line},
        tokens_per_second=session.rate.tokens_per_second,
        eta_seconds=session.rate.eta_seconds(job.plan.total_steps - line["step"]),
    )


def one_step(session: Session, job: Job) -> tuple[dict[str, Any], bool]:
    """One optimiser step of all ranks; (its line of metrics.jsonl, whether a rank was asked to stop)."""
    training, state = session.run.training, job.state
    started = time.perf_counter()
    step = job.plan.at(state.step)
    supervised = int(sum(job.supervised[sample] for bin_ in step.bins for sample in bin_))
    loss, tokens = accumulate(session, job, step, supervised)
    agreed = session.agree([loss, tokens, supervised / session.world.size], float(session.memory.peak_needed))
    session.group.all_reduce_sum(job.parameters.gradient)
    norm = float(job.parameters.gradient.norm())
    check_finite(state.step, agreed.sums[0], norm)
    if norm > training.max_grad_norm:
        job.parameters.gradient.mul_(training.max_grad_norm / norm)
    rate = schedule.learning_rate(
        state.step, job.plan.total_steps, training.learning_rate, training.schedule, training.warmup_ratio
    )
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    job.optimizer.step()
    seconds = time.perf_counter() - started
    state.step += 1
    state.tokens += int(agreed.sums[1])
    state.supervised_tokens += supervised
    state.seconds += seconds
    line = {
        "step": state.step,
        "epoch": round(job.plan.epochs_done(state.step), 4),
        "loss": agreed.sums[0] / supervised,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": int(agreed.sums[1]),
        "supervised_tokens": supervised,
        "seconds": seconds,
        "memory_peak": int(max(agreed.each)),
    }
    return line, agreed.stopping


def accumulate(session: Session, job: Job, step: packing.Step, supervised: int) -> tuple[float, int]:
    """Run this rank's bins; their gradients add up in the flat buffer. Returns (summed loss, tokens)."""
    world = session.world
    mine = packing.rank_share(range(len(step.bins)), world.rank, world.size)
    bin_tokens = [step.bin_tokens[n] for n in mine]
    job.parameters.gradient.zero_()
    loss, tokens = 0.0, 0
    for group in packing.micro_batches(mine, bin_tokens, job.memory.micro_batch_tokens):
        numbers = [sample for n in group for sample in step.bins[n]]
        batch = collate(job.data.train, numbers, row_multiple(job.model.dtype))
        if job.dropout is not None:
            job.dropout.at(job.state.step, [*((n, step.bin_tokens[n]) for n in group), (-1, batch.filler)])
        summed = job.model.loss(batch)
        (summed / supervised).backward()  # type: ignore[no-untyped-call]
        loss += float(summed.detach())
        tokens += batch.tokens
    session.tokens_trained += tokens
    return loss, tokens


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raises Diverged; raises ModelError when nothing reaches the adapter at the very first step."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise Diverged(
            f"the {what} of step {step + 1} is not a finite number; the last checkpoint is kept. "
            "A lower learningRate, a longer warm-up or cleaner data may help"
        )
    if step == 0 and norm == 0.0:
        raise ModelError("no gradient reaches the adapter: nothing would be learnt")


def checkpoint_due(session: Session, step: int, total: int, saved_at: float) -> bool:
    """Rank 0 alone writes, so it alone decides; the last step is always saved."""
    every = session.run.checkpoint
    by_steps = every.every_steps is not None and step % every.every_steps == 0
    return session.leads and (by_steps or step == total or time.monotonic() - saved_at >= every.every_seconds)


def save(session: Session, job: Job) -> None:
    """Rank 0: write a checkpoint of the loop as it stands."""
    if not session.leads or job.state.step == 0:
        return
    path = checkpoint.save(
        session.folder, job.parameters, job.optimizer, job.state, session.run.checkpoint.keep
    )
    uri = job_uri(session.run, places.CHECKPOINTS, path.name)
    session.progress.update(checkpoint=CheckpointRef(step=job.state.step, time=checkpoint.now(), uri=uri))
    log.info("checkpoint after step %d", job.state.step)


# --- after the last step


def finish(session: Session, job: Job) -> dict[str, Any]:
    """Write the adapter, reload it, evaluate what was reloaded, publish it if it is good. Rank 0 writes."""
    state = job.state
    stage = export.staging(session.folder)
    if session.leads:
        stage = export.write_adapter(
            session.folder, job.parameters, base_model(session.run, job.model_folder)
        )
    session.group.barrier()
    export.reload_adapter(stage, job.parameters)
    session.progress.update(stage="Evaluating")
    loss = final_loss(session, job)
    session.progress.update(stage="Publishing", eval_loss=loss)
    digest = storage.sha256(stage / places.ADAPTER_WEIGHTS)
    # All have read the staged files once this returns: rank 0 may move or remove them.
    everyone = session.group.all_gather_object(session.facts())
    report = training_report(session.run, job.plan, state, job.dtype, loss, everyone, state.not_bit_exact)
    report["adapter_sha256"] = digest
    report["provenance"] |= {
        "base_model": base_model(session.run, job.model_folder),
        "model_sha256": fingerprint(job.model_folder),
    }
    check_improved(session, state, loss)
    if session.leads:
        session.folder.check_fence()
        metrics = MetricsLog(session.folder.path / places.METRICS, state.step)
        metrics.write(step=state.step, loss=None, eval_loss=loss)
        export.publish(session.folder, stage, report, read(metrics.path))
    session.group.barrier()
    return report


def final_loss(session: Session, job: Job) -> float | None:
    """The reloaded adapter's loss; a stop meanwhile costs nothing: the last step is saved."""
    if job.data.evaluation is None:
        return None
    try:
        return evaluate(session, job.model, job.data.evaluation, job.memory.micro_batch_tokens)
    except Stopping:
        raise Terminated("asked to stop after the last step; its checkpoint is kept") from None


def check_improved(session: Session, state: LoopState, loss: float | None) -> None:
    """Raises NoImprovement, or Diverged for an adapter that does not give a number; nothing is published then."""
    if loss is None:
        return
    if not math.isfinite(loss):
        discard(session)
        raise Diverged("the finished adapter's eval loss is not a finite number; the last checkpoint is kept")
    base = state.base_eval_loss_quantized
    if session.run.evaluation.require_improvement and base is not None and not loss < base:
        discard(session)
        raise NoImprovement(
            f"the adapter's eval loss {loss:.4f} is not below the base's {base:.4f}; nothing is published. "
            "Train longer, change learningRate, or set evaluation.requireImprovement to false"
        )


def discard(session: Session) -> None:
    """Rank 0: remove the adapter that will not be published."""
    if session.leads:
        export.discard(session.folder)
