"""The loss on held-out samples."""

import numpy as np
import torch

from qlora_trainer import packing
from qlora_trainer.batch import collate, row_multiple
from qlora_trainer.data import Samples
from qlora_trainer.memory_watch import return_freed
from qlora_trainer.model import BaseModel
from qlora_trainer.session import Session, Stopping


def evaluate(session: Session, model: BaseModel, samples: Samples, micro_batch_tokens: int) -> float:
    """Mean cross-entropy per supervised token over all samples, the bins shared out among the ranks.

    Touches nothing that training depends on: no gradient, no dropout, no generator.

    Raises:
        Stopping: on every rank, when one was asked to stop meanwhile.
    """
    lengths = samples.lengths()
    longest = session.run.training.max_sequence_length
    bins = packing.pack(lengths, np.arange(len(lengths)), longest, packing=True)
    mine = list(packing.rank_share(bins, session.world.rank, session.world.size))
    loss, count = 0.0, 0
    model.graph.eval()
    with torch.no_grad():
        for group in packing.micro_batches(mine, packing.tokens_of(mine, lengths), micro_batch_tokens):
            if session.stop.is_set():
                break
            batch = collate(samples, [number for bin_ in group for number in bin_], row_multiple(model.dtype))
            loss += float(model.loss(batch))
            count += batch.supervised
    model.graph.train()
    return_freed()
    agreed = session.agree([loss, count])
    if agreed.stopping:
        raise Stopping
    return agreed.sums[0] / agreed.sums[1]
