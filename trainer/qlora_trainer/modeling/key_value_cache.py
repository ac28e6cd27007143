"""What layers keep of a sequence while it grows token by token.

Attention keeps the keys and values of all its tokens, a recurrent layer the state behind the last of them.
"""

from torch import Tensor


class CachedSequence:
    """Keys and values of one sequence, of each layer, in memory that is reserved once and used as the sequence grows.

    A forward pass over new tokens appends them in every layer; `advance` then counts them.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        """Tokens that it can hold."""
        self.length = 0
        """Tokens that it holds."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._states: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new tokens' keys and values behind the sequence's, and return those of all its tokens, as views.

        Args:
            layer: the layer's number.
            key: (1, key heads, new tokens, head size).
            value: as key.

        Raises:
            ValueError: the sequence would be longer than its capacity.
        """
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"a sequence of {end} tokens does not fit into a cache for {self.capacity}")
        if layer not in self._layers:
            self._layers[layer] = (self._reserve(key), self._reserve(value))
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """All that a layer has of memory: (1, key heads, capacity, head size) of keys, and of values."""
        return self._layers[layer]

    def state(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """What a recurrent layer goes on from; None where the sequence begins."""
        return self._states.get(layer)

    def keep_state(self, layer: int, *state: Tensor) -> None:
        """Replace it by the state behind the new tokens."""
        inputs, heads = state
        self._states[layer] = inputs, heads

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has appended."""
        self.length += tokens

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            ValueError: a recurrent layer has gone past them, and has no earlier state.
        """
        if length < self.length and self._states:
            if length > 0:
                raise ValueError(
                    f"a recurrent layer's state behind {self.length} tokens cannot be cut to {length}"
                )
            self._states.clear()
        self.length = min(self.length, length)

    def _reserve(self, like: Tensor) -> Tensor:
        _, heads, _, size = like.shape
        return like.new_empty((1, heads, self.capacity, size))  # the system gives memory as it is written
