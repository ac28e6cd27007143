"""Rotary embeddings whose frequencies depend on a sample's length: LongRoPE (Ding et al. 2024), as transformers has it.

A sample of up to `original_max_position_embeddings` tokens is rotated with one set of frequencies, all tokens of a
longer one with another. In a packed row each sample has its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LONGROPE = "longrope"
"""Its `rope_type` in config.json."""


class LongRope(nn.Module):
    """Both sets of frequencies, and which samples of a row have which.

    Args:
        stock: transformers' class of the family's rotary embeddings.
        config: of the language model.
    """

    def __init__(self, stock: Any, config: Any) -> None:
        super().__init__()
        self.first = int(config.rope_parameters["original_max_position_embeddings"])
        """Tokens of the longest sample that is rotated with the short factors."""
        self.lengths: Sequence[int] = ()
        """Tokens of each segment of the row that comes next, in order."""
        self.short, self.long = stock(config=config), stock(config=config)
        self.long.inv_freq = ROPE_INIT_FUNCTIONS[LONGROPE](config, None, seq_len=self.first + 1)[0]
        for each in (self.short, self.long):
            each.rope_type = "default"  # so that it does not choose by the largest position of the whole row

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, as the stock class gives them: position_ids is (1, tokens), which the lengths sum to."""
        lengths = torch.tensor(self.lengths)
        longer = position_ids[0, lengths.cumsum(0) - 1] >= self.first
        if not bool(longer.any()):
            short: tuple[Tensor, Tensor] = self.short(x, position_ids)
            return short
        chosen = longer.repeat_interleave(lengths)[None, :, None]
        cos, sin = (
            torch.where(chosen, long, short)
            for long, short in zip(self.long(x, position_ids), self.short(x, position_ids), strict=True)
        )
        return cos, sin


def rotary_embeddings(stock: Any, config: Any) -> nn.Module:
    """The rotary embeddings of a decoder, for packed rows.

    Args:
        stock: transformers' class of them.
        config: of the language model.
    """
    made: nn.Module = stock(config=config)
    return LongRope(stock, config) if getattr(made, "rope_type", None) == LONGROPE else made
