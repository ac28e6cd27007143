"""Weights of every scheme by the kernel library: they are multiplied with in strips, and never whole in memory.

Numbers are put into the order that the library multiplies in, once, when a model is loaded; nothing is added to them
but what fills rows and columns up to a multiple of 32. One order serves x W^T and dy W. A scheme is that order, and in
the library what makes a strip of it; all else is common.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qlora_trainer.kernels.library import Library
from qlora_trainer.quantization.frozen_weight import LowRank, check_out, check_tensor
from qlora_trainer.quantization.int8 import Int8Weight, dequantize_int8
from qlora_trainer.quantization.kernels import reference
from qlora_trainer.quantization.nf4 import DYNAMIC_LEVELS, NESTED_BLOCK, NestedScales, Nf4Matrix

_STRIP = 32
"""Rows, and columns, are filled up to a multiple of this."""
_TILE = 16
"""Rows, and pairs of columns, of a block of codes."""


class _LowRank(ctypes.Structure):
    """LowRank of tier.hpp."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("rank", ctypes.c_int64),
        ("inner", ctypes.c_void_p),
        ("inner_given", ctypes.c_bool),
        ("added", ctypes.c_bool),
    )


class _Nf4Matrix(ctypes.Structure):
    """Nf4Matrix of tier.hpp."""

    form = 0
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("scale_codes", ctypes.c_void_p),
        ("scale_levels", ctypes.c_void_p),
        ("scale_absmax", ctypes.c_void_p),
        ("scale_offset", ctypes.c_float),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("block", ctypes.c_int64),
    )


class _Int8Matrix(ctypes.Structure):
    """Int8Matrix of tier.hpp."""

    form = 1
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
    )


class _DenseMatrix(ctypes.Structure):
    """DenseMatrix of tier.hpp."""

    form = 2
    _fields_ = (
        ("numbers", ctypes.c_void_p),
        ("is_bf16", ctypes.c_bool),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
    )


class _RowMajorMatrix(ctypes.Structure):
    """RowMajorMatrix of tier.hpp."""

    form = 3
    _fields_ = _DenseMatrix._fields_


_Matrix = _Nf4Matrix | _Int8Matrix | _DenseMatrix | _RowMajorMatrix


@functools.cache
def _linear(library: Library) -> Callable[..., None]:
    pointer, whole = ctypes.c_void_p, ctypes.c_int
    return library.function(
        "linear", whole, pointer, ctypes.POINTER(_LowRank), whole, whole, ctypes.c_int64, pointer, pointer, pointer,
    )  # fmt: skip


@functools.cache
def _sum_of_outer(library: Library) -> Callable[..., None]:
    pointer, whole, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    return library.function(
        "sum_of_outer", whole, size, size, size, pointer, pointer, ctypes.c_float, whole, pointer
    )


DENSE_TYPES = (torch.float32, torch.bfloat16)
"""Of tensors that the library multiplies with as they are."""


def fits(matrix: Nf4Matrix) -> bool:
    """Whether the library multiplies with a matrix: each row must begin with a block of its own."""
    return matrix.shape[1] % matrix.block == 0


