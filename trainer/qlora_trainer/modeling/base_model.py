"""The base model, loaded: a transformers graph of our layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qlora_trainer.data.collate import Batch, pad_multiple
from qlora_trainer.modeling.expert_adapters import ExpertMatrices
from qlora_trainer.modeling.key_value_cache import CachedSequence
from qlora_trainer.modeling.lora_linear import LoraLinear
from qlora_trainer.modeling.loss import cap, head_logits
from qlora_trainer.modeling.rotary import LongRope
from qlora_trainer.modeling.virtual_tokens import PrefixTokens, SoftPrompt


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
    experts: dict[str, ExpertMatrices] = field(default_factory=dict)
    """Experts' matrices that can have adapters, by their parameters in transformers' class of the checkpoint."""
    logits_divisor: float = 1.0
    """What the logits are divided by; hidden_states has done it."""
    softcap: float | None = None
    """Logits l become softcap * tanh(l / softcap); None: they stay."""
    use: object = None
    """What keeps the files that weights are mapped from, as long as there is a reference to it."""
    virtual: SoftPrompt | PrefixTokens | None = None
    """What each sample sees before its own tokens; None: nothing."""

    @property
    def virtual_tokens(self) -> int:
        """How many tokens a sample sees before its own."""
        return self.virtual.count if self.virtual is not None and self.virtual.enabled else 0

    def hidden_states(self, batch: Batch, cached: Sequence[CachedSequence | None] | None = None) -> Tensor:
        """What the head reads: (tokens, hidden size), in the compute dtype; no sample of the row sees another.

        Its product with the head is the logits, but for `softcap`. `cached`: of each sample in the row the sequence
        that it continues (modeling.attention), without gradients. Virtual tokens stand before each sample, and before
        one that a sequence begins with; rows of the padding may then be missing.
        """
        states: Tensor
        if self.virtual is None or not self.virtual.enabled:
            states = self._run(batch.positions, batch.lengths, cached, input_ids=batch.ids[None])
        else:
            begins = [
                not (cached and cached[number] and cached[number].length)  # type: ignore[union-attr]
                for number in range(len(batch.lengths))
            ]
            if batch.padding:
                begins[-1] = False
            if isinstance(self.virtual, PrefixTokens):
                states = self._behind_prefix(self.virtual, batch, cached, begins)
            else:
                states = self._behind_prompt(self.virtual, batch, cached, begins)
        return states if self.logits_divisor == 1.0 else states / self.logits_divisor

    def _run(
        self,
        positions: Tensor,
        lengths: list[int],
        cached: Sequence[CachedSequence | None] | None,
        **inputs: Any,
    ) -> Tensor:
        """The decoder's output (tokens, hidden size) for a row of segments."""
        if self._long_rope is not None:
            self._long_rope.lengths = lengths
        states: Tensor = self.graph(
            position_ids=positions[None],
            use_cache=False,
            segment_lengths=lengths,
            **({} if cached is None else {"cached": cached}),
            **inputs,
        ).last_hidden_state[0]
        return states

    def _behind_prefix(
        self,
        prefix: PrefixTokens,
        batch: Batch,
        cached: Sequence[CachedSequence | None] | None,
        begins: list[bool],
    ) -> Tensor:
        """Samples that begin see the prefix's keys and values in every layer."""
        behind = torch.tensor([prefix.count * each for each in begins])
        positions = batch.positions + behind.repeat_interleave(torch.tensor(batch.lengths))
        return self._run(
            positions, batch.lengths, cached, input_ids=batch.ids[None], prefix=prefix.before(begins)
        )

    def _behind_prompt(
        self,
        prompt: SoftPrompt,
        batch: Batch,
        cached: Sequence[CachedSequence | None] | None,
        begins: list[bool],
    ) -> Tensor:
        """Samples that begin have the prompt's rows before their own. The row gets a padding of its own."""
        graph: Any = self.graph
        samples = len(batch.lengths) - bool(batch.padding)
        own = batch.lengths[:samples]
        rows = graph.get_input_embeddings()(batch.ids[: batch.tokens])
        prompts = iter(prompt.copies(sum(begins), rows.dtype))
        pieces, positions, parts, lengths = [], [], [], []
        for piece, places, begin in zip(
            torch.split(rows, own), torch.split(batch.positions[: batch.tokens], own), begins, strict=False
        ):
            if begin:
                pieces.append(next(prompts))
                positions.append(torch.arange(prompt.count))
                parts.append(prompt.count)
            pieces.append(piece)
            positions.append(places + prompt.count * begin)
            parts.append(len(piece))
            lengths.append(len(piece) + prompt.count * begin)
        if padding := -sum(lengths) % pad_multiple(self.dtype):
            pieces.append(rows.new_zeros(padding, rows.shape[1]))
            positions.append(torch.arange(padding))
            parts.append(padding)
            lengths.append(padding)
        of_segments = None if cached is None else [*cached[:samples], None][: len(lengths)]
        states = self._run(torch.cat(positions), lengths, of_segments, inputs_embeds=torch.cat(pieces)[None])
        found = iter(torch.split(states, parts))
        kept = []
        for begin in begins[:samples]:
            if begin:
                next(found)
            kept.append(next(found))
        return torch.cat(kept)

    @property
    def _long_rope(self) -> LongRope | None:
        rotary = getattr(self.graph, "rotary_emb", None)
        return rotary if isinstance(rotary, LongRope) else None

    @property
    def rotated_anew_behind(self) -> int | None:
        """Tokens behind which all of a sequence are rotated with other frequencies; None: that never happens."""
        return None if self._long_rope is None else self._long_rope.first

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
