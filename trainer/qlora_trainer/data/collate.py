"""Samples laid side by side in one row, as the model reads them.

In bf16, torch multiplies through oneDNN, which makes and keeps a program for
every new number of tokens: three times the time of the product itself, and up to
20 MB each. So the row is padded to one of few lengths, by a segment that
nothing is learned from and nothing attends to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlora_trainer.data.dataset import Samples


def pad_multiple(dtype: torch.dtype) -> int:
    """What the number of tokens of a matrix product is rounded up to, for a compute dtype."""
    return 64 if dtype == torch.bfloat16 else 1


@dataclass(frozen=True)
class Batch:
    """Samples one after another in one row."""

    ids: Tensor
    """(tokens,) int64."""
    positions: Tensor
    """(tokens,) int64; start again at 0 with each sample."""
    lengths: list[int]
    """Tokens of each sample, the padding last."""
    padding: int
    """Tokens of the row that belong to no sample."""
    logit_positions: Tensor
    """(supervised,) int64: indices in the row whose next token is supervised: where logits are needed."""
    targets: Tensor
    """(supervised,) int64: those next tokens."""

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return len(self.ids) - self.padding

    @property
    def supervised(self) -> int:
        """Supervised tokens."""
        return len(self.targets)


def collate(samples: Samples, numbers: Sequence[int], pad_multiple: int = 1) -> Batch:
    """The row of the samples with these numbers, in this order, padded to a multiple of `pad_multiple` tokens."""
    parts = [samples.sample(n) for n in numbers]
    ids = np.concatenate([ids for ids, _ in parts]).astype(np.int64)
    targets = np.flatnonzero(np.concatenate([mask for _, mask in parts]))
    lengths = [len(ids) for ids, _ in parts]
    if padding := -len(ids) % pad_multiple:
        ids = np.concatenate([ids, np.zeros(padding, np.int64)])
        lengths.append(padding)
    positions = np.concatenate([np.arange(n) for n in lengths])
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        lengths,
        padding,
        torch.from_numpy(targets - 1),  # the token before a target predicts it
        torch.from_numpy(ids[targets]),
    )
