"""Virtual tokens: what prompt tuning and prefix tuning train, and what every sample sees before its own tokens.

They stand before each sample of a row by itself, so that packed samples share them and still see nothing of one
another. A sample's own tokens have the positions behind them, as with a cache of so many keys and values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class VirtualTokens:
    """The virtual tokens of a model."""

    count: int
    """How many stand before each sample."""
    enabled: bool = True
    """False: the model is its frozen base."""


@dataclass
class SoftPrompt(VirtualTokens):
    """Virtual tokens that the first layer reads as it reads embeddings."""

    embedding: Callable[[], Tensor] = torch.Tensor
    """Gives (count, hidden size), fp32."""

    def copies(self, number: int, dtype: torch.dtype) -> Tensor:
        """(number, count, hidden size). Their gradients are added up in fp32."""
        return self.embedding().expand(number, -1, -1).to(dtype)


@dataclass
class PrefixTokens(VirtualTokens):
    """Virtual tokens that are keys and values of every layer, as they are after any norm and rotation."""

    layers: int = 0
    key_heads: int = 0
    make: Callable[[], Tensor] = torch.Tensor
    """Gives (count, 2 * layers * key heads * head size), fp32: of each token the key and the value of each layer."""

    def before(self, segments: Sequence[bool]) -> "Prefix":
        """What attention needs, for segments of which some begin a sample."""
        by_layer = self.make().view(self.count, self.layers, 2, self.key_heads, -1).permute(1, 2, 3, 0, 4)
        # Taken apart at once: their gradients are then put together once, and not a whole one made for each layer.
        return Prefix(by_layer.unbind(), segments)


@dataclass(frozen=True)
class Prefix:
    """Keys and values that stand before segments of a row."""

    by_layer: Sequence[Tensor]
    """Of each layer (2, key heads, count, head size) fp32: its keys, and its values."""
    segments: Sequence[bool]
    """Of each segment, whether they stand before it."""

    @property
    def count(self) -> int:
        """Tokens of the prefix."""
        return self.by_layer[0].shape[2]

    def lengths(self, own: Sequence[int]) -> list[int]:
        """Tokens of each segment with its prefix, from its own tokens."""
        return [length + self.count * begins for length, begins in zip(own, self.segments, strict=True)]

    def lay_before(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, own: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The row with prefixes in it, for attention that is causal within segments and knows of no prefix.

        Rows of queries that nobody asked for stand beside the prefix's keys: attention has as many of one as of the
        other, and what comes out there is dropped.

        Args:
            layer: its number.
            query: (1, heads, tokens, head size).
            key: (1, key heads, tokens, head size).
            value: as key.
            own: tokens of each segment.
        """
        _, heads, _, size = query.shape
        asked = query.new_zeros(1, heads, self.count, size)
        # A copy for each segment, in the type that is computed in: so gradients are added up in fp32.
        copies = self.by_layer[layer].unsqueeze(1).expand(-1, sum(self.segments), -1, -1, -1)
        keys, values = (x.unsqueeze(1).unbind() for x in copies.to(key.dtype))
        return (
            self._interleave([asked] * len(keys), query, own),
            self._interleave(keys, key, own),
            self._interleave(values, value, own),
        )

    def _interleave(self, prefixes: Sequence[Tensor], row: Tensor, own: Sequence[int]) -> Tensor:
        rest = iter(prefixes)
        pieces = []
        for piece, begins in zip(torch.split(row, list(own), dim=2), self.segments, strict=True):
            pieces += [next(rest), piece] if begins else [piece]
        return torch.cat(pieces, dim=2)

    def drop(self, output: Tensor, own: Sequence[int]) -> Tensor:
        """(1, tokens with prefixes, heads, head size) -> (1, tokens, heads, head size)."""
        parts = []
        for length, begins in zip(own, self.segments, strict=True):
            parts += [self.count, length] if begins else [length]
        pieces = iter(torch.split(output, parts, dim=1))
        kept = []
        for begins in self.segments:
            if begins:
                next(pieces)
            kept.append(next(pieces))
        return torch.cat(kept, dim=1)
