"""What training minimizes: the seam that the loop and evaluation see.

    mean loss = sum of loss(model, batch) over all batches / sum of counts(samples) over all samples

A step's gradient is that of its mean loss. Both sums run over all ranks and micro-batches, so neither their number nor
their size changes the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qlora_trainer.data.collate import Batch
from qlora_trainer.data.dataset import Samples
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.loss import summed_cross_entropy


@dataclass(frozen=True)
class BatchLoss:
    """What an objective makes of a batch."""

    total: Tensor
    """Scalar, fp64: the loss, summed over what `Objective.counts` counts. `backward` reaches the adapter."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further sums over the same, by name (Objective.metrics)."""


class Objective(Protocol):
    """A training objective."""

    metrics: tuple[str, ...]
    """Names of the further numbers that are reported with each step, as means like the loss."""

    def counts(self, samples: Samples) -> NDArray[np.int64]:
        """(samples,): how much each sample counts in the mean; the sum over a step is positive."""

    def loss(self, model: BaseModel, batch: Batch) -> BatchLoss:
        """The batch's loss. It may run the model more than once, also with its adapters disabled.

        Under torch.no_grad only the numbers are wanted. The padding of a batch must not count.
        """


class SupervisedFineTuning:
    """Cross-entropy of the supervised tokens, each predicted from the tokens before it; their mean is the loss."""

    metrics: tuple[str, ...] = ()

    def counts(self, samples: Samples) -> NDArray[np.int64]:
        """(samples,): supervised tokens of each."""
        return samples.supervised_counts()

    def loss(self, model: BaseModel, batch: Batch) -> BatchLoss:
        """Summed cross-entropy; the logits of other tokens are never computed."""
        hidden = model.hidden_states(batch)
        rows = hidden[batch.logit_positions]
        return BatchLoss(summed_cross_entropy(rows, model.head, batch.targets, model.softcap))
