"""Weights of every scheme by the kernel library, on every tier that this machine has, against the reference and an
oracle in float64."""

import os

import pytest
import torch
from torch import Tensor

from kernel_tiers import EVERY_TIER, library_of
from qlora_trainer.quantization.frozen_weight import FrozenWeight, LowRank, UnquantizedWeight
from qlora_trainer.quantization.int8 import quantize_int8
from qlora_trainer.quantization.kernels import compiled
from qlora_trainer.quantization.kernels.compiled import (
    CompiledDenseWeight,
    CompiledInt8Weight,
    CompiledNf4Weight,
    CompiledTensor,
    CompiledWeight,
)
from qlora_trainer.quantization.kernels.reference import Nf4Weight
from qlora_trainer.quantization.nf4 import (
    BLOCK,
    FP4_LEVELS,
    NF4_LEVELS,
    NestedScales,
    Nf4Matrix,
    quantize_nf4,
)

pytestmark = pytest.mark.process

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
DOUBLE = pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
SHAPES = [(1, 64), (31, 192), (96, 128), (257, 64), (576, 576), (70, 2112), (2112, 64)]
"""Rows off the strip of 32 and the tile of 16; sums in one chunk, in several, and in more than one part."""
BY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
FORMS = ["nf4", "int8", "none", "none, other type", "tensor", "tensor, other type"]
"""Other types are kept in bfloat16 and computed with in float32, or the other way round."""
OWN_FORMS = FORMS[:4]
"""Of numbers that are in the library's order."""
BY_FORM = pytest.mark.parametrize("form", FORMS)
FORMS_AND_SHAPES = [
    *(("nf4", shape) for shape in SHAPES),
    *(
        (form, shape)
        for form in FORMS[1:]
        for shape in [(31, 70), (33, 257), (96, 128), (70, 2090), (2090, 33)]
    ),
]
"""Rows of 4 bits begin with a block; those of the others may be of any length."""
BY_FORM_AND_SHAPE = pytest.mark.parametrize(("form", "shape"), FORMS_AND_SHAPES, ids=str)
ROWS = [0, 1, 3, 31, 257]
FACTOR = {torch.float32: 2.0, torch.bfloat16: 1.1}
ROUNDED = {torch.float32: 3e-7, torch.bfloat16: 5e-3}
"""An error that is no worse than roundings: small products hold too few numbers for norms to be compared closer."""
SMALLEST_NORMAL = 2.0**-126


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal values, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nf4_pair(tier: str, weight: Tensor, *, double: bool = True) -> tuple[CompiledNf4Weight, Nf4Weight]:
    """The same weight in NF4, compiled and plain."""
    matrix = quantize_nf4(weight, double=double, name="w")
    return CompiledNf4Weight.of_matrix(matrix, library_of(tier)), Nf4Weight(matrix)


def pair(tier: str, weight: Tensor, form: str, dtype: torch.dtype) -> tuple[CompiledWeight, FrozenWeight]:
    """The same weight in a form, to be computed with in `dtype`, compiled and plain."""
    if form == "nf4":
        return nf4_pair(tier, weight)
    if form == "int8":
        quantized = quantize_int8(weight, name="w")
        return CompiledInt8Weight.of_weight(quantized, library_of(tier)), quantized
    other = next(other for other in FACTOR if other != dtype)
    kept = weight.to(other if form.endswith("other type") else dtype).contiguous()
    if form.startswith("tensor"):
        return CompiledTensor(kept, library_of(tier)), UnquantizedWeight(kept)
    return CompiledDenseWeight.of_tensor(kept, library_of(tier)), UnquantizedWeight(kept)