class CompiledWeight:
    """What weights of the kernel library have in common: products, with those of low rank in the same pass.

    Args:
        matrix: as C takes it; a subclass keeps the memory that it names.
        library: that multiplies.
    """

    def __init__(self, matrix: _Matrix, library: Library) -> None:
        self._matrix = matrix
        self._shape = (matrix.n, matrix.k)
        self._call = _linear(library)
        self._sum_of_outer = _sum_of_outer(library)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._shape

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, in) -> (rows, out), in float32 or bfloat16."""
        return self._product(x, bias, transposed=False)

    def linear_grad_input(self, dy: Tensor) -> Tensor:
        """(rows, out) -> (rows, in), in float32 or bfloat16."""
        return self._product(dy, None, transposed=True)

    def linear_with(
        self, x: Tensor, bias: Tensor | None, low_rank: LowRank, inner: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See FusesLowRank."""
        rank = low_rank.a.shape[0]
        given = inner is not None
        inner = x.new_empty(x.shape[0], rank) if inner is None else inner.contiguous()
        if inner.shape != (x.shape[0], rank) or inner.dtype != x.dtype:
            raise ValueError(
                f"the inner product is {inner.dtype} {list(inner.shape)}; it must be {x.dtype} [{x.shape[0]}, {rank}]"
            )
        beside = self._low_rank(low_rank, inner, given=given, added=True)
        return self._product(x, bias, transposed=False, low_rank=beside), inner

    def linear_grad_input_with(self, dy: Tensor, low_rank: LowRank, *, added: bool) -> tuple[Tensor, Tensor]:
        """See FusesLowRank."""
        inner = dy.new_empty(dy.shape[0], low_rank.a.shape[0])
        beside = self._low_rank(low_rank, inner, given=False, added=added)
        return self._product(dy, None, transposed=True, low_rank=beside), inner

    def grad_inner(self, dy: Tensor, low_rank: LowRank) -> Tensor:
        """See FusesLowRank."""
        inner = dy.new_empty(dy.shape[0], low_rank.a.shape[0])
        beside = self._low_rank(low_rank, inner, given=False, added=False)
        self._run(dy, None, None, transposed=True, low_rank=beside)
        return inner

    def sum_of_outer(self, x: Tensor, u: Tensor, factor: float, *, transposed: bool) -> Tensor:
        """See FusesLowRank."""
        if x.dim() != 2 or u.dim() != 2 or x.shape[0] != u.shape[0] or x.dtype != u.dtype:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}, u is {u.dtype} {list(u.shape)}; "
                "they must have one dtype and equal rows"
            )
        x, u = x.contiguous(), u.contiguous()
        (rows, columns), rank = x.shape, u.shape[1]
        y = torch.empty((rank, columns) if transposed else (columns, rank), dtype=torch.float32)
        self._sum_of_outer(
            torch.get_num_threads(), x.dtype == torch.bfloat16, rows, columns, rank, x.data_ptr(), u.data_ptr(), factor,
            transposed, y.data_ptr(),
        )  # fmt: skip
        return y

    def _low_rank(self, low_rank: LowRank, inner: Tensor, *, given: bool, added: bool) -> _LowRank:
        """As C takes it: its memory must outlive the call."""
        out, in_ = self._shape
        a, b, rank = low_rank.a, low_rank.b, low_rank.a.shape[0]
        # What C cannot check: it would read or write past the end.
        for name, tensor, shape in (("A", a, (rank, in_)), ("B", b, (out, rank))):
            if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be torch.float32 {list(shape)}, contiguous"
                )
        return _LowRank(a.data_ptr(), b.data_ptr(), low_rank.scale, rank, inner.data_ptr(), given, added)

    def _product(
        self, x: Tensor, bias: Tensor | None, *, transposed: bool, low_rank: _LowRank | None = None
    ) -> Tensor:
        """(rows, depth) -> (rows, columns); memory of its own."""
        y = torch.empty(x.shape[0], self._shape[1 if transposed else 0], dtype=x.dtype)
        self._run(x, bias, y, transposed=transposed, low_rank=low_rank)
        return y

    def _run(
        self, x: Tensor, bias: Tensor | None, y: Tensor | None, *, transposed: bool, low_rank: _LowRank | None
    ) -> None:
        """Call the library: see LinearCall of tier.hpp."""
        depth, columns = self._shape if transposed else self._shape[::-1]
        # What C cannot check: it would read past the end.
        if x.dim() != 2 or x.shape[1] != depth or x.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"the input is {x.dtype} {list(x.shape)}; it must be float32 or bfloat16 (rows, {depth})"
            )
        if bias is not None and (bias.shape != (columns,) or bias.dtype != x.dtype):
            raise ValueError(f"the bias is {bias.dtype} {list(bias.shape)}; it must be {x.dtype} [{columns}]")
        x = x.contiguous()
        bias = None if bias is None else bias.contiguous()
        self._call(
            torch.get_num_threads(),
            self._matrix.form,
            ctypes.byref(self._matrix),
            None if low_rank is None else ctypes.byref(low_rank),
            transposed,
            x.dtype == torch.bfloat16,
            x.shape[0],
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if y is None else y.data_ptr(),
        )


