"""The training of one job on one rank, top to bottom: prepare, step after step, finish."""

import logging
import math
import time
from dataclasses import replace
from typing import Any

from qlora_contract.files import sha256
from qlora_contract.job_folder import ADAPTER_WEIGHTS, CHECKPOINTS, METRICS, job_uri
from qlora_contract.progress import CheckpointRef
from qlora_contract.units import now
from qlora_trainer.artifacts import adapter, checkpoint
from qlora_trainer.artifacts.metrics_log import MetricsLog, StepMetrics, evaluation_line, read_metrics
from qlora_trainer.artifacts.training_report import base_model, training_report
from qlora_trainer.data import packing
from qlora_trainer.data.collate import collate, pad_multiple
from qlora_trainer.data.packing import Step
from qlora_trainer.errors import Diverged, ModelError, NoImprovement, Terminated
from qlora_trainer.modeling.weight_files import fingerprint
from qlora_trainer.training import schedule
from qlora_trainer.training.context import RankContext, StopRequested
from qlora_trainer.training.evaluation import evaluate
from qlora_trainer.training.setup import TrainState, prepare

log = logging.getLogger(__name__)


def train(context: RankContext) -> dict[str, Any]:
    """Train, verify and publish the job's adapter; training_report.json.

    Raises:
        TrainerError: one of its kinds, for every expected end but success.
    """
    try:
        state = prepare(context)
    except StopRequested:
        raise Terminated("asked to stop before the first step") from None
    try:
        run_steps(context, state)
    except StopRequested:
        save(context, state)
        context.group.barrier()
        raise Terminated(f"asked to stop; saved a checkpoint after step {state.loop.step}") from None
    return finish(context, state)


def run_steps(context: RankContext, state: TrainState) -> None:
    """Run every step up to the last.

    Raises:
        StopRequested: after a complete step.
        Diverged: before a bad step is applied.
    """
    run, loop, total_steps = context.run, state.loop, state.schedule.total_steps
    metrics_log = MetricsLog(context.folder.path / METRICS, loop.step) if context.is_rank_zero else None
    if metrics_log and loop.step == 0:
        metrics_log.write(evaluation_line(0, loop.base_eval_loss_quantized))
    saved_at = time.monotonic()
    while loop.step < total_steps:
        context.progress.update(stage="Training")
        metrics, stop = one_step(context, state)
        is_last = loop.step == total_steps  # which the final evaluation follows
        if (
            state.data.evaluation is not None
            and is_due(run.evaluation.every_steps, loop.step)
            and not (is_last or stop)
        ):
            context.progress.update(stage="Evaluating")
            try:
                metrics = replace(metrics, eval_loss=evaluate_adapter(context, state))
            except StopRequested:
                stop = True
        if metrics_log:
            context.folder.check_fence()
            metrics_log.write(metrics.line())
        context.rate.step(metrics.tokens, metrics.seconds)
        context.progress.count_tokens(metrics.tokens)
        context.progress.update(
            **metrics.progress(),
            tokens_per_second=context.rate.tokens_per_second,
            eta_seconds=context.rate.eta_seconds(total_steps - loop.step),
        )
        if stop:
            raise StopRequested
        overdue = time.monotonic() - saved_at >= run.checkpoint.every_seconds
        if is_due(run.checkpoint.every_steps, loop.step) or is_last or overdue:
            save(context, state)
            saved_at = time.monotonic()


def is_due(every_steps: int | None, step: int) -> bool:
    """Whether what happens every so many steps happens after this one."""
    return every_steps is not None and step % every_steps == 0


def one_step(context: RankContext, state: TrainState) -> tuple[StepMetrics, bool]:
    """Run one optimizer step of all ranks: its metrics, and whether a rank was asked to stop.

    Raises:
        Diverged: loss or gradient is not finite; nothing is applied.
        ModelError: no gradient reaches the adapter.
    """
    training, loop, parameters = context.run.training, state.loop, state.parameters
    started = time.perf_counter()
    step = state.schedule.step(loop.step)
    samples = [sample for bin_ in step.bins for sample in bin_]
    count = int(state.counts[samples].sum())
    local = accumulate(context, state, step, count)
    reduced = context.all_reduce_scalars(local, float(context.memory.peak_needed))
    context.group.all_reduce_sum(parameters.gradient)
    norm = float(parameters.gradient.norm())
    check_finite(loop.step, reduced.sums["loss"], norm)
    if norm > training.max_grad_norm:
        parameters.gradient.mul_(training.max_grad_norm / norm)
    rate = schedule.learning_rate(
        loop.step,
        state.schedule.total_steps,
        training.learning_rate,
        training.schedule,
        training.warmup_ratio,
    )
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    seconds = time.perf_counter() - started
    tokens, supervised = int(reduced.sums["tokens"]), int(state.supervised[samples].sum())
    loop.step += 1
    loop.tokens += tokens
    loop.supervised_tokens += supervised
    loop.seconds += seconds
    metrics = StepMetrics(
        step=loop.step,
        epoch=round(state.schedule.epochs_done(loop.step), 4),
        loss=reduced.sums["loss"] / count,
        learning_rate=rate,
        grad_norm=norm,
        tokens=tokens,
        supervised_tokens=supervised,
        seconds=seconds,
        memory_peak=int(max(reduced.per_rank)),
        more={name: reduced.sums[name] / count for name in state.objective.metrics},
    )
    return metrics, reduced.stop_requested


