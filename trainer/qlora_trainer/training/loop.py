"""The training of one job on one rank, top to bottom: prepare, step after step, finish."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_contract.files import sha256
from qlora_contract.job_folder import ADAPTER_WEIGHTS, CHECKPOINTS, METRICS, job_uri, read_manifest
from qlora_contract.progress import FIRST_STEP, CheckpointRef, Work, timeline_text
from qlora_contract.units import now
from qlora_trainer.artifacts import adapter, base_losses, checkpoint
from qlora_trainer.artifacts.checkpoint import LoopState
from qlora_trainer.artifacts.metrics_log import MetricsLog, StepMetrics, evaluation_line, read_metrics
from qlora_trainer.artifacts.training_report import training_report
from qlora_trainer.data import packing
from qlora_trainer.data.collate import collate, pad_multiple
from qlora_trainer.data.packing import Step
from qlora_trainer.errors import (
    AdaptersDiffer,
    Diverged,
    ModelError,
    NoImprovement,
    Terminated,
    TerminatedAlone,
)
from qlora_trainer.host.process_memory import malloc_trim
from qlora_trainer.modeling.adapter_methods import adapters_disabled, method_for
from qlora_trainer.modeling.adapter_parameters import AdapterParameters, checksum
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.quantization.schemes import AsStored
from qlora_trainer.training import schedule
from qlora_trainer.training.answers import answer_held_out
from qlora_trainer.training.context import RankContext, StopHere, StopRequested
from qlora_trainer.training.evaluation import evaluate
from qlora_trainer.training.setup import DTYPES, TrainState, prepare
from qlora_trainer.training.tracking import Tracking

log = logging.getLogger(__name__)

NORM_PIECE = 1 << 26
"""Weights whose gradient's norm is taken at once."""
STOPPED_AT_THE_START = "asked to stop before the first step"
STOPPED_AT_THE_END = "asked to stop after the last step; its checkpoint is kept"


def train(context: RankContext) -> dict[str, Any]:
    """Train, verify and publish the job's adapter; training_report.json.

    Raises:
        TrainerError: one of its kinds, for every expected end but success.
    """
    try:
        state = prepare(context)
    except StopRequested:
        raise Terminated(STOPPED_AT_THE_START) from None
    except StopHere:
        raise TerminatedAlone(STOPPED_AT_THE_START) from None
    try:
        run_steps(context, state)
    except StopRequested:
        save(context, state)
        context.group.barrier()
        if state.loop.step == 0:
            raise Terminated(STOPPED_AT_THE_START) from None
        raise Terminated(f"asked to stop; saved a checkpoint after step {state.loop.step}") from None
    return finish(context, state)


def run_steps(context: RankContext, state: TrainState) -> None:
    """Run every step up to the last.

    Raises:
        StopRequested: a rank was asked to stop; the state is that after a whole step.
        Diverged: before a bad step is applied.
    """
    loop, total_steps = state.loop, state.schedule.total_steps
    metrics_log = open_metrics(context, loop.step)
    if metrics_log and loop.step == 0 and loop.base_eval_loss_quantized is not None:
        record_evaluation(context, metrics_log, 0, loop.base_eval_loss_quantized)
    measure_initial(context, state)
    first = loop.step
    saved_at = time.monotonic()
    while loop.step < total_steps and not out_of_patience(context, loop):
        begin_step(context, loop.step - first)
        metrics, stop = one_step(context, state)
        context.rate.step(metrics.tokens, metrics.seconds)
        context.progress.count_tokens(metrics.tokens)
        context.progress.update(
            **metrics.progress(),
            tokens_per_second=context.rate.tokens_per_second,
            eta_seconds=context.rate.eta_seconds(total_steps - loop.step),
        )
        if state.data.evaluation is not None and not stop:
            try:
                # After a step, so that nobody has to wait for the first one.
                if loop.base_eval_loss_quantized is None:
                    measure_base(context, state, metrics_log)
                # The last step is followed by the final evaluation.
                if is_due(context.run.evaluation.every_steps, loop.step) and loop.step < total_steps:
                    metrics = replace(metrics, eval_loss=evaluate_between_steps(context, state))
            except StopRequested:
                stop = True
        if metrics_log:
            context.folder.check_fence()
            record(context, metrics_log, metrics.line())
            context.books.count_step(loop.step)
        if stop:
            raise StopRequested
        if save_is_due(context, state, time.monotonic() - saved_at):
            save(context, state)
            saved_at = time.monotonic()


