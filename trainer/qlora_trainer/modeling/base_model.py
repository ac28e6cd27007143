"""The base model, loaded: a transformers graph of our layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qlora_trainer.data.collate import Batch
from qlora_trainer.modeling.key_value_cache import CachedSequence
from qlora_trainer.modeling.lora_linear import LoraLinear
from qlora_trainer.modeling.loss import cap, head_logits


class Embedding(nn.Module):
    """The frozen token embedding, kept in the checkpoint's dtype, given out in the compute dtype, times a factor."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype
        self.factor = factor

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., hidden size)."""
        rows = F.embedding(ids, self.weight).to(self.dtype)
        if self.factor == 1.0:
            return rows
        # The factor is rounded, as in transformers' graph.
        return rows.mul_(torch.tensor(self.factor, dtype=self.dtype))


@dataclass
class BaseModel:
    """A causal language model with frozen weights."""

    graph: nn.Module
    """transformers' decoder without its output head."""
    head: Tensor
    """(vocabulary, hidden size), in the checkpoint's dtype; the embedding itself where they are tied."""
    linears: dict[str, LoraLinear]
    """The linear layers that can have an adapter, by their paths in the checkpoint (`model.layers.0.mlp.up_proj`)."""
    dtype: torch.dtype
    """What is computed in."""
    logits_divisor: float = 1.0
    """What the logits are divided by; hidden_states has done it."""
    softcap: float | None = None
    """Logits l become softcap * tanh(l / softcap); None: they stay."""
    use: object = None
    """What keeps the files that weights are mapped from, as long as there is a reference to it."""

    def hidden_states(self, batch: Batch, cached: Sequence[CachedSequence | None] | None = None) -> Tensor:
        """What the head reads: (tokens, hidden size), in the compute dtype; no sample of the row sees another.

        Its product with the head is the logits, but for `softcap`. `cached`: of each sample in the row the sequence
        that it continues (modeling.attention), without gradients.
        """
        states: Tensor = self.graph(
            input_ids=batch.ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            segment_lengths=batch.lengths,
            **({} if cached is None else {"cached": cached}),
        ).last_hidden_state[0]
        return states if self.logits_divisor == 1.0 else states / self.logits_divisor

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, hidden size) of hidden_states -> (rows, vocabulary) fp32, without gradients."""
        logits = head_logits(hidden, self.head, torch.float32)
        if self.softcap is not None:
            cap(logits, self.softcap)
        return logits

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each layer in the backward pass instead of keeping what it needs."""
        graph: Any = self.graph
        graph.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