def bits(tensor: Tensor) -> Tensor:
    """The floats' bits, which tell 0 from -0 and one NaN from another."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def error(actual: Tensor, exact: Tensor) -> float:
    """The relative error, by Frobenius norms."""
    return float((actual.double() - exact).norm() / exact.norm())


@EVERY_TIER
@DTYPES
@DOUBLE
@BY_SHAPE
def test_what_is_multiplied_with_has_the_reference_s_bits(
    tier: str, dtype: torch.dtype, double: bool, shape: tuple[int, int]
) -> None:
    """The product with the identity matrix is the dequantized weight, bit for bit, both ways."""
    ours, reference = nf4_pair(tier, randn(*shape) * 0.02, double=double)
    expected = reference.dequantize(dtype)

    assert torch.equal(bits(expected), bits(ours.linear_grad_input(torch.eye(shape[0], dtype=dtype))))
    assert torch.equal(bits(expected), bits(ours.linear(torch.eye(shape[1], dtype=dtype), None).t()))


@EVERY_TIER
@DTYPES
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("shape", [(1, 1), (31, 70), (96, 128), (257, 33), (70, 2090)], ids=str)
def test_other_forms_are_multiplied_with_as_the_reference_has_them(
    tier: str, dtype: torch.dtype, form: str, shape: tuple[int, int]
) -> None:
    """The same of 8 bits and of what is not quantized, in either type."""
    ours, reference = pair(tier, randn(*shape) * 0.02, form, dtype)
    expected = reference.dequantize(dtype)

    assert torch.equal(bits(expected), bits(ours.linear_grad_input(torch.eye(shape[0], dtype=dtype))))
    assert torch.equal(bits(expected), bits(ours.linear(torch.eye(shape[1], dtype=dtype), None).t()))


@EVERY_TIER
@DTYPES
@DOUBLE
@pytest.mark.parametrize("shape", [(31, 384), (70, 2176)], ids=str)
@pytest.mark.parametrize(("levels", "block"), [(NF4_LEVELS, 128), (FP4_LEVELS, 64), (FP4_LEVELS, 128)])
def test_other_levels_and_blocks_have_the_reference_s_bits(
    tier: str, dtype: torch.dtype, double: bool, shape: tuple[int, int], levels: Tensor, block: int
) -> None:
    """FP4, and blocks of 128, go through the same kernel, both ways, and come back as the quantizer's numbers."""
    matrix = quantize_nf4(randn(*shape) * 0.02, double=double, name="w", block=block, levels=levels)
    ours, expected = (
        CompiledNf4Weight.of_matrix(matrix, library_of(tier)),
        Nf4Weight(matrix).dequantize(dtype),
    )

    # FP4 has a level -0, of which a sum with +0 makes +0.
    assert torch.equal(expected, ours.linear_grad_input(torch.eye(shape[0], dtype=dtype)))
    assert torch.equal(expected, ours.linear(torch.eye(shape[1], dtype=dtype), None).t())
    assert torch.equal(ours.matrix.packed, matrix.packed)
    assert ours.matrix.block == block
    assert ours.matrix.levels is levels


