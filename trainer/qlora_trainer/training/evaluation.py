"""The loss on held-out samples."""

import numpy as np
import torch

from qlora_trainer import packing
from qlora_trainer.batch import collate, row_multiple
from qlora_trainer.data import Samples
from qlora_trainer.memory_watch import return_freed
from qlora_trainer.model import BaseModel
from qlora_trainer.training.context import RankContext, StopRequested
from qlora_trainer.training.objective import Objective


def evaluate(
    context: RankContext,
    objective: Objective,
    model: BaseModel,
    samples: Samples | None,
    micro_batch_tokens: int,
) -> float | None:
    """The objective's mean loss over all samples, the bins shared out among the ranks; None without samples.

    Touches nothing that training depends on: no gradient, no dropout, no generator.

    Args:
        context: this rank's.
        objective: what is measured.
        model: with or without an adapter; it is in training mode afterwards.
        samples: the same on every rank.
        micro_batch_tokens: tokens that a rank runs at once, at most.

    Raises:
        StopRequested: on every rank, when one was asked to stop in the meantime.
    """
    if samples is None:
        return None
    lengths = samples.lengths()
    counts = objective.counts(samples)
    longest = context.run.training.max_sequence_length
    bins = packing.pack(lengths, np.arange(len(lengths)), longest, packing=True)
    mine = list(packing.rank_share(bins, context.world.rank, context.world.size))
    loss, count = 0.0, 0
    model.graph.eval()
    with torch.no_grad():
        for micro_batch in packing.micro_batches(mine, packing.tokens_of(mine, lengths), micro_batch_tokens):
            if context.stop.is_set():
                break
            numbers = [number for bin_ in micro_batch for number in bin_]
            batch = collate(samples, numbers, row_multiple(model.dtype))
            loss += float(objective.loss(model, batch).total)
            count += int(counts[numbers].sum())
    model.graph.train()
    return_freed()
    reduced = context.all_reduce_scalars({"loss": loss, "count": count})
    if reduced.stop_requested:
        raise StopRequested
    return reduced.sums["loss"] / reduced.sums["count"]
