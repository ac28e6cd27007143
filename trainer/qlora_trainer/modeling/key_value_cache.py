"""What attention keeps of a sequence while it grows token by token: the keys and values of all its tokens."""

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

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has appended."""
        self.length += tokens

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)

    def _reserve(self, like: Tensor) -> Tensor:
        _, heads, _, size = like.shape
        return like.new_empty((1, heads, self.capacity, size))  # the system gives memory as it is written