@EVERY_TIER
@DTYPES
def test_every_code_under_scales_of_all_sizes(tier: str, dtype: torch.dtype) -> None:
    """Level times scale is rounded once, whatever the size of the scale."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(1000, BLOCK // 16)
    exponents = torch.rand(1000, generator=torch.Generator().manual_seed(1)) * 60 - 30
    matrix = Nf4Matrix((codes[:, ::2] << 4 | codes[:, 1::2]).view(-1), 10**exponents, (1000, BLOCK))
    ours = CompiledNf4Weight.of_matrix(matrix, library_of(tier))

    actual = ours.linear(torch.eye(BLOCK, dtype=dtype), None).t()

    assert torch.equal(Nf4Weight(matrix).dequantize(dtype), actual)


@EVERY_TIER
@DTYPES
@BY_FORM_AND_SHAPE
@pytest.mark.parametrize("rows", ROWS)
def test_errors_are_no_larger_than_the_reference_s(
    tier: str, dtype: torch.dtype, form: str, shape: tuple[int, int], rows: int
) -> None:
    """Against float64, by norms, times a small factor: sums in another order round otherwise, and torch sums few
    rows in more pieces than many."""
    ours, reference = pair(tier, randn(*shape) * 0.02, form, dtype)
    weight = reference.dequantize(torch.float32).double()
    x, bias, dy = (
        randn(*size, seed=1).to(dtype) for size in ((rows, shape[1]), (shape[0],), (rows, shape[0]))
    )

    y, dx = ours.linear(x, bias), ours.linear_grad_input(dy)

    assert (y.shape, y.dtype, dx.shape, dx.dtype) == ((rows, shape[0]), dtype, (rows, shape[1]), dtype)
    if rows:
        exact = x.double() @ weight.t() + bias.double()
        assert error(y, exact) <= FACTOR[dtype] * error(reference.linear(x, bias), exact)
        exact = dy.double() @ weight
        assert error(dx, exact) <= FACTOR[dtype] * error(reference.linear_grad_input(dy), exact)


RANKS = pytest.mark.parametrize("rank", [1, 3, 16, 40])
"""Off the tile and the strip, on it, and more than one strip."""


def low_rank(shape: tuple[int, int], rank: int) -> LowRank:
    """LoRA's matrices for a weight (out, in), of the size that its own products have."""
    a, b = randn(rank, shape[1], seed=7) / shape[1] ** 0.5, randn(shape[0], rank, seed=8)
    return LowRank(a, b / 4, 1.7)


@EVERY_TIER
@DTYPES
@BY_FORM_AND_SHAPE
@RANKS
def test_errors_with_low_rank_are_no_larger_than_the_reference_s(
    tier: str, dtype: torch.dtype, form: str, shape: tuple[int, int], rank: int
) -> None:
    """Both products and both gradients, against float64; the reference rounds A and B, too."""
    ours, reference = pair(tier, randn(*shape) * 0.02, form, dtype)
    low = low_rank(shape, rank)
    a, b, scale = low.a.to(dtype), low.b.to(dtype), low.scale
    weight = reference.dequantize(torch.float32).double()
    x, dy = randn(70, shape[1], seed=1).to(dtype), randn(70, shape[0], seed=2).to(dtype)

    y, down = ours.linear_with(x, None, low, None)
    dx, up = ours.linear_grad_input_with(dy, low, added=True)
    da = ours.sum_of_outer(x, up, 1.0, transposed=True)
    db = ours.sum_of_outer(dy, down, scale, transposed=False)

    plain_down, plain_up = x @ a.t(), (dy @ b).mul_(scale)
    plain_y = reference.linear(x, None).addmm_(plain_down, b.t(), alpha=scale)
    plain_dx = reference.linear_grad_input(dy).addmm_(plain_up, a)
    exact_down, exact_up = x.double() @ low.a.double().t(), scale * dy.double() @ low.b.double()
    for mine, plain, exact in (
        (down, plain_down, exact_down),
        (up, plain_up, exact_up),
        (y, plain_y, x.double() @ weight.t() + scale * exact_down @ low.b.double().t()),
        (dx, plain_dx, dy.double() @ weight + exact_up @ low.a.double()),
        (da, (up.t() @ x).float(), up.double().t() @ x.double()),
        (db, (dy.t() @ down).float().mul_(scale), scale * dy.double().t() @ down.double()),
    ):
        assert mine.shape == plain.shape
        assert error(mine, exact) <= max(FACTOR[dtype] * error(plain, exact), ROUNDED[dtype])
    assert (down.dtype, up.dtype, da.dtype, db.dtype) == (dtype, dtype, torch.float32, torch.float32)


