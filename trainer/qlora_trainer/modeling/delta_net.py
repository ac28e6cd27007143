"""Gated delta networks (Yang et al. 2024), the linear attention of Qwen3.5, over packed samples.

Each value head has a state S (key size, value size), zero where a sample begins. A token forgets some of it, corrects
what it holds for its key, and reads it:

    S <- exp(g) S,    S <- S + k (beta (v - S^T k))^T,    o = S^T q

q, k and v come out of a causal convolution over a few tokens of the same sample; what is read is normalized and gated.

Tokens run in chunks: within one, the corrections are the solution of a triangular system, so that a chunk is a few
matrix products, and states go from chunk to chunk alone. Chunks never cross from one sample into another.

Everything between the projections belongs to a head. So one autograd function does it, a few heads and samples at a
time, keeps its inputs alone and computes the rest again in the backward pass: what the chunks need is twenty times as
much. It computes in fp32 and rounds once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qlora_contract.memory import RECURRENT_NUMBERS
from qlora_trainer.modeling.key_value_cache import CachedSequence

FP32 = frozenset({"A_log", "dt_bias"})
"""Last parts of the names of parameters that stay fp32 whatever is computed in: decays are exponentials of them."""

CHUNK = 64
"""Tokens of a chunk: its products are as large as those with the state."""

BLOCK = 4096
"""Tokens up to which samples run together, chunks filled up."""

NORM_EPSILON = 1e-6
"""Of the norms of queries and keys."""


class GatedDeltaNet(nn.Module):
    """transformers' layer of the same name, with samples that see nothing of each other.

    Args:
        stock: that layer, its weights loaded and its linear layers replaced.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.layer_idx: int = stock.layer_idx
        self.in_proj_qkv, self.in_proj_z = stock.in_proj_qkv, stock.in_proj_z
        self.in_proj_b, self.in_proj_a = stock.in_proj_b, stock.in_proj_a
        self.out_proj = stock.out_proj
        self.core = Core(
            Heads.of(stock),
            convolution=stock.conv1d.weight.data[:, 0].float(),
            rate=stock.A_log.data.float().exp(),
            step_bias=stock.dt_bias.data.float(),
            norm=stock.norm.weight.data.float(),
            epsilon=stock.norm.variance_epsilon,
        )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        segment_lengths: list[int] | None = None,
        cached: Sequence[CachedSequence | None] | None = None,
        **_: Any,
    ) -> Tensor:
        """(1, tokens, hidden size) -> the same.

        Args:
            hidden_states: the row.
            segment_lengths: tokens of each sample in order; they sum to tokens.
            cached: of each segment the sequence that it continues, and whose state is replaced by the one behind it;
                None for a segment by itself. Without gradients.

        Raises:
            ValueError: without segments, or when they do not cover the tokens.
        """
        if segment_lengths is None:
            raise ValueError("a delta network needs segment_lengths: else samples would see each other")
        if hidden_states.shape[0] != 1 or sum(segment_lengths) != hidden_states.shape[1]:
            raise ValueError(
                f"segments of {sum(segment_lengths)} tokens do not cover {tuple(hidden_states.shape)}"
            )
        rows = hidden_states[0]
        inputs = self.in_proj_qkv(rows), self.in_proj_z(rows), self.in_proj_b(rows), self.in_proj_a(rows)
        if cached is None:
            out: Tensor = _Core.apply(*inputs, self.core, segment_lengths)
        else:
            states = [None if each is None else each.state(self.layer_idx) for each in cached]
            out, behind = self.core.run(*inputs, segment_lengths, states)
            for sequence, state in zip(cached, behind, strict=True):
                if sequence is not None:
                    sequence.keep_state(self.layer_idx, *state)
        mixed: Tensor = self.out_proj(out[None])
        return mixed


@dataclass(frozen=True)
class Heads:
    """How many there are, and of what sizes."""

    keys: int
    """Heads of queries and keys."""
    values: int
    """Heads of values, a multiple: those of a key head stand together."""
    key_size: int
    value_size: int

    @classmethod
    def of(cls, stock: Any) -> "Heads":
        """Those of transformers' layer."""
        return cls(stock.num_k_heads, stock.num_v_heads, stock.head_k_dim, stock.head_v_dim)

    @property
    def per_key(self) -> int:
        """Heads of values that share a key."""
        return self.values // self.keys

    @property
    def width(self) -> int:
        """Numbers of a token in the widest tensor of a key head."""
        return self.per_key * max(self.key_size, self.value_size)


State = tuple[Tensor, Tensor]
"""What a sample leaves to the tokens behind it: the last inputs of the convolution (taps - 1, channels), and the states
of all heads (value heads, key size, value size)."""