def begin_step(context: RankContext, done: int) -> None:
    """Tell that a step begins, after so many of this attempt; after the first one, what the wait for it went into."""
    context.progress.update(FIRST_STEP if done == 0 else None, stage="Training")
    if done == 1 and context.is_rank_zero:
        log.info("%s", timeline_text(context.progress.timeline))


def open_metrics(context: RankContext, step: int) -> MetricsLog | None:
    """Rank 0's metrics.jsonl up to this step; what was beyond is lost."""
    if not context.is_rank_zero:
        return None
    context.books.begin_steps(step)
    context.tracking = Tracking(context.run, context.folder.path, step)
    return MetricsLog(context.folder.path / METRICS, step)


def record(context: RankContext, metrics_log: MetricsLog, line: Mapping[str, Any]) -> None:
    """Add a line to metrics.jsonl, and tell its other readers."""
    metrics_log.write(line)
    if context.tracking is not None:
        context.tracking.write(line)


def save_is_due(context: RankContext, state: TrainState, seconds: float) -> bool:
    """Whether a checkpoint follows the step that was just done, so many seconds after the last one."""
    settings, step = context.run.checkpoint, state.loop.step
    is_last = step == state.schedule.total_steps or out_of_patience(context, state.loop)
    if step == state.loop.best_step:
        return True
    return is_due(settings.every_steps, step) or is_last or seconds >= settings.every_seconds


def compare_with_best(loop: LoopState, loss: float | None) -> None:
    """Take note of what the adapter scores after the step that was just done."""
    if (
        loss is not None
        and math.isfinite(loss)
        and (loop.best_eval_loss is None or loss < loop.best_eval_loss)
    ):
        loop.best_step, loop.best_eval_loss, loop.evaluations_since_best = loop.step, loss, 0
    else:
        loop.evaluations_since_best += 1


def out_of_patience(context: RankContext, loop: LoopState) -> bool:
    """Whether training ends before its last step, since evaluations have not got better for long enough."""
    patience = context.run.evaluation.early_stopping_patience
    return patience is not None and loop.evaluations_since_best >= patience


def is_due(every_steps: int | None, step: int) -> bool:
    """Whether what happens every so many steps happens after this one."""
    return every_steps is not None and step % every_steps == 0


def one_step(context: RankContext, state: TrainState) -> tuple[StepMetrics, bool]:
    """Run one optimizer step of all ranks: its metrics, and whether a rank was asked to stop.

    Raises:
        StopRequested: a rank was asked to stop and has left the step unfinished; nothing is applied on any.
        AdaptersDiffer: the ranks are no longer training the same adapter.
        Diverged: loss or gradient is not finite; nothing is applied.
        ModelError: no gradient reaches the adapter.
    """
    training, loop, parameters = context.run.training, state.loop, state.parameters
    started = time.perf_counter()
    step = state.schedule.step(loop.step)
    samples = [sample for bin_ in step.bins for sample in bin_]
    count = int(state.counts[samples].sum())
    local = accumulate(context, state, step, count)
    own = {"memory": float(context.memory.peak_needed), "adapter": float(checksum(parameters))}
    reduced = context.all_reduce_scalars(local, own)
    check_same_adapter(loop.step, reduced.per_rank["adapter"])
    if reduced.sums["unfinished"]:
        raise StopRequested
    context.group.all_reduce_sum(parameters.gradient)
    norm = gradient_norm(parameters.gradient)
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
        memory_peak=int(max(reduced.per_rank["memory"])),
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
        This rank's sums: `loss`, `tokens` (padding left out), the objective's metrics, and `unfinished`: 1 when it was
        asked to stop before its last micro-batch.
    """
    world, objective = context.world, state.objective
    mine = packing.shard(range(len(step.bins)), world.rank, world.size)
    bin_tokens = [step.bin_tokens[n] for n in mine]
    state.parameters.gradient.zero_()
    sums = dict.fromkeys(("loss", "tokens", "unfinished", *objective.metrics), 0.0)
    for micro_batch in packing.micro_batches(mine, bin_tokens, state.memory.micro_batch_tokens):
        if context.stop.is_set():
            sums["unfinished"] = 1.0
            break
        numbers = [sample for n in micro_batch for sample in step.bins[n]]
        batch = collate(state.data.train, numbers, pad_multiple(state.model.dtype))
        if state.dropout is not None:
            bins = [(n, step.bin_tokens[n]) for n in micro_batch]
            state.dropout.at(state.loop.step, [*bins, (-1, batch.padding)])
        loss = objective.loss(state.model, batch)
        (loss.total / count).backward()  # type: ignore[no-untyped-call]
        sums["loss"] += float(loss.total.detach())
        sums["tokens"] += batch.tokens
        context.progress.advance(batch.tokens)
        for name in objective.metrics:
            sums[name] += loss.metrics[name]
    context.tokens_trained += int(sums["tokens"])
    return sums


def gradient_norm(gradient: Tensor) -> float:
    """Of a flat gradient. In pieces, since torch adds up in fp32: beyond 2^24 terms a lane a sum stops growing."""
    norms = [float(piece.norm()) for piece in torch.split(gradient, NORM_PIECE)]
    return norms[0] if len(norms) == 1 else math.hypot(*norms)


def check_same_adapter(step: int, checksums: list[float]) -> None:
    """Raise AdaptersDiffer unless all ranks, given in order, have the same adapter after so many steps."""
    other = [rank for rank, found in enumerate(checksums) if found != checksums[0]]
    if other:
        raise AdaptersDiffer(
            f"after step {step}, the adapter of rank {' and '.join(map(str, other))} is not that of rank 0: memory or "
            "the network of a node is faulty, or the backend adds up otherwise on each rank. Training goes back to the "
            "last checkpoint; if it happens again, leave that node out"
        )


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


def evaluate_between_steps(context: RankContext, state: TrainState) -> float | None:
    """The adapter's eval loss after the step that was just done, which may be the best. Raises StopRequested."""
    context.progress.update(stage="Evaluating")
    loss = evaluate_adapter(context, state)
    if loss is not None and not math.isfinite(loss):
        raise Diverged(
            f"the eval loss after step {state.loop.step} is not a finite number; the last checkpoint is kept. "
            "Try a lower learningRate, a longer warm-up or cleaner data"
        )
    context.progress.update(eval_loss=loss)
    if context.run.evaluation.keep_best:
        compare_with_best(state.loop, loss)
    return loss


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
    context.books.write(facts_so_far(context, state))