@EVERY_TIER
@DTYPES
@BY_FORM
@pytest.mark.parametrize("rows", ROWS)
def test_parts_of_a_product_with_low_rank(tier: str, dtype: torch.dtype, form: str, rows: int) -> None:
    """A given inner product is used as it is; one that is not to be added leaves the base's product."""
    shape = (96, 2112)
    ours, _ = pair(tier, randn(*shape) * 0.02, form, dtype)
    low = low_rank(shape, 5)
    x, dy, bias = (randn(*size).to(dtype) for size in ((rows, 2112), (rows, 96), (96,)))
    y, down = ours.linear_with(x, bias, low, None)
    dx, up = ours.linear_grad_input_with(dy, low, added=False)

    given, same = ours.linear_with(x, bias, low, down)
    nothing, _ = ours.linear_with(x, bias, low, torch.zeros_like(down))

    assert torch.equal(down, same)
    assert torch.equal(y, given)
    assert torch.equal(ours.linear(x, bias), nothing)
    assert torch.equal(ours.linear_grad_input(dy), dx)
    assert torch.equal(ours.linear_grad_input_with(dy, low, added=True)[1], up)
    assert torch.equal(ours.grad_inner(dy, low), up)
    if not rows:
        assert not ours.sum_of_outer(x, down, 1.0, transposed=True).any()


@EVERY_TIER
@DTYPES
@BY_FORM
def test_with_low_rank_the_number_of_threads_changes_no_bit(tier: str, dtype: torch.dtype, form: str) -> None:
    """Neither does what lies beside a row."""
    shape = (200, 1088)
    ours, _ = pair(tier, randn(*shape) * 0.02, form, dtype)
    low = low_rank(shape, 16)
    x, dy = randn(600, 1088).to(dtype), randn(600, 200).to(dtype)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        y, down = ours.linear_with(x, None, low, None)
        dx, up = ours.linear_grad_input_with(dy, low, added=True)
        da = ours.sum_of_outer(x, up, 1.0, transposed=True)
        db = ours.sum_of_outer(dy, down, 2.0, transposed=False)
        results.append([y, down, dx, up, da, db])

    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    alone = ours.linear_with(x[37:38], None, low, None)
    assert torch.equal(results[0][0][37:38], alone[0])
    assert torch.equal(results[0][1][37:38], alone[1])


@pytest.mark.parametrize(
    ("a", "b", "inner", "message"),
    [
        (
            torch.zeros(3, 65),
            torch.zeros(32, 3),
            None,
            r"A is torch.float32 \[3, 65\]; it must be .* \[3, 64\]",
        ),
        (torch.zeros(3, 64), torch.zeros(3, 32).t(), None, "B is .* contiguous"),
        (torch.zeros(3, 64).double(), torch.zeros(32, 3), None, "A is torch.float64"),
        (
            torch.zeros(3, 64),
            torch.zeros(32, 3),
            torch.zeros(4, 3),
            r"inner product is .*; it must be .* \[5, 3\]",
        ),
    ],
    ids=["columns", "strided", "float64", "inner"],
)
def test_low_ranks_that_do_not_fit_are_refused(
    a: Tensor, b: Tensor, inner: Tensor | None, message: str
) -> None:
    """Before C reads past their end."""
    ours, _ = nf4_pair("avx2", randn(32, 64))

    with pytest.raises(ValueError, match=message):
        ours.linear_with(torch.zeros(5, 64), None, LowRank(a, b, 1.0), inner)


@EVERY_TIER
@DTYPES
@BY_FORM
def test_a_row_does_not_depend_on_the_rows_beside_it(tier: str, dtype: torch.dtype, form: str) -> None:
    """Alone, among others, or beside a row of NaN, it has the same bits."""
    ours, _ = pair(tier, randn(96, 1088) * 0.02, form, dtype)
    x, dy = randn(700, 1088).to(dtype), randn(700, 96).to(dtype)
    y, dx = ours.linear(x, None), ours.linear_grad_input(dy)

    for start, stop in ((0, 1), (3, 40), (512, 700)):
        assert torch.equal(y[start:stop], ours.linear(x[start:stop], None))
        assert torch.equal(dx[start:stop], ours.linear_grad_input(dy[start:stop]))
    x[7] = dy[7] = torch.nan
    beside = ours.linear(x, None), ours.linear_grad_input(dy)
    others = torch.arange(700) != 7
    assert beside[0][7].isnan().all()
    assert beside[1][7].isnan().all()
    assert torch.equal(y[others], beside[0][others])
    assert torch.equal(dx[others], beside[1][others])