class CompiledNf4Weight(CompiledWeight):
    """A FrozenWeight in 4 bits, of numbers that are in the library's order."""

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor | NestedScales,
        shape: tuple[int, int],
        block: int,
        levels: Tensor,
        library: Library,
    ) -> None:
        """Take codes and scales over. Raises ValueError where they do not fit the shape: C would read past them."""
        rows, columns = shape
        filled = rows + -rows % _STRIP
        of_rows = (columns // block, filled)
        check_tensor("codes", codes, torch.uint8, (columns // 32, filled // _TILE, _TILE, _TILE))
        if isinstance(scales, NestedScales):
            check_tensor("codes of scales", scales.codes, torch.uint8, of_rows)
            blocks = -(-rows * (columns // block) // NESTED_BLOCK)
            check_tensor("scales of scales", scales.absmax, torch.float32, (blocks,))
            check_tensor("offset", scales.offset, torch.float32, ())
        else:
            check_tensor("scales", scales, torch.float32, of_rows)
        self.block, self.levels = block, levels
        self.codes = codes
        """uint8 (in / 32, out / 16, 16, 16): of 32 columns and 16 rows, 16 pairs of codes of each row."""
        self.scales = scales
        """(in / block, out filled up), or their codes, and what is in NestedScales besides."""
        super().__init__(self._struct(rows, columns), library)

    @classmethod
    def of_matrix(cls, matrix: Nf4Matrix, library: Library) -> Self:
        """The weight of a matrix whose shape fits; takes the matrix over."""
        assert fits(matrix), matrix.shape
        rows = matrix.shape[0]
        if isinstance(matrix.scales, NestedScales):
            nested = matrix.scales
            scales: Tensor | NestedScales = NestedScales(
                _scales_to_columns(nested.codes, rows), nested.absmax, nested.offset
            )
        else:
            scales = _scales_to_columns(matrix.scales, rows)
        return cls(_codes_to_blocks(matrix), scales, matrix.shape, matrix.block, matrix.levels, library)

    def _struct(self, rows: int, columns: int) -> _Nf4Matrix:
        nested = self.scales if isinstance(self.scales, NestedScales) else None
        return _Nf4Matrix(
            codes=self.codes.data_ptr(),
            levels=self.levels.data_ptr(),
            scales=self.scales.data_ptr() if isinstance(self.scales, Tensor) else None,
            scale_codes=nested.codes.data_ptr() if nested else None,
            scale_levels=DYNAMIC_LEVELS.data_ptr(),
            scale_absmax=nested.absmax.data_ptr() if nested else None,
            scale_offset=float(nested.offset) if nested else 0.0,
            n=rows,
            k=columns,
            block=self.block,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def matrix(self) -> Nf4Matrix:
        """The quantizer's numbers, put back into its order."""
        rows, columns = self._shape
        packed = self.codes.permute(1, 3, 0, 2).reshape(-1, columns // 2)[:rows].reshape(-1)
        if isinstance(self.scales, NestedScales):
            codes = self.scales.codes.t()[:rows].reshape(-1)
            scales: Tensor | NestedScales = NestedScales(codes, self.scales.absmax, self.scales.offset)
        else:
            scales = self.scales.t()[:rows].reshape(-1)
        return Nf4Matrix(packed, scales, self._shape, self.block, self.levels)

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The matrix (out, in), by the reference."""
        return reference.dequantize(self.matrix, dtype, out)


class CompiledInt8Weight(CompiledWeight):
    """A FrozenWeight in 8 bits, of numbers that are in the library's order."""

    def __init__(self, codes: Tensor, scales: Tensor, shape: tuple[int, int], library: Library) -> None:
        """Take codes and scales over. Raises ValueError where they do not fit the shape: C would read past them."""
        rows, columns = (size + -size % _STRIP for size in shape)
        check_tensor("codes", codes, torch.int8, (rows // _STRIP, columns, _STRIP))
        check_tensor("scales", scales, torch.float32, (rows,))
        self.codes = codes
        """int8 (out / 32, in, 32), out and in filled up."""
        self.scales = scales
        """float32 (out,), filled up."""
        super().__init__(_Int8Matrix(codes.data_ptr(), scales.data_ptr(), *shape), library)

    @classmethod
    def of_weight(cls, weight: Int8Weight, library: Library) -> Self:
        """The weight of codes and scales in the quantizer's order."""
        scales = F.pad(weight.scales, (0, -weight.shape[0] % _STRIP))
        return cls(_to_strips(weight.codes), scales, weight.shape, library)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The matrix (out, in), with the reference's bits."""
        codes = _from_strips(self.codes, *self._shape)
        return dequantize_int8(codes, self.scales[: self._shape[0]], dtype, out)


class CompiledDenseWeight(CompiledWeight):
    """A FrozenWeight that is not quantized, in float32 or bfloat16, of numbers that are in the library's order."""

    def __init__(self, numbers: Tensor, shape: tuple[int, int], library: Library) -> None:
        """Take the numbers over. Raises ValueError where they do not fit the shape: C would read past them."""
        rows, columns = (size + -size % _STRIP for size in shape)
        pair = 2 if numbers.dtype == torch.bfloat16 else 1
        dtype = numbers.dtype if numbers.dtype in DENSE_TYPES else torch.float32
        check_tensor("numbers", numbers, dtype, (rows // _STRIP, columns // pair, _STRIP * pair))
        self.numbers = numbers
        """float32 (out / 32, in, 32), or pairs of bfloat16 (out / 32, in / 2, 64), out and in filled up."""
        super().__init__(_DenseMatrix(numbers.data_ptr(), pair == 2, *shape), library)

    @classmethod
    def of_tensor(cls, tensor: Tensor, library: Library) -> Self:
        """The weight of a copy of a tensor (out, in) of one of DENSE_TYPES."""
        rows, columns = tensor.shape
        return cls(_to_strips(tensor), (rows, columns), library)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return self.numbers.nbytes

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The matrix (out, in) in `dtype`."""
        matrix = _from_strips(self.numbers, *self._shape)
        if out is None:
            return matrix.to(dtype)
        check_out(out, dtype, self._shape)
        return out.copy_(matrix)


class CompiledTensor(CompiledWeight):
    """A matrix (out, in) as a tensor has it, float32 or bfloat16, contiguous: others read it, too, so it is not copied.

    To put its rows into strips is a part of every product: a few percent at some hundred rows.
    """

    def __init__(self, tensor: Tensor, library: Library) -> None:
        dtype = tensor.dtype if tensor.dtype in DENSE_TYPES else torch.float32
        check_tensor("numbers", tensor, dtype, tuple(tensor.shape))
        self._tensor = tensor
        super().__init__(
            _RowMajorMatrix(tensor.data_ptr(), tensor.dtype == torch.bfloat16, *tensor.shape), library
        )


def _to_strips(matrix: Tensor) -> Tensor:
    """(rows, columns), filled up -> (rows / 32, columns, 32), or of bfloat16 (rows / 32, columns / 2, 64): in pairs."""
    rows, columns = matrix.shape
    if rows % _STRIP or columns % _STRIP:
        matrix = F.pad(matrix, (0, -columns % _STRIP, 0, -rows % _STRIP))
    matrix = matrix.contiguous()
    units = matrix.view(torch.int32) if matrix.dtype == torch.bfloat16 else matrix
    strips = units.view(-1, _STRIP, units.shape[1]).transpose(1, 2)
    # Always a copy: the tensor may be mapped from a file.
    return strips.clone(memory_format=torch.contiguous_format).view(matrix.dtype)


def _from_strips(strips: Tensor, rows: int, columns: int) -> Tensor:
    """What _to_strips was given: new memory."""
    units = strips.view(torch.int32) if strips.dtype == torch.bfloat16 else strips
    whole = units.transpose(1, 2).reshape(-1, units.shape[1]).contiguous().view(strips.dtype)
    return whole[:rows, :columns].contiguous()


def _codes_to_blocks(matrix: Nf4Matrix) -> Tensor:
    """Bytes row after row (out * in / 2,) -> (in / 32, out / 16, 16 pairs of columns, 16 rows)."""
    shape = matrix.shape
    rows = matrix.packed.view(shape[0], -1)
    zero = int(matrix.levels.abs().argmin())  # code of the level 0
    filled = F.pad(rows, (0, 0, 0, -shape[0] % _STRIP), value=zero << 4 | zero)
    return filled.view(-1, _TILE, shape[1] // 32, _TILE).permute(2, 0, 3, 1).contiguous()


def _scales_to_columns(scales: Tensor, rows: int) -> Tensor:
    """Scales, or their codes, row after row (out * in / block,) -> (in / block, out filled up)."""
    of_rows = scales.view(rows, -1)
    return F.pad(of_rows, (0, 0, 0, -rows % _STRIP)).t().contiguous()