def record_evaluation(context: RankContext, metrics_log: MetricsLog, step: int, loss: float | None) -> None:
    """Record an evaluation before the first step or after the last one, if there was one."""
    if loss is not None:
        record(context, metrics_log, evaluation_line(step, loss))


def measure_initial(context: RankContext, state: TrainState) -> None:
    """Find out, before the first step, what the adapter scores that the job goes on from, if it does.

    Raises:
        StopRequested: a rank was asked to stop in the meantime.
    """
    if state.loop.step > 0 or context.run.adapter.initial_adapter is None:
        return
    context.progress.update(stage="Evaluating")
    samples, micro_batch = state.data.evaluation, state.memory.micro_batch_tokens
    loss = evaluate(context, state.objective, state.model, samples, micro_batch, "the initial adapter")
    state.loop.initial_eval_loss = finite(loss)


def measure_base(context: RankContext, state: TrainState, metrics_log: MetricsLog | None) -> None:
    """Find out what the base scores as it is trained on, and keep that for all attempts.

    Args:
        context: this rank's.
        state: the model and its adapter, which does not take part.
        metrics_log: of rank 0, for the curve's first point.

    Raises:
        StopRequested: a rank was asked to stop in the meantime.
    """
    context.progress.update(stage="Evaluating")
    with adapters_disabled(state.model):
        loss = evaluate(
            context,
            state.objective,
            state.model,
            state.data.evaluation,
            state.memory.micro_batch_tokens,
            "the base",
        )
    if loss is not None and not math.isfinite(loss):
        raise ModelError(
            f"the base's own loss on the evaluation data, in {state.dtype}, is not a finite number, so nothing can be "
            "compared with it: see whether its weights are whole, and set training.computeDtype to fp32"
        )
    state.loop.base_eval_loss_quantized = loss
    state.base_losses = replace(state.base_losses, quantized=loss)
    if context.is_rank_zero:
        base_losses.write(context.folder, state.base_losses)
    if metrics_log:
        record_evaluation(context, metrics_log, 0, loss)