@dataclass(frozen=True)
class Core:
    """What lies between the projections: convolution, delta rule, gated norm. All of it is frozen."""

    heads: Heads
    convolution: Tensor
    """(channels, taps) fp32; the last tap is the token itself. Channels: queries, keys, values."""
    rate: Tensor
    """(value heads,) fp32: g is -rate softplus(a + step_bias)."""
    step_bias: Tensor
    """(value heads,) fp32."""
    norm: Tensor
    """(value size,) fp32."""
    epsilon: float

    def run(
        self,
        qkv: Tensor,
        z: Tensor,
        b: Tensor,
        a: Tensor,
        lengths: Sequence[int],
        states: Sequence[State | None] | None = None,
    ) -> tuple[Tensor, list[State]]:
        """The output (tokens, values) in the inputs' type, and with `states` what each segment leaves.

        Args:
            qkv: (tokens, channels): the convolution's input.
            z: (tokens, values): the gate.
            b: (tokens, value heads): beta is its sigmoid.
            a: (tokens, value heads): what decays are made of.
            lengths: tokens of each segment.
            states: what each segment goes on from; None: all begin, and none leaves anything.
        """
        out = torch.empty_like(z)
        behind: list[State] = []
        for block in blocks(lengths):
            parts: list[list[Tensor]] = []
            for group in self.groups(block):
                inputs = group.cut(block, qkv, z, b, a)
                before = None if states is None else group.states(states[block.segments])
                mixed, left = group.mix(inputs, block, before)
                out[block.rows, group.of_values] = mixed.to(out.dtype)
                parts.append(left)
            if states is not None:
                inputs_left = self._inputs_left(qkv[block.rows], block.lengths, states[block.segments])
                heads_left = [torch.cat(of_groups) for of_groups in zip(*parts, strict=True)]
                behind += zip(inputs_left, heads_left, strict=True)
        return out, behind

    def gradients(
        self, qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, lengths: Sequence[int], dy: Tensor
    ) -> tuple[Tensor, ...]:
        """Those of the inputs of `run`, from that of its output (tokens, values)."""
        found = tuple(torch.empty_like(x) for x in (qkv, z, b, a))
        for block in blocks(lengths):
            for group in self.groups(block):
                with torch.enable_grad():
                    inputs = [x.detach().requires_grad_() for x in group.cut(block, qkv, z, b, a)]
                    mixed, _ = group.mix(inputs, block, None)
                gradients = torch.autograd.grad(
                    mixed, inputs, dy[block.rows, group.of_values].to(mixed.dtype)
                )
                group.put(block, gradients, *found)
        return found

    def groups(self, block: "Block") -> "Iterator[Group]":
        """The heads, as many at a time as RECURRENT_NUMBERS allows."""
        at_once = max(1, RECURRENT_NUMBERS // (block.padded * self.heads.width))
        for first in range(0, self.heads.keys, at_once):
            yield Group(self, first, min(first + at_once, self.heads.keys))

    def _inputs_left(
        self, qkv: Tensor, lengths: Sequence[int], states: Sequence[State | None]
    ) -> list[Tensor]:
        """The last taps - 1 inputs of each segment's convolution, zeros where there were fewer."""
        reach = self.convolution.shape[1] - 1
        left = []
        for rows, state in zip(torch.split(qkv, list(lengths)), states, strict=True):
            before = rows.new_zeros(reach, rows.shape[1]) if state is None else state[0]
            left.append(torch.cat([before, rows])[len(rows) :])
        return left


class _Core(torch.autograd.Function):
    """Core.run for samples that begin: (tokens, channels), (tokens, values), twice (tokens, value heads)."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, core: Core, lengths: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(qkv, z, b, a)
        ctx.core, ctx.lengths = core, lengths
        return core.run(qkv, z, b, a, lengths)[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.core.gradients(*ctx.saved_tensors, ctx.lengths, grad_outputs[0]), None, None


@dataclass(frozen=True)
class Block:
    """Neighboring segments of a row, and where their tokens are laid so that each begins a chunk."""

    rows: slice
    """Of the row."""
    segments: slice
    """Of all segments."""
    lengths: tuple[int, ...]
    """Tokens of each."""
    chunk: int
    """Tokens of a chunk."""

    @cached_property
    def chunks(self) -> list[int]:
        """Of each segment."""
        return [-(-length // self.chunk) for length in self.lengths]

    @property
    def padded(self) -> int:
        """Tokens of all chunks."""
        return sum(self.chunks) * self.chunk

    @cached_property
    def places(self) -> Tensor:
        """(tokens,): where each token is among the chunks' tokens."""
        return self._places([chunks * self.chunk for chunks in self.chunks])

    def behind(self, gap: int) -> Tensor:
        """(tokens,): where each token is with a gap before each segment."""
        return self._places([length + gap for length in self.lengths]) + gap

    def _places(self, taken: Sequence[int]) -> Tensor:
        """Where tokens are if each segment takes so many places."""
        lengths, room = torch.tensor(self.lengths), torch.tensor(taken)
        moved = (room - lengths).cumsum(0) - (room - lengths)
        return torch.arange(sum(self.lengths)) + moved.repeat_interleave(lengths)


def blocks(lengths: Sequence[int]) -> Iterator[Block]:
    """As many segments at a time as BLOCK allows, at least one."""
    chunk = CHUNK if max(lengths, default=1) > 1 else 1  # single tokens: answers that are being generated
    segment = row = 0
    while segment < len(lengths):
        stop, padded = segment, 0
        while stop < len(lengths) and (stop == segment or padded + lengths[stop] <= BLOCK):
            padded += -(-lengths[stop] // chunk) * chunk
            stop += 1
        taken = tuple(lengths[segment:stop])
        end = row + sum(taken)
        yield Block(slice(row, end), slice(segment, stop), taken, chunk)
        segment, row = stop, end


@dataclass(frozen=True)
class Group:
    """Neighboring key heads, and the value heads that they serve."""

    core: Core
    first: int
    stop: int

    @property
    def of_values(self) -> slice:
        """Numbers of a token's values."""
        return self._of(self.core.heads.per_key * self.core.heads.value_size)

    @property
    def of_value_heads(self) -> slice:
        """Heads of values."""
        return self._of(self.core.heads.per_key)

    def _of(self, each: int, start: int = 0) -> slice:
        return slice(start + self.first * each, start + self.stop * each)

    @property
    def _channels(self) -> tuple[slice, slice, slice]:
        """Queries, keys and values among the convolution's channels."""
        heads = self.core.heads
        keys = heads.keys * heads.key_size
        each = heads.per_key * heads.value_size
        return self._of(heads.key_size), self._of(heads.key_size, keys), self._of(each, 2 * keys)

    def cut(self, block: Block, qkv: Tensor, z: Tensor, b: Tensor, a: Tensor) -> list[Tensor]:
        """This group's part of the inputs, wide."""
        wide = torch.promote_types(qkv.dtype, torch.float32)
        channels = torch.cat([qkv[block.rows, part] for part in self._channels], dim=1)
        of_heads = self.of_value_heads
        parts = channels, z[block.rows, self.of_values], b[block.rows, of_heads], a[block.rows, of_heads]
        return [x.to(wide) for x in parts]

    def put(
        self, block: Block, parts: Sequence[Tensor], qkv: Tensor, z: Tensor, b: Tensor, a: Tensor
    ) -> None:
        """The reverse of `cut`."""
        widths = [part.stop - part.start for part in self._channels]
        for part, value in zip(self._channels, torch.split(parts[0], widths, dim=1), strict=True):
            qkv[block.rows, part] = value.to(qkv.dtype)
        z[block.rows, self.of_values] = parts[1].to(z.dtype)
        b[block.rows, self.of_value_heads] = parts[2].to(b.dtype)
        a[block.rows, self.of_value_heads] = parts[3].to(a.dtype)

    def states(self, states: Sequence[State | None]) -> list[State | None]:
        """This group's part of them."""
        return [
            None
            if state is None
            else (
                torch.cat([state[0][:, part] for part in self._channels], dim=1),
                state[1][self.of_value_heads],
            )
            for state in states
        ]

    def mix(
        self, inputs: Sequence[Tensor], block: Block, states: Sequence[State | None] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """(tokens, values) of these heads, and their state (value heads, key size, value size) behind each segment.

        `inputs`: those of Core.run, as `cut` gives them.
        """
        qkv, z, b, a = inputs
        core, heads, tokens = self.core, self.core.heads, len(qkv)
        keys, per_key = self.stop - self.first, heads.per_key
        taps = torch.cat([core.convolution[part] for part in self._channels]).to(qkv.dtype)
        before = None if states is None else [None if state is None else state[0] for state in states]
        mixed = F.silu(convolve(qkv, taps, block, before))
        q, k, v = torch.split(
            mixed, [keys * heads.key_size, keys * heads.key_size, keys * per_key * heads.value_size], dim=1
        )
        g = -core.rate[self.of_value_heads] * F.softplus(a + core.step_bias[self.of_value_heads])
        read, left = delta_rule(
            unit(q.view(tokens, keys, 1, -1)) * heads.key_size**-0.5,
            unit(k.view(tokens, keys, 1, -1)),
            v.view(tokens, keys, per_key, -1),
            g.view(tokens, keys, per_key),
            b.sigmoid().view(tokens, keys, per_key),
            block,
            None if states is None else [None if state is None else state[1] for state in states],
        )
        read = read.reshape(tokens, keys * per_key, -1)
        normed = read * (read.square().mean(-1, keepdim=True) + core.epsilon).rsqrt() * core.norm
        return normed.view(tokens, -1) * F.silu(z), left


def unit(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + eps), over the last dimension."""
    return x * (x.square().sum(-1, keepdim=True) + NORM_EPSILON).rsqrt()


def convolve(x: Tensor, taps: Tensor, block: Block, before: Sequence[Tensor | None] | None) -> Tensor:
    """Each channel's causal convolution within each segment: (tokens, channels) -> the same.

    Args:
        x: (tokens, channels).
        taps: (channels, taps); the last is the token's own.
        block: the segments.
        before: of each segment the last inputs before it (taps - 1, channels); None: zeros.
    """
    reach = taps.shape[1] - 1
    behind = block.behind(reach)
    laid = x.new_zeros(len(x) + reach * len(block.lengths), x.shape[1]).index_copy(0, behind, x)
    start = 0
    for length, rows in zip(block.lengths, before or (), strict=before is not None):
        if rows is not None:
            laid[start : start + reach] = rows
        start += length + reach
    out = laid[: len(laid) - reach] * taps[:, 0]
    for tap in range(1, reach + 1):
        out = out + laid[tap : len(laid) - reach + tap] * taps[:, tap]
    return out.index_select(0, behind - reach)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    block: Block,
    states: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """What every token reads (tokens, key heads, value heads of each, value size), and the states behind segments.

    With L the decayed products beta_i exp(c_i - c_j) k_i . k_j of a chunk's earlier tokens j, c the sums of g from its
    begin, and S the state before it, the corrections are (1 + L)^-1 beta (v - exp(c) k S).

    Args:
        q: (tokens, key heads, 1, key size), scaled.
        k: as q, of unit length.
        v: (tokens, key heads, value heads of each, value size).
        g: (tokens, key heads, value heads of each): logarithms of what is left of a state, at most 0.
        beta: as g: how much of a correction is made.
        block: the segments.
        states: those before the segments (value heads, key size, value size); None: zeros.
    """
    q, k, v = (_in_chunks(x, block) for x in (q, k, v))  # (key heads, value heads, chunks, tokens, size)
    g, beta = (_in_chunks(x[..., None], block) for x in (g, beta))
    sums = g.cumsum(3)
    later = torch.ones(block.chunk, block.chunk, dtype=torch.bool).triu(1)
    decay = (sums - sums.transpose(3, 4)).masked_fill(later, -torch.inf).exp()
    from_begin, to_end = sums.exp(), (sums[:, :, :, -1:] - sums).exp()
    transposed = k.transpose(3, 4)
    corrections, reads_state = torch.linalg.solve_triangular(
        (k @ transposed) * decay * beta,
        torch.cat([v * beta, k * (beta * from_begin)], dim=-1),
        upper=False,
        unitriangular=True,
    ).split([v.shape[-1], k.shape[-1]], dim=-1)
    attention = (q @ transposed) * decay
    by_chunk = zip(
        *(
            x.unbind(2)
            for x in (
                corrections, reads_state, attention, q * from_begin, (k * to_end).transpose(3, 4),
                sums[:, :, :, -1:].exp(),
            )
        ),
        strict=True,
    )  # fmt: skip
    outputs, left = [], []
    for number, chunks in enumerate(block.chunks):
        before = None if states is None else states[number]
        state = None if before is None else before.view(*v.shape[:2], k.shape[-1], v.shape[-1])
        for _ in range(chunks):
            new, of_state, within, query, key, kept = next(by_chunk)
            if state is None:
                outputs.append(within @ new)
                state = key @ new
            else:
                new = new - of_state @ state
                outputs.append(query @ state + within @ new)
                state = state * kept + key @ new
        if states is not None:
            assert state is not None
            left.append(state.flatten(0, 1))
    read = torch.stack(outputs, 2).permute(2, 3, 0, 1, 4).flatten(0, 1)
    return read.index_select(0, block.places), left


def _in_chunks(x: Tensor, block: Block) -> Tensor:
    """(tokens, key heads, value heads, size) -> (key heads, value heads, chunks, tokens, size), filled with zeros."""
    laid = x.new_zeros(block.padded, *x.shape[1:]).index_copy(0, block.places, x)
    return laid.view(-1, block.chunk, *x.shape[1:]).permute(2, 3, 0, 1, 4)