def accumulate(context: RankContext, state: TrainState, step: Step, count: int) -> dict[str, float]:
    """Run this rank's bins of a step; their gradients add up in `state.parameters.gradient`.

    Args:
        context: this rank's.
        state: the model and its adapter.
        step: of all ranks.
        count: what the objective counts in the whole step; the gradient is that of the sum of losses over it.

    Returns:
        This rank's sums: `loss`, `tokens` (padding left out) and the objective's metrics.
    """
    world, objective = context.world, state.objective
    mine = packing.shard(range(len(step.bins)), world.rank, world.size)
    bin_tokens = [step.bin_tokens[n] for n in mine]
    state.parameters.gradient.zero_()
    sums = dict.fromkeys(("loss", "tokens", *objective.metrics), 0.0)
    for micro_batch in packing.micro_batches(mine, bin_tokens, state.memory.micro_batch_tokens):
        numbers = [sample for n in micro_batch for sample in step.bins[n]]
        batch = collate(state.data.train, numbers, pad_multiple(state.model.dtype))
        if state.dropout is not None:
            bins = [(n, step.bin_tokens[n]) for n in micro_batch]
            state.dropout.at(state.loop.step, [*bins, (-1, batch.padding)])
        loss = objective.loss(state.model, batch)
        (loss.total / count).backward()  # type: ignore[no-untyped-call]
        sums["loss"] += float(loss.total.detach())
        sums["tokens"] += batch.tokens
        for name in objective.metrics:
            sums[name] += loss.metrics[name]
    context.tokens_trained += int(sums["tokens"])
    return sums


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raise Diverged for a loss or norm that is not finite, and ModelError for no gradient at all at the first step."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise Diverged(
            f"the {what} of step {step + 1} is not a finite number; the last checkpoint is kept. "
            "Try a lower learningRate, a longer warm-up or cleaner data"
        )
    if step == 0 and norm == 0.0:
        raise ModelError("no gradient reaches the adapter, so nothing would be learned")


def evaluate_adapter(context: RankContext, state: TrainState) -> float | None:
    """The adapter's eval loss as it stands; None without evaluation data."""
    return evaluate(
        context, state.objective, state.model, state.data.evaluation, state.memory.micro_batch_tokens
    )


def save(context: RankContext, state: TrainState) -> None:
    """Rank 0: write a checkpoint of the loop as it stands, unless it has not begun."""
    if not context.is_rank_zero or state.loop.step == 0:
        return
    keep = context.run.checkpoint.keep
    path = checkpoint.save(context.folder, state.parameters, state.optimizer, state.loop, keep)
    uri = job_uri(context.run, CHECKPOINTS, path.name)
    context.progress.update(checkpoint=CheckpointRef(step=state.loop.step, time=now(), uri=uri))
    log.info("checkpoint after step %d", state.loop.step)


def finish(context: RankContext, state: TrainState) -> dict[str, Any]:
    """Write the adapter, reload it, evaluate what was reloaded, and publish it if it is good; training_report.json.

    Raises:
        Terminated: asked to stop; the last step's checkpoint is kept.
        NoImprovement, Diverged: the adapter is not good; nothing is published.
    """
    run, folder, loop = context.run, context.folder, state.loop
    base = base_model(run, state.model_folder)
    staged = adapter.staging_folder(folder)
    if context.is_rank_zero:
        template = state.data.template
        adapter.write_adapter(folder, state.parameters, base, template.source if template else None)
    context.group.barrier()
    adapter.reload_adapter(staged, state.parameters)
    context.progress.update(stage="Evaluating")
    try:
        loss = evaluate_adapter(context, state)
    except StopRequested:
        raise Terminated("asked to stop after the last step; its checkpoint is kept") from None
    context.progress.update(stage="Publishing", eval_loss=loss)
    digest = sha256(staged / ADAPTER_WEIGHTS)
    # All have read the staged files once this returns: rank 0 may move or remove them.
    ranks = context.group.all_gather_object(context.rank_stats())
    try:
        check_improved(loop.base_eval_loss_quantized, loss, required=run.evaluation.require_improvement)
    except (Diverged, NoImprovement):
        if context.is_rank_zero:
            adapter.discard(folder)
        raise
    report = training_report(run, state.schedule, loop, state.dtype, loss, ranks)
    report["data"] = {use: facts.report() for use, facts in state.data.facts().items()}
    report["adapter_sha256"] = digest
    report["provenance"] |= {"base_model": base, "model_sha256": fingerprint(state.model_folder)}
    if context.is_rank_zero:
        folder.check_fence()
        metrics_log = MetricsLog(folder.path / METRICS, loop.step)
        metrics_log.write(evaluation_line(loop.step, loss))
        adapter.publish(folder, staged, report, read_metrics(metrics_log.path))
    context.group.barrier()
    return report


def check_improved(base_loss: float | None, loss: float | None, *, required: bool) -> None:
    """Raise Diverged for an adapter whose eval loss is not finite, and NoImprovement for one no better than the base.

    Args:
        base_loss: of the quantized base; None when not measured.
        loss: the adapter's; None without evaluation data, which passes.
        required: whether the job asks for an improvement.
    """
    if loss is None:
        return
    if not math.isfinite(loss):
        raise Diverged("the finished adapter's eval loss is not a finite number; the last checkpoint is kept")
    if required and base_loss is not None and not loss < base_loss:
        raise NoImprovement(
            f"the adapter's eval loss {loss:.4f} is not below the base's {base_loss:.4f}; nothing is published. "
            "Train longer, change learningRate, or set evaluation.requireImprovement to false"
        )