@EVERY_TIER
@DTYPES
@DOUBLE
def test_weights_of_zero_give_zero(tier: str, dtype: torch.dtype, double: bool) -> None:
    """And nothing but the bias."""
    ours, _ = nf4_pair(tier, torch.zeros(70, 128), double=double)
    bias = randn(70).to(dtype)

    assert torch.equal(ours.linear(randn(5, 128).to(dtype), None), torch.zeros(5, 70, dtype=dtype))
    assert torch.equal(ours.linear(randn(5, 128).to(dtype), bias), bias.expand(5, -1))
    assert torch.equal(ours.linear_grad_input(randn(5, 70).to(dtype)), torch.zeros(5, 128, dtype=dtype))


@EVERY_TIER
@DTYPES
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_weights_of_zero_give_zero_in_other_forms(
    tier: str, dtype: torch.dtype, form: str, zero: float
) -> None:
    """Whatever the zeros' sign."""
    ours, _ = pair(tier, torch.full((70, 70), zero), form, dtype)
    bias = randn(70).to(dtype)

    assert not ours.linear(randn(5, 70).to(dtype), None).any()
    assert torch.equal(ours.linear(randn(5, 70).to(dtype), bias), bias.expand(5, -1))
    assert not ours.linear_grad_input(randn(5, 70).to(dtype)).any()


@EVERY_TIER
@DTYPES
@BY_FORM
def test_negative_zeros_count_as_zeros(tier: str, dtype: torch.dtype, form: str) -> None:
    """In x and in the bias."""
    ours, _ = pair(tier, randn(70, 128), form, dtype)
    nothing = torch.full((3, 128), -0.0, dtype=dtype)

    assert not ours.linear(nothing, torch.full((70,), -0.0, dtype=dtype)).any()
    assert not ours.linear_grad_input(nothing[:, :70]).any()


@EVERY_TIER
@DTYPES
@BY_FORM
def test_outliers_keep_the_others_exact(tier: str, dtype: torch.dtype, form: str) -> None:
    """Weights and activations a million times the rest: the error is still the reference's."""
    weight, x = randn(64, 192) * 0.02, randn(33, 192, seed=1)
    weight[5, 100], x[:, 17], x[4, 4] = 2e4, 1e6, -1e30
    ours, reference = pair(tier, weight, form, dtype)
    x = x.to(dtype)
    exact = x.double() @ reference.dequantize(torch.float32).double().t()

    for row, plain, true in zip(ours.linear(x, None), reference.linear(x, None), exact, strict=True):
        assert error(row, true) <= 1.5 * error(plain, true)


@EVERY_TIER
@DTYPES
@BY_FORM
@pytest.mark.parametrize(("of_x", "of_w"), [(1e-39, 1.0), (1.0, 1e-39), (1e-30, 1e-10)], ids=["x", "w", "y"])
def test_denormals_are_themselves_or_zero(
    tier: str, dtype: torch.dtype, form: str, of_x: float, of_w: float
) -> None:
    """What lies below the smallest normal number may be flushed to zero, and is never worse than that."""
    values = randn(40, 128) * of_w
    ours, reference = (
        nf4_pair(tier, values, double=False) if form == "nf4" else pair(tier, values, form, dtype)
    )
    weight = reference.dequantize(torch.float32).double()
    x = (randn(9, 128) * of_x).to(dtype)
    exact = x.double() @ weight.t()
    eps = 2**-8 if dtype == torch.bfloat16 else 2**-20
    flushed = x.double().abs().clamp(max=SMALLEST_NORMAL).sum(1, keepdim=True) * weight.abs().max()
    flushed = flushed + weight.abs().clamp(max=SMALLEST_NORMAL).sum(1) * x.double().abs().max()
    rounded = eps * (x.double().abs() @ weight.t().abs())

    actual = ours.linear(x, None).double()

    assert ((actual - exact).abs() <= flushed + rounded + 300 * SMALLEST_NORMAL).all()


