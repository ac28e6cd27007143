"""Exact attention over packed samples.

Several samples stand one after another in a row of tokens; each may see only
itself. One mask over the whole row costs ten times the useful work. The kernel
library takes the row as it is, in fp32 and bf16, in blocks of scores that no one
keeps: memory grows with the tokens, not with their square. It computes in fp32,
the sums of grouped queries' gradients too.

Its twin in plain torch splits the row into its samples, and each runs torch's own
causal attention. Slicing would give every sample a full-sized zero gradient in
the backward pass; `split` gives one concatenation instead. Where torch's has not
the formula (a window, capped scores, sinks), queries run a block at a time against the
keys that they see, so that no mask or scores of a whole sample exist either.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from qlora_trainer.modeling.key_value_cache import CachedSequence
from qlora_trainer.modeling.passes import AttentionSettings, Passes, passes_for
from qlora_trainer.modeling.virtual_tokens import Prefix

NAME = "qlora_packed"

SHORT = 256
"""Tokens up to which a bf16 sample's attention runs in fp32: torch's bf16 backward pass has a fixed cost that makes it
three times slower at 128 tokens (trainer/benchmarks/LOG.md), and fp32 is more exact."""

BLOCK = 128
"""Queries that plain torch runs at once against the keys that they see."""


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segment_lengths: list[int] | None = None,
    cached: Sequence[CachedSequence | None] | None = None,
    prefix: Prefix | None = None,
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
        softcap: scores s become softcap * tanh(s / softcap); None: they stay.
        s_aux: transformers' name of sinks, (heads,), frozen: a further score of each token, whose key has no value.
        segment_lengths: tokens of each sample in order; they sum to tokens.
        cached: of each segment the sequence that it continues, whose earlier tokens it sees, too, and which keeps its
            keys and values; None for a segment by itself. Without gradients.
        prefix: further keys and values that the tokens of segments see, as if they were the segments' first; a window
            counts them.

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
    if prefix is not None:
        layer: Any = module
        rows = prefix.lay_before(layer.layer_idx, query, key, value, segment_lengths)
        output, _none = packed_attention(
            module,
            *rows,
            None,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            s_aux=s_aux,
            segment_lengths=prefix.lengths(segment_lengths),
            cached=cached,
        )
        return prefix.drop(output, segment_lengths), None
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    settings = AttentionSettings(segment_lengths, sliding_window, scale, softcap, s_aux)
    if cached is not None:
        keys, values = _with_cached(module, key, value, segment_lengths, cached)
        if any(sequence is not None and sequence.length for sequence in cached):
            outputs = [
                _causal(q, k, v, settings)
                for q, k, v in zip(torch.split(query, segment_lengths, dim=2), keys, values, strict=True)
            ]
            return torch.cat(outputs, dim=2).transpose(1, 2), None
    passes = passes_for(query, key, value)
    if passes is not None:
        attended: Tensor = _PackedAttention.apply(query, key, value, settings, passes)
        return attended, None
    return _reference(query, key, value, settings), None


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
        if settings.sinks is not None:
            _add_sinks(output, statistics, settings.sinks)
        ctx.save_for_backward(query, key, value, output, statistics)
        ctx.settings, ctx.passes = settings, passes
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.passes.attention_grad(*ctx.saved_tensors, grad_outputs[0], ctx.settings)
        return *gradients, None, None


def _add_sinks(output: Tensor, statistics: Tensor, sinks: Tensor) -> None:
    """Give each row of scores one more, in place; the backward pass then has what it needs.

    With the sink the sum of exponentials grows from S to S + exp(sink), so that all probabilities, and with them the
    output, shrink by S / (S + exp(sink)). The sink has no value, and adds nothing else.

    Args:
        output: (1, tokens, heads, head size).
        statistics: (2, heads, tokens): each row's largest score m, and 1 / the sum of exp(score - m).
        sinks: (heads,).
    """
    largest, factor = statistics
    share = 1 / (1 + factor * torch.exp(sinks.float()[:, None] - largest))
    factor.mul_(share)
    output.mul_(share.t()[None, :, :, None])


def _reference(query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
    """The same in plain torch."""
    lengths = list(settings.lengths)
    outputs = [
        _causal(q, k, v, settings)
        for q, k, v in zip(*(torch.split(x, lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
    """Attention of one sample: q (1, heads, length, head size); k and v as q, or with fewer heads.

    k and v may hold more tokens than q: q's are then the last of them.
    """
    length, seen, window = q.shape[2], k.shape[2], settings.window
    if q.dtype == torch.bfloat16 and seen <= SHORT:
        return _causal(q.float(), k.float(), v.float(), settings).to(q.dtype)
    grouped, before = q.shape[1] != k.shape[1], seen - length
    plain = settings.softcap is None and settings.sinks is None
    if plain and before == 0 and (window is None or length <= window):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=settings.scale, enable_gqa=grouped
        )
    reach = seen if window is None else min(window, seen)
    # Row r of a block sees the `reach` keys up to its own, which is column reach - 1 + r. Every block's mask is a view.
    column = torch.arange(reach - 1 + BLOCK)
    behind = torch.arange(BLOCK)[:, None] + reach - 1 - column
    mask = torch.zeros(BLOCK, len(column), dtype=q.dtype)
    mask.masked_fill_((behind < 0) | (behind >= reach), -math.inf)
    outputs = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        reached, last = before + start - reach + 1, before + stop
        first = max(0, reached)
        visible = mask[: stop - start, first - reached : reach - 1 + stop - start]
        block = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        if plain:
            outputs.append(
                F.scaled_dot_product_attention(
                    *block, attn_mask=visible, scale=settings.scale, enable_gqa=grouped
                )
            )
        else:  # recomputed, as nothing else keeps the scores from being kept
            outputs.append(checkpoint(_scored, *block, visible, settings, use_reentrant=False))
    return torch.cat(outputs, dim=2)


def _scored(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, settings: AttentionSettings) -> Tensor:
    """Attention with capped scores or sinks: q (1, heads, rows, head size), k and v (1, key heads, columns, size)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * settings.scale
    if settings.softcap is not None:
        scores = torch.tanh(scores / settings.softcap) * settings.softcap
    scores = scores + mask
    dtype = torch.promote_types(q.dtype, torch.float32)
    if settings.sinks is None:
        return scores.softmax(dim=-1, dtype=dtype).to(q.dtype) @ v
    sinks = settings.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1, dtype=dtype)
    return weights[..., :-1].to(q.dtype) @ v


def register() -> None:
    """Make transformers know packed attention by NAME. It gets no mask: NAME is not in the mask registry."""
    AttentionInterface.register(NAME, packed_attention)
