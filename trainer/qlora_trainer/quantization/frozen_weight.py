"""A weight that is never trained, as the layers above see it: something to multiply with.

They never ask for the matrix. An implementation may dequantize it for every product, or multiply with packed tiles
and never make it; it may keep its numbers in whatever form its arithmetic likes best.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class FrozenWeight(Protocol):
    """The weight W (out, in) of a linear layer."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def nbytes(self) -> int:
        """Bytes that the stored numbers take, scales included."""

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """W (out, in), every number rounded once to `dtype`.

        Args:
            dtype: a float dtype.
            out: where to write it: contiguous, (out, in), of that dtype.

        Raises:
            ValueError: `out` does not fit.
        """

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias.

        Args:
            x: (rows, in), in the compute dtype; rows may be 0.
            bias: (out,), of the same dtype.

        Returns:
            (rows, out), of the same dtype: memory of its own, which the caller may write to.
        """

    def linear_grad_input(self, dy: Tensor) -> Tensor:
        """dy W: the gradient of `linear` with respect to x.

        Args:
            dy: (rows, out), in the compute dtype.

        Returns:
            (rows, in), of the same dtype: memory of its own, which the caller may write to.
        """


@dataclass(frozen=True)
class LowRank:
    """A product beside a frozen weight's: s (x A^T) B^T. The backward pass has (s dy B) A."""

    a: Tensor
    """A: (rank, in), fp32."""
    b: Tensor
    """B: (out, rank), fp32."""
    scale: float
    """s."""


class FusesLowRank(FrozenWeight, Protocol):
    """A frozen weight that makes a product of low rank in the same pass as its own.

    The inner product, what is in brackets in LowRank's formulas, is returned, since gradients are made of it:
    (rows, rank), in the compute dtype.
    """

    def linear_with(
        self, x: Tensor, bias: Tensor | None, low_rank: LowRank, inner: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`linear` with the low rank's product added.

        Args:
            x: as of `linear`.
            bias: as of `linear`.
            low_rank: what is added.
            inner: x A^T, where it is made of another x; it is returned then.
        """

    def linear_grad_input_with(self, dy: Tensor, low_rank: LowRank, *, added: bool) -> tuple[Tensor, Tensor]:
        """`linear_grad_input`, with the low rank's product added if `added`."""

    def grad_inner(self, dy: Tensor, low_rank: LowRank) -> Tensor:
        """s dy B, with the bits that linear_grad_input_with has of it."""

    def sum_of_outer(self, x: Tensor, u: Tensor, factor: float, *, transposed: bool) -> Tensor:
        """factor x^T u, or its transpose, in fp32: what the gradients of A and B are.

        Args:
            x: (rows, columns), in the compute dtype.
            u: (rows, rank), of the same dtype.
            factor: what the sum over rows is multiplied by.
            transposed: whether the result is (rank, columns), else (columns, rank).
        """


class UnquantizedWeight:
    """A weight as it is: in the compute dtype, or as a file has it, mapped; then it is converted for each product."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, in_ = self.tensor.shape
        return out, in_

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.nbytes

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The tensor in `dtype`: itself, if it has that dtype and `out` is None."""
        if out is None:
            return self.tensor.to(dtype)
        check_out(out, dtype, self.shape)
        return out.copy_(self.tensor)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, in) -> (rows, out)."""
        return F.linear(x, self.tensor.to(x.dtype), bias)

    def linear_grad_input(self, dy: Tensor) -> Tensor:
        """(rows, out) -> (rows, in)."""
        return dy @ self.tensor.to(dy.dtype)


class UnreadWeight:
    """A weight that stays in its file, quantized there in some form, and is dequantized for each product."""

    def __init__(self, read: Callable[[], Tensor], shape: tuple[int, int], nbytes: int) -> None:
        self.read = read
        self.shape = shape
        self.nbytes = nbytes

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """What `read` makes, in `dtype`."""
        if out is None:
            return self.read().to(dtype)
        check_out(out, dtype, self.shape)
        return out.copy_(self.read())

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, in) -> (rows, out)."""
        return F.linear(x, self.dequantize(x.dtype), bias)

    def linear_grad_input(self, dy: Tensor) -> Tensor:
        """(rows, out) -> (rows, in)."""
        return dy @ self.dequantize(dy.dtype)


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a tensor of a weight is contiguous, and of the dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: {tensor.dtype} {list(tensor.shape)} where {dtype} {list(shape)}, contiguous, belongs"
        )


def check_out(out: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Raises ValueError unless `out` is a contiguous matrix of the dtype and shape, at an even offset in its storage.

    At an odd offset, pairs of numbers could not be written as one.
    """
    if out.shape != shape or out.dtype != dtype or not out.is_contiguous() or out.storage_offset() % 2:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, strides {out.stride()}, offset {out.storage_offset()}; "
            f"it must be {dtype} {list(shape)}, contiguous, at an even offset in its storage"
        )
