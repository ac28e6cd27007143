"""Samples laid side by side in one row, as the model reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlora_trainer.data import Samples


@dataclass(frozen=True)
class Batch:
    """Samples one after another in one row; no padding."""

    ids: Tensor
    """(tokens,) int64."""
    positions: Tensor
    """(tokens,) int64; start again at 0 with each sample."""
    lengths: list[int]
    """Tokens of each sample."""
    rows: Tensor
    """(supervised,) int64: positions in the row whose next token is supervised."""
    targets: Tensor
    """(supervised,) int64: those next tokens."""

    @property
    def tokens(self) -> int:
        """All tokens of the row."""
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """Tokens that are learnt."""
        return len(self.rows)


def collate(samples: Samples, numbers: Sequence[int]) -> Batch:
    """The row of the samples with these numbers, in this order."""
    parts = [samples.sample(n) for n in numbers]
    ids = np.concatenate([ids for ids, _ in parts]).astype(np.int64)
    targets = np.flatnonzero(np.concatenate([mask for _, mask in parts]))
    lengths = [len(ids) for ids, _ in parts]
    positions = np.concatenate([np.arange(n) for n in lengths])
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        lengths,
        torch.from_numpy(targets - 1),  # the token before a target predicts it
        torch.from_numpy(ids[targets]),
    )