def finish(context: RankContext, state: TrainState) -> dict[str, Any]:
    """Write the adapter, reload it, evaluate what was reloaded, and publish it if it is good; training_report.json.

    The model is not in `state` any more afterwards.

    Raises:
        Terminated: asked to stop; the last step's checkpoint is kept.
        NoImprovement, Diverged: the adapter is not good; nothing is published.
    """
    run, folder, loop = context.run, context.folder, state.loop
    staged = adapter.staging_folder(folder)
    context.progress.update(stage="Evaluating")
    try:
        loss = last_loss = stage_adapter(context, state)
        best = best_checkpoint(context, loop, loss) if run.evaluation.keep_best else None
        if best is not None:
            checkpoint.load_adapter(best, state.parameters)
            loss = stage_adapter(context, state)
        if loss is not None and loop.base_eval_loss_quantized is None:
            measure_base(context, state, None)
        answer_held_out(context, state)
    except StopRequested:
        raise Terminated(STOPPED_AT_THE_END) from None
    context.progress.update(eval_loss=loss)
    digest = sha256(staged / ADAPTER_WEIGHTS)
    context.group.barrier()  # all have read the staged files: rank 0 may move or remove them
    try:
        check_finite_weights(state.parameters)
        required = run.evaluation.require_improvement
        check_improved(loop.base_eval_loss_quantized, loss, required=required, initial=loop.initial_eval_loss)
    except (Diverged, NoImprovement):
        if context.is_rank_zero:
            adapter.discard(folder)
        raise
    unquantized = None
    if state.data.evaluation is not None:
        try:
            loop.base_eval_loss, unquantized = measure_unquantized(context, state, staged, loss)
        except StopRequested:
            raise Terminated(STOPPED_AT_THE_END) from None
        except StopHere:
            raise TerminatedAlone(STOPPED_AT_THE_END) from None
    context.progress.update(stage="Publishing")
    ranks = context.group.all_gather_object(context.rank_stats())
    report = facts_of(context, state, loss, ranks)
    report["adapter_sha256"] = digest
    report["eval_loss_unquantized"] = unquantized
    if context.is_rank_zero:
        folder.check_fence()
        report["cost"] = context.books.cost()
        metrics_log = MetricsLog(folder.path / METRICS, loop.step)
        record_evaluation(context, metrics_log, loop.step, last_loss)
        adapter.publish(folder, staged, report, read_metrics(metrics_log.path))
    context.group.barrier()
    return report


def stage_adapter(context: RankContext, state: TrainState) -> float | None:
    """Write the adapter as it stands, reload it on every rank, and evaluate what was reloaded."""
    template = state.data.template
    if context.is_rank_zero:
        portable = template.portable if template else None
        base = adapter.base_model(context.run)
        adapter.write_adapter(context.folder, state.parameters, base, portable, state.tokenizer)
    context.group.barrier()
    adapter.reload_adapter(adapter.staging_folder(context.folder), state.parameters)
    return evaluate_adapter(context, state)


def best_checkpoint(context: RankContext, loop: LoopState, last_loss: float | None) -> Path | None:
    """The checkpoint that is to be published in place of the last step, on every rank; None: the last step is best.

    Args:
        context: this rank's.
        loop: where training ended; its best step becomes the last where that is published.
        last_loss: of the last step.
    """
    path = None
    if loop.best_step is not None and loop.best_eval_loss is not None:
        better = last_loss is not None and last_loss < loop.best_eval_loss
        path = None if better else checkpoint.path_of(context.folder, loop.best_step)
    if context.is_rank_zero and path is not None and read_manifest(path) is None:
        log.warning("the checkpoint of the best step, %s, is damaged: the last step is published", path)
        path = None
    chosen: Path | None = context.group.all_gather_object(path)[0]
    if chosen is None:
        loop.best_step, loop.best_eval_loss = loop.step, last_loss
    else:
        log.info("step %d was the best, eval loss %.4f: it is published", loop.best_step, loop.best_eval_loss)
    return chosen


