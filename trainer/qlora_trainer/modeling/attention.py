"""Exact attention over packed samples.

Several samples stand one after another in a row of tokens; each may see only
itself. One mask over the whole row costs ten times the useful work. The kernel
library takes the row as it is, in fp32 and bf16, in blocks of scores that no one
keeps: memory grows with the tokens, not with their square. It computes in fp32,
the sums of grouped queries' gradients too.

Its twin in plain torch splits the row into its samples, and each runs torch's own
causal attention. Slicing would give every sample a full-sized zero gradient in
the backward pass; `split` gives one concatenation instead.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor
from transformers import AttentionInterface

from qlora_trainer.modeling.key_value_cache import CachedSequence
from qlora_trainer.modeling.passes import AttentionSettings, Passes, passes_for

NAME = "qlora_packed"

SHORT = 256
"""Tokens up to which a bf16 sample's attention runs in fp32: torch's bf16 backward pass has a fixed cost that makes it
three times slower at 128 tokens (trainer/benchmarks/LOG.md), and fp32 is more exact."""


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segment_lengths: list[int] | None = None,
    cached: Sequence[CachedSequence | None] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, head size).
        key: (1, key heads, tokens, head size); heads is a multiple of key heads.
        value: as key.
        attention_mask: must be None: segments say who sees whom.
        scaling: factor of the scores; None for 1/sqrt(head size).
        dropout: must be 0.
        sliding_window: a token sees itself and the sliding_window - 1 tokens before it; None: all before it.
        segment_lengths: tokens of each sample in order; they sum to tokens.
        cached: of each segment the sequence that it continues, whose earlier tokens it sees, too, and which keeps its
            keys and values; None for a segment by itself. Without gradients.

    Returns:
        (1, tokens, heads, head size), and None for the weights.

    Raises:
        ValueError: without segments, or when they do not cover the tokens.
    """
    if segment_lengths is None:
        raise ValueError("packed attention needs segment_lengths: without them samples would see each other")
    if attention_mask is not None or dropout:
        raise ValueError("packed attention takes neither a mask nor dropout")
    if query.shape[0] != 1 or sum(segment_lengths) != query.shape[2]:
        raise ValueError(f"segments of {sum(segment_lengths)} tokens do not cover {tuple(query.shape)}")
    if cached is not None:
        keys, values = _with_cached(module, key, value, segment_lengths, cached)
        if any(sequence is not None and sequence.length for sequence in cached):
            outputs = [
                _causal(q, k, v, scaling, sliding_window, query.shape[1] != key.shape[1])
                for q, k, v in zip(torch.split(query, segment_lengths, dim=2), keys, values, strict=True)
            ]
            return torch.cat(outputs, dim=2).transpose(1, 2), None
    passes = passes_for(query, key, value)
    if passes is not None:
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        settings = AttentionSettings(segment_lengths, sliding_window, scale)
        output: Tensor = _PackedAttention.apply(query, key, value, settings, passes)
        return output, None
    return _reference(query, key, value, segment_lengths, scaling, sliding_window), None


def _with_cached(
    module: Any,
    key: Tensor,
    value: Tensor,
    segment_lengths: list[int],
    cached: Sequence[CachedSequence | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values that each segment sees: its own, after those that its sequence has kept; these are kept, too."""
    keys, values = list(torch.split(key, segment_lengths, 2)), list(torch.split(value, segment_lengths, 2))
    for number, sequence in enumerate(cached):
        if sequence is not None:
            keys[number], values[number] = sequence.append(module.layer_idx, keys[number], values[number])
    return keys, values


class _PackedAttention(torch.autograd.Function):
    """The kernel library's: (1, heads, tokens, head size) three times -> (1, tokens, heads, head size)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, passes: Passes
    ) -> Tensor:
        output, statistics = passes.attention(query, key, value, settings)
        ctx.save_for_backward(query, key, value, output, statistics)
        ctx.settings, ctx.passes = settings, passes
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.passes.attention_grad(*ctx.saved_tensors, grad_outputs[0], ctx.settings)
        return *gradients, None, None


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: list[int],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """The same in plain torch."""
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        _causal(q, k, v, scaling, window, grouped)
        for q, k, v in zip(
            torch.split(query, segment_lengths, dim=2),
            torch.split(key, segment_lengths, dim=2),
            torch.split(value, segment_lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, grouped: bool
) -> Tensor:
    """Attention of one sample: q (1, heads, length, head size); k and v as q, or with fewer heads when grouped.

    k and v may hold more tokens than q: q's are then the last of them.
    """
    length, seen = q.shape[2], k.shape[2]
    if q.dtype == torch.bfloat16 and seen <= SHORT:
        return _causal(q.float(), k.float(), v.float(), scaling, window, grouped).to(q.dtype)
    if length == 1:  # it sees all that there is
        first = max(0, seen - window) if window is not None else 0
        return F.scaled_dot_product_attention(
            q, k[:, :, first:], v[:, :, first:], scale=scaling, enable_gqa=grouped
        )
    if length == seen and (window is None or length <= window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    distance = torch.arange(seen - length, seen)[:, None] - torch.arange(seen)[None, :]
    band = (distance >= 0) & (distance < (window or seen))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=band, scale=scaling, enable_gqa=grouped)


def register() -> None:
    """Make transformers know packed attention by NAME. It gets no mask: NAME is not in the mask registry."""
    AttentionInterface.register(NAME, packed_attention)
