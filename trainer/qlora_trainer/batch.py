"""Samples laid side by side in one row, as the model reads them.

In bf16, torch multiplies through oneDNN, which makes and keeps a program for
every new number of rows: three times the time of the product itself, and up to
20 MB each. So the row is filled up to one of few lengths, by a sample that
nobody learns from and nobody sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlora_trainer.data import Samples


def row_multiple(dtype: torch.dtype) -> int:
    """What the number of rows of a matrix product is rounded up to, for a compute dtype."""
    return 64 if dtype == torch.bfloat16 else 1


@dataclass(frozen=True)
class Batch:
    """Samples one after another in one row."""

    ids: Tensor
    """(tokens,) int64."""
    positions: Tensor
    """(tokens,) int64; start again at 0 with each sample."""
    lengths: list[int]
    """Tokens of each sample, the filler last."""
    filler: int
    """Tokens of the row that belong to no sample."""
    rows: Tensor
    """(supervised,) int64: positions in the row whose next token is supervised."""
    targets: Tensor
    """(supervised,) int64: those next tokens."""

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return len(self.ids) - self.filler

    @property
    def supervised(self) -> int:
        """Tokens that are learnt."""
        return len(self.rows)


def collate(samples: Samples, numbers: Sequence[int], multiple: int = 1) -> Batch:
    """The row of the samples with these numbers, in this order, filled up to a multiple of `multiple` tokens."""
    parts = [samples.sample(n) for n in numbers]
    ids = np.concatenate([ids for ids, _ in parts]).astype(np.int64)
    targets = np.flatnonzero(np.concatenate([mask for _, mask in parts]))
    lengths = [len(ids) for ids, _ in parts]
    if filler := -len(ids) % multiple:
        ids = np.concatenate([ids, np.zeros(filler, np.int64)])
        lengths.append(filler)
    positions = np.concatenate([np.arange(n) for n in lengths])
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        lengths,
        filler,
        torch.from_numpy(targets - 1),  # the token before a target predicts it
        torch.from_numpy(ids[targets]),
    )
