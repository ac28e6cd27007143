"""The loss on held-out samples."""

import numpy as np
import torch

from qlora_contract.progress import Work
from qlora_trainer.data import packing
from qlora_trainer.data.collate import collate, pad_multiple
from qlora_trainer.data.dataset import Samples
from qlora_trainer.host.process_memory import malloc_trim
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.training.context import RankContext, StopRequested
from qlora_trainer.training.inputs import lengths_in_rows
from qlora_trainer.training.objective import Objective


def evaluate(
    context: RankContext,
    objective: Objective,
    model: BaseModel,
    samples: Samples | None,
    micro_batch_tokens: int,
    what: str = "the adapter",
) -> float | None:
    """The objective's mean loss over all samples, the bins shared out among the ranks; None without samples.

    Touches nothing that training depends on: no gradient, no dropout, no generator.

    Args:
        context: this rank's.
        objective: what is measured.
        model: with or without an adapter; it is in training mode afterwards.
        samples: the same on every rank.
        micro_batch_tokens: tokens that a rank runs at once, at most.
        what: is evaluated, for the live report.

    Raises:
        StopRequested: on every rank, when one was asked to stop in the meantime.
    """
    if samples is None:
        return None
    lengths, groups = lengths_in_rows(samples, context.run), samples.group_offsets
    counts = objective.counts(samples)
    order = np.arange(len(samples) if groups is None else len(groups) - 1)
    longest = context.run.training.max_sequence_length
    bins = packing.pack(lengths, order, longest, packing=True, group_offsets=groups)
    mine = list(packing.shard(bins, context.world.rank, context.world.size))
    tokens = packing.bin_lengths(mine, lengths)
    loss, count = 0.0, 0
    context.progress.begin(Work(name=f"evaluating {what}", unit="tokens", total=sum(tokens)))
    model.graph.eval()
    with torch.no_grad():
        for micro_batch in packing.micro_batches(mine, tokens, micro_batch_tokens):
            if context.stop.is_set():
                break
            numbers = [number for bin_ in micro_batch for number in bin_]
            batch = collate(samples, numbers, pad_multiple(model.dtype))
            loss += float(objective.loss(model, batch).total)
            count += int(counts[numbers].sum())
            context.progress.advance(batch.tokens)
    model.graph.train()
    context.progress.begin(None)
    malloc_trim()
    reduced = context.all_reduce_scalars({"loss": loss, "count": count})
    if reduced.stop_requested:
        raise StopRequested
    return reduced.sums["loss"] / reduced.sums["count"]