def facts_of(
    context: RankContext, state: TrainState, loss: float | None, ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    """What training_report.json says of the job as it stands. `loss`, `ranks`: as of training_report."""
    report = training_report(context.run, state.schedule, state.loop, state.dtype, loss, ranks)
    report["data"] = {use: facts.report() for use, facts in state.data.facts().items()}
    report["evaluated"] = evaluated(state)
    report["timeline"] = {what: round(seconds, 3) for what, seconds in context.progress.timeline.items()}
    report["plan"] = {
        "memory_bytes": state.memory.total,
        "memory_per_rank_bytes": context.run.layout.memory_per_rank,
        "parts": state.memory.parts(),
        "micro_batch_tokens": state.memory.micro_batch_tokens,
        "checkpointing": state.memory.checkpointing,
    }
    report["provenance"] |= {
        "base_model": adapter.base_model(context.run),
        "weights_sha256": state.loop.weights_sha256,
        **state.model_facts,
    }
    return report


def facts_so_far(context: RankContext, state: TrainState) -> dict[str, Any]:
    """What rank 0 knows of a job that is not finished, without asking the others."""
    known = context.progress.report
    report = facts_of(context, state, None, [context.rank_stats()])
    report["ranks"] = [fact.model_dump(by_alias=False) for fact in known.ranks] or report["ranks"]
    report["peak_memory_bytes"] = known.memory_peak
    return report


def evaluated(state: TrainState) -> dict[str, int] | None:
    """What all eval losses are of, for training_report.json; None without evaluation data."""
    samples, facts = state.data.evaluation, state.data.evaluation_facts
    if samples is None or facts is None:
        return None
    left_out = facts.records - facts.dropped - len(samples)
    return {"samples": len(samples), "tokens": len(samples.ids), "samples_left_out": left_out}


def measure_unquantized(
    context: RankContext, state: TrainState, staged: Path, loss: float | None
) -> tuple[float | None, float | None]:
    """The eval losses of the base as stored, in the compute dtype, alone and with the adapter, as servers run it.

    Without quantization these are the weights that were trained on, and both are measured already.
    None where its weights exceed memoryPerRank, or can be read no more; what is known of the base already is not
    measured again. Numbers for the report alone, so they come last, and end nothing. The weights are mapped from their
    files, not copied. Their size is held against memoryPerRank all the same, since a model that does not fit would be
    read from disk again for every micro-batch.

    Args:
        context: this rank's.
        state: loses its model, parameters and optimizer.
        staged: the folder of the finished adapter.
        loss: the adapter's, on the base that it was trained on.

    Raises:
        StopRequested, StopHere: a rank was asked to stop in the meantime.
    """
    if context.run.quantization.scheme == "none":
        return state.loop.base_eval_loss_quantized, loss
    chosen = state.memory
    weights = state.model_bytes
    known = state.loop.base_eval_loss
    if chosen.runtime + chosen.scratch + weights > context.run.layout.memory_per_rank:
        return known, None
    del state.model, state.parameters, state.optimizer  # memory need not hold both
    malloc_trim()
    weights_bytes = Work(name="loading the unquantized base", unit="bytes", total=weights)
    context.progress.begin(weights_bytes)
    try:
        base = load_model(state.model_folder, AsStored(), DTYPES[state.dtype], context.advance)
    except (ModelError, OSError) as error:
        log.warning("the unquantized base is not evaluated: %s", error)
        base = None
    reduced = context.all_reduce_scalars({"missing": float(base is None)})
    if reduced.stop_requested:
        raise StopRequested
    if base is None or reduced.sums["missing"]:
        return known, None
    samples, micro_batch = state.data.evaluation, chosen.micro_batch_tokens
    if known is None:
        known = finite(evaluate(context, state.objective, base, samples, micro_batch, "the unquantized base"))
        if context.is_rank_zero:
            base_losses.write(context.folder, replace(state.base_losses, unquantized=known))
    run = context.run
    parameters = method_for(run.adapter).attach(base, seed=run.training.seed, dropout=None)
    adapter.reload_adapter(staged, parameters)
    what = "the adapter on the unquantized base"
    return known, finite(evaluate(context, state.objective, base, samples, micro_batch, what))


def finite(loss: float | None) -> float | None:
    """A loss for the report; None where it is no finite number, which JSON does not have."""
    return loss if loss is not None and math.isfinite(loss) else None


def check_finite_weights(parameters: AdapterParameters) -> None:
    """Raise Diverged for a weight that is no finite number: without evaluation data nothing else would show it."""
    if not torch.isfinite(parameters.flat).all():
        raise Diverged(
            "the finished adapter has weights that are not finite numbers; the last checkpoint is kept"
        )


def check_improved(
    base_loss: float | None, loss: float | None, *, required: bool, initial: float | None = None
) -> None:
    """Raise Diverged for an adapter whose eval loss is not finite, and NoImprovement for one no better than the base.

    Args:
        base_loss: of the quantized base; None when not measured.
        loss: the adapter's; None without evaluation data, which passes.
        required: whether the job asks for an improvement.
        initial: of the adapter that it went on from, which it must improve on, too; None without one.
    """
    if loss is None:
        return
    if not math.isfinite(loss):
        raise Diverged("the finished adapter's eval loss is not a finite number; the last checkpoint is kept")
    others = [("the base's", base_loss), ("the initial adapter's", initial)]
    for whose, other in others if required else []:
        if other is None or loss < other:
            continue
        raise NoImprovement(
            f"the adapter's eval loss {loss:.4f} is not below {whose} {other:.4f}; nothing is published. "
            "Its last checkpoint is kept: to publish it all the same, set evaluation.requireImprovement to false and "
            "start the job again under its name (`qlora run FILE`, or delete and create the QLoRAJob): no step is "
            "repeated. Else train longer, or with another learningRate, under another name"
        )