@EVERY_TIER
@DTYPES
@BY_FORM
def test_inputs_of_any_layout(tier: str, dtype: torch.dtype, form: str) -> None:
    """Transposed, strided, expanded or at an odd offset: as if contiguous, and left as they are."""
    ours, _ = pair(tier, randn(96, 128), form, dtype)
    base = randn(40, 300).to(dtype)
    for x in (base[:, :128], base.t()[:128, :].t(), base[:, 1:257:2], base[:1, 3:131].expand(4, -1)):
        before = x.clone()
        assert torch.equal(ours.linear(x, None), ours.linear(before, None))
        assert torch.equal(x, before)
    bias = randn(192).to(dtype)[::2]
    assert torch.equal(ours.linear(base[:, :128], bias), ours.linear(base[:, :128], bias.clone()))


@EVERY_TIER
@DTYPES
@BY_FORM_AND_SHAPE
def test_nothing_is_written_beyond_the_result(
    tier: str, dtype: torch.dtype, form: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every element of the result is written, and none behind or before it."""
    ours, _ = pair(tier, randn(*shape), form, dtype)
    x, dy = randn(33, shape[1]).to(dtype), randn(33, shape[0]).to(dtype)
    expected = ours.linear(x, None), ours.linear_grad_input(dy)
    guards = []

    def guarded(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        memory = torch.full((rows * columns + 128,), 7.0, dtype=dtype)
        guards.append(memory)
        return memory[64:-64].view(rows, columns)

    monkeypatch.setattr(compiled.torch, "empty", guarded)
    actual = ours.linear(x, None), ours.linear_grad_input(dy)
    monkeypatch.undo()

    assert len(guards) == 2
    assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))
    assert all((memory[:64] == 7).all() and (memory[-64:] == 7).all() for memory in guards)


@EVERY_TIER
@DTYPES
@BY_FORM
def test_the_number_of_threads_changes_no_bit(tier: str, dtype: torch.dtype, form: str) -> None:
    """Threads share columns, never a sum."""
    ours, _ = pair(tier, randn(200, 1088), form, dtype)
    x, dy = randn(600, 1088).to(dtype), randn(600, 200).to(dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append((ours.linear(x, None), ours.linear_grad_input(dy)))

    for y, dx in results[1:]:
        assert torch.equal(results[0][0], y)
        assert torch.equal(results[0][1], dx)


@EVERY_TIER
@BY_FORM
def test_a_forked_child_computes_the_same(tier: str, form: str) -> None:
    """With threads of its own, which the parent's fork did not copy."""
    ours, _ = pair(tier, randn(200, 128), form, torch.float32)
    x = randn(60, 128)
    torch.set_num_threads(3)
    expected = ours.linear(x, None)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(expected, ours.linear(x, None)) else 1)

    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(expected, ours.linear(x, None))


@EVERY_TIER
@BY_FORM
def test_a_call_leaves_the_thread_s_rounding_as_it_was(tier: str, form: str) -> None:
    """Denormals are zeros within the kernel only."""
    ours, _ = pair(tier, randn(64, 64), form, torch.float32)
    ours.linear(randn(3, 64), None)

    assert float(torch.tensor([1e-40]) * 0.5) > 0


