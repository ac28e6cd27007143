"""8 bits a weight, symmetric, a scale for each row: bitsandbytes' vector-wise int8, without columns of outliers."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qlora_trainer.errors import ModelError
from qlora_trainer.quantization.frozen_weight import check_out

_ROWS = 1 << 18
"""Weights quantized at once."""
_SMALLEST = 1e-36


class Int8Weight:
    """A FrozenWeight of codes * absmax / 127; it is dequantized for each product.

    Right for every shape, and the twin that the kernel library is tested against.
    """

    def __init__(self, codes: Tensor, absmax: Tensor) -> None:
        self.codes = codes
        """int8 (out, in), from -127 to 127."""
        self.absmax = absmax
        """float32 (out,): the largest magnitude of each row."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, in_ = self.codes.shape
        return out, in_

    @property
    def scales(self) -> Tensor:
        """float32 (out,): what a code is multiplied by."""
        return self.absmax.div(127)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return self.codes.nbytes + self.absmax.nbytes

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The matrix (out, in); see `dequantize_int8`."""
        return dequantize_int8(self.codes, self.scales, dtype, out)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, in) -> (rows, out)."""
        return F.linear(x, self.dequantize(x.dtype), bias)

    def linear_grad_input(self, dy: Tensor) -> Tensor:
        """(rows, out) -> (rows, in)."""
        return dy @ self.dequantize(dy.dtype)


def dequantize_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Codes (out, in) * scales (out,) in float32, rounded once to dtype. Raises ValueError where `out` does not fit."""
    if out is not None:
        check_out(out, dtype, (codes.shape[0], codes.shape[1]))
    weight = codes.float().mul_(scales[:, None])
    return weight.to(dtype) if out is None else out.copy_(weight)


def quantize_int8(weight: Tensor, *, name: str) -> Int8Weight:
    """Quantize a matrix (out, in) of any float dtype, some rows at a time: the nearest code, ties to even.

    Raises:
        ModelError: the weight is not a matrix of floats, is empty, or holds a NaN or an infinity.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ModelError(
            f"{name}: a matrix of floats is needed, not {weight.dtype} of shape {list(weight.shape)}"
        )
    codes = torch.empty(weight.shape, dtype=torch.int8)
    absmax = torch.empty(len(weight), dtype=torch.float32)
    step = max(1, _ROWS // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = weight[first : first + step].float()
        largest = rows.abs().amax(dim=1)
        if not largest.isfinite().all():
            raise ModelError(f"{name} holds NaN or infinite numbers")
        # A row of zeros has no scale to divide by; that of one of denormals would be infinite.
        factor = torch.where(largest > _SMALLEST, 127.0 / largest, 0.0)
        codes[first : first + step] = (rows * factor[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        absmax[first : first + step] = largest
    return Int8Weight(codes, absmax)