@DOUBLE
@BY_SHAPE
def test_the_quantizer_s_numbers_come_back(double: bool, shape: tuple[int, int]) -> None:
    """The library's order loses nothing, and takes no more memory than filling the rows up to 32."""
    matrix = quantize_nf4(randn(*shape), double=double, name="w")
    weight = CompiledNf4Weight.of_matrix(matrix, library_of("avx2"))
    back = weight.matrix

    assert weight.shape == shape
    assert torch.equal(back.packed, matrix.packed)
    if isinstance(matrix.scales, NestedScales):
        assert isinstance(back.scales, NestedScales)
        assert torch.equal(back.scales.codes, matrix.scales.codes)
    else:
        assert isinstance(back.scales, Tensor)
        assert torch.equal(back.scales, matrix.scales)
    filled = -shape[0] % 32 * shape[1]
    assert weight.nbytes == matrix.nbytes + filled // 2 + filled // BLOCK * (1 if double else 4)


@pytest.mark.parametrize("form", OWN_FORMS[1:])
@pytest.mark.parametrize("shape", [(96, 128), (31, 70)], ids=str)
def test_other_forms_take_no_more_than_what_fills_them_up(form: str, shape: tuple[int, int]) -> None:
    """Rows and columns to 32: for models' sizes the bytes are the scheme's, and memory of their own."""
    weight = randn(*shape)
    ours, reference = pair("avx2", weight, form, torch.float32)
    filled = (shape[0] + -shape[0] % 32) * (shape[1] + -shape[1] % 32)
    of_number = {"int8": 1, "none": 4, "none, other type": 2}[form]
    of_row = 4 if form == "int8" else 0
    expected = reference.dequantize(torch.float32).clone()

    assert ours.shape == shape
    assert ours.nbytes == filled * of_number + (shape[0] + -shape[0] % 32) * of_row
    weight.fill_(7.0)
    assert torch.equal(expected, ours.dequantize(torch.float32))


@DTYPES
@pytest.mark.parametrize("form", ["nf4, fp32 scales", *OWN_FORMS])
def test_dequantizing_is_the_reference_s(dtype: torch.dtype, form: str) -> None:
    """The same bits, into new memory or into what is given; what does not fit is refused."""
    weight = randn(70, 192)
    ours, reference = (
        pair("avx2", weight, form, dtype) if form in FORMS else nf4_pair("avx2", weight, double=False)
    )
    out = torch.empty(70, 192, dtype=dtype)

    assert ours.dequantize(dtype, out) is out
    assert torch.equal(bits(reference.dequantize(dtype)), bits(out))
    assert torch.equal(bits(out), bits(ours.dequantize(dtype)))
    with pytest.raises(ValueError, match="it must be"):
        ours.dequantize(dtype, out.t())


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(3, 65), None, r"the input is torch.float32 \[3, 65\]; it must be .* \(rows, 64\)"),
        (torch.zeros(64), None, r"\[64\]; it must be"),
        (torch.zeros(3, 64, dtype=torch.float64), None, "the input is torch.float64"),
        (
            torch.zeros(3, 64),
            torch.zeros(31),
            r"the bias is torch.float32 \[31\]; it must be torch.float32 \[32\]",
        ),
        (torch.zeros(3, 64), torch.zeros(32).bfloat16(), r"the bias is torch.bfloat16 \[32\]"),
    ],
    ids=["columns", "vector", "float64", "bias", "bias-dtype"],
)
@BY_FORM
def test_what_does_not_fit_is_refused(x: Tensor, bias: Tensor | None, message: str, form: str) -> None:
    """Before C reads past its end."""
    ours, _ = pair("avx2", randn(32, 64), form, torch.float32)

    with pytest.raises(ValueError, match=message):
        ours.linear(x, bias)


def test_a_tensor_is_multiplied_with_where_it_lies() -> None:
    """What changes in it changes the product: nothing is copied. What is not contiguous is refused."""
    tensor = randn(33, 70)
    weight = CompiledTensor(tensor, library_of("avx2"))
    tensor.zero_()

    assert not weight.linear(randn(3, 70), None).any()
    with pytest.raises(ValueError, match="contiguous"):
        CompiledTensor(randn(70, 33).t(), library_of("avx2"))
