"""The quantizer against bitsandbytes, byte for byte: the reference, and every tier of the kernel library."""

from collections.abc import Iterator
from unittest.mock import patch

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_tiers import PASS_TIERS, running
from qlora_trainer.errors import ModelError
from qlora_trainer.quantization import nf4
from qlora_trainer.quantization.nf4 import (
    BLOCK,
    DYNAMIC_LEVELS,
    FP4_LEVELS,
    NF4_LEVELS,
    NestedScales,
    Nf4Matrix,
    quantize_nf4,
)

pytestmark = pytest.mark.process

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=PASS_TIERS, scope="module", autouse=True)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with the reference and with each tier."""
    with running(request.param):
        yield request.param


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal values, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_value(weight: Tensor, row: int, column: int, value: float) -> Tensor:
    """The same weight with one value changed."""
    weight[row, column] = value
    return weight


def tensors_of(matrix: Nf4Matrix) -> dict[str, Tensor]:
    """The tensors that a matrix is stored in, by name."""
    scales = {"scales": matrix.scales} if isinstance(matrix.scales, Tensor) else vars(matrix.scales)
    return {"packed": matrix.packed, **scales}


def assert_same(expected: Nf4Matrix, actual: Nf4Matrix) -> None:
    """Every tensor of the two is equal, and of equal dtype."""
    a, b = tensors_of(expected), tensors_of(actual)

    assert expected.shape == actual.shape
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def by_bitsandbytes(weight: Tensor, *, double: bool, kind: str = "nf4", block: int = BLOCK) -> Nf4Matrix:
    """What bitsandbytes makes of the weight."""
    packed, state = bnb.quantize_4bit(weight, quant_type=kind, blocksize=block, compress_statistics=double)
    scales = NestedScales(state.absmax, state.state2.absmax, state.offset) if double else state.absmax
    return Nf4Matrix(packed.view(-1), scales, (weight.shape[0], weight.shape[1]))


CASES = {
    "normal": randn(96, 576),
    "small normal": randn(96, 576) * 0.02,
    "zeros": torch.zeros(64, 128),
    "negative zeros": torch.full((8, 64), -0.0),
    "zeros of both signs": torch.tensor([0.0, -0.0]).repeat(64, 32),
    "a constant": torch.full((64, 128), 0.3),
    "a negative constant": torch.full((64, 128), -7.0),
    "one outlier": with_value(randn(64, 128), 3, 70, 1000.0),
    "one weight in zeros": with_value(torch.zeros(64, 128), 3, 70, -0.5),
    "denormals": randn(64, 128) * 1e-40,
    "smaller than the smallest divisor": randn(64, 128) * 2e-38,
    "largest floats": randn(64, 128).sign() * 3.4e38,
    "rows straddle blocks": randn(33, 100),
    "odd tail": randn(7, 31),
    "even tail": randn(7, 30),
    "tail of zeros": torch.cat([randn(1, 64), torch.zeros(1, 9)], dim=1),
    "less than a block": randn(3, 5),
    "one weight": torch.tensor([[-0.25]]),
    "more than one nested block": randn(257, 64),
    "every magnitude": randn(64, 128) * torch.logspace(-44, 38, 64)[:, None],
    "several chunks and a tail": randn(401, 331),
}


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_bitsandbytes(case: str, dtype: torch.dtype, double: bool) -> None:
    """Bytes and scales equal those of bitsandbytes on a CPU with one thread."""
    largest = torch.finfo(dtype).max
    weight = CASES[case].clamp(-largest, largest).to(dtype)

    assert_same(by_bitsandbytes(weight, double=double), quantize_nf4(weight, double=double, name="w"))


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize(("kind", "block"), [("nf4", 128), ("fp4", 64), ("fp4", 128)])
@pytest.mark.parametrize("case", CASES)
def test_other_levels_and_blocks_equal_bitsandbytes(case: str, kind: str, block: int, double: bool) -> None:
    """FP4, and blocks of 128, have bitsandbytes' bytes and scales, too."""
    weight, levels = CASES[case], {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}[kind]
    found = quantize_nf4(weight, double=double, name="w", block=block, levels=levels)

    assert torch.equal(levels, bnb.get_4bit_type(kind, device="cpu"))
    assert_same(by_bitsandbytes(weight, double=double, kind=kind, block=block), found)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    magnitude=st.floats(-40, 30),
    dtype=st.sampled_from(FLOATS),
    double=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_equals_bitsandbytes_for_any_shape(
    rows: int, columns: int, seed: int, magnitude: float, dtype: torch.dtype, double: bool
) -> None:
    """Whatever the shape and the magnitude, bytes and scales equal those of bitsandbytes."""
    weight = (randn(rows, columns, seed=seed) * 10**magnitude).to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)

    assert_same(by_bitsandbytes(weight, double=double), quantize_nf4(weight, double=double, name="w"))


@pytest.mark.parametrize("columns", [64, 63], ids=["full blocks", "tails"])
def test_thresholds_are_decided_as_bitsandbytes_does(columns: int) -> None:
    """Weights a few bits from a threshold between two levels get bitsandbytes' level, under any scale."""
    thresholds = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2
    scales = randn(200, 1).exp()
    near = ((thresholds * scales).view(torch.int32)[:, :, None] + torch.tensor([-1, 0, 1, 2])).int()
    rows = torch.cat([scales, near.view(200, -1).view(torch.float32), torch.zeros(200, 3)], dim=1)[
        :, :columns
    ]

    for weight in [rows] if columns == BLOCK else rows.split(1):
        assert_same(by_bitsandbytes(weight, double=False), quantize_nf4(weight, double=False, name="w"))


def test_level_tables_are_those_of_bitsandbytes() -> None:
    """The two tables of levels are bitsandbytes' own."""
    assert torch.equal(bnb.get_4bit_type("nf4", device="cpu"), NF4_LEVELS)
    assert torch.equal(bnb.create_dynamic_map(), DYNAMIC_LEVELS)


@pytest.mark.parametrize(("seed", "threads"), [(2, 2), (3, 3), (4, 7)])
def test_thread_count_changes_nothing(seed: int, threads: int) -> None:
    """Neither bytes nor the mean of the scales depend on the number of threads, as torch's own mean does."""
    weight = randn(2003, 1201, seed=seed)
    expected = by_bitsandbytes(weight, double=True)
    torch.set_num_threads(threads)

    with patch.object(nf4, "_CHUNK", 1 << 30):  # in small chunks two threads wait long on a busy machine
        actual = quantize_nf4(weight, double=True, name="w")

    assert_same(expected, actual)


@given(rows=st.integers(1, 30), columns=st.integers(1, 150), blocks=st.sampled_from([256, 512]))
@settings(max_examples=50, deadline=None)
def test_chunks_change_nothing(rows: int, columns: int, blocks: int) -> None:
    """A weight quantized in many chunks equals the same weight quantized at once."""
    weight = randn(rows * 20, columns)
    with patch.object(nf4, "_CHUNK", 1 << 40):
        expected = quantize_nf4(weight, double=True, name="w")
    with patch.object(nf4, "_CHUNK", blocks * BLOCK):
        actual = quantize_nf4(weight, double=True, name="w")

    assert_same(expected, actual)


class LargestTemporary(TorchDispatchMode):
    """Records the storage of every operation's results, apart from the sizes told."""

    def __init__(self, ignore: set[int]) -> None:
        super().__init__()
        self.ignore, self.nbytes = ignore, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() not in self.ignore:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_temporaries_do_not_grow_with_the_weight(dtype: torch.dtype) -> None:
    """Whatever the weight's size, no temporary exceeds a chunk in float32."""
    weight = randn(2048, 1024).to(dtype)
    finished = tensors_of(quantize_nf4(weight, double=True, name="w"))
    kept = {t.untyped_storage().nbytes() for t in [weight, *finished.values()]}
    scales = weight.numel() // BLOCK * 4

    with LargestTemporary(kept | {scales}) as seen:
        quantize_nf4(weight, double=True, name="w")

    assert 0 < seen.nbytes <= nf4._CHUNK * 4 < weight.numel()


def test_a_transposed_weight_is_quantized_as_its_copy() -> None:
    """A weight that is not contiguous gives what its contiguous copy gives."""
    weight = randn(100, 70).t()

    assert_same(
        quantize_nf4(weight.contiguous(), double=True, name="w"), quantize_nf4(weight, double=True, name="w")
    )


def test_a_column_of_a_matrix_is_quantized_as_its_copy() -> None:
    """A weight of one column, whose numbers lie apart, gives what its contiguous copy gives."""
    column = randn(100, 70)[:, 3:4]

    assert_same(
        quantize_nf4(column.contiguous(), double=False, name="w"),
        quantize_nf4(column, double=False, name="w"),
    )


def test_the_weight_is_left_as_it_was() -> None:
    """Quantising changes nothing in the weight, and takes parameters too."""
    weight = torch.nn.Parameter(randn(10, 70))
    before = weight.detach().clone()

    result = quantize_nf4(weight, double=False, name="w")

    assert torch.equal(before, weight)
    assert not result.packed.requires_grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")]
)
@pytest.mark.parametrize("shape", [(4, 70), (300, 576)], ids=["in a tail", "in a block"])
def test_non_finite_weights_are_refused(
    shape: tuple[int, int], value: float, shown: str, dtype: torch.dtype
) -> None:
    """A NaN or an infinity is refused with the tensor's name, how many there are and where the first is."""
    weight = randn(*shape).to(dtype)
    row = shape[0] - 1
    weight[row, 65], weight[row, 67] = value, float("nan")

    with pytest.raises(ModelError) as caught:
        quantize_nf4(weight, double=False, name="layers.0.q_proj")

    assert f"layers.0.q_proj: 2 of {weight.numel()} weights" in str(caught.value)
    assert f"the first ({shown}) at row {row}, column 65" in str(caught.value)


@pytest.mark.parametrize(
    ("weight", "shown"),
    [
        (torch.zeros(3), "torch.float32 of shape [3]"),
        (torch.zeros(2, 2, 2), "torch.float32 of shape [2, 2, 2]"),
        (torch.zeros(0, 64), "torch.float32 of shape [0, 64]"),
        (torch.zeros(2, 2, dtype=torch.int32), "torch.int32 of shape [2, 2]"),
    ],
    ids=["vector", "three dimensions", "empty", "integers"],
)
def test_what_is_no_matrix_of_floats_is_refused(weight: Tensor, shown: str) -> None:
    """Only a matrix of floats that is not empty can be quantised."""
    with pytest.raises(ModelError) as caught:
        quantize_nf4(weight, double=False, name="q_proj")

    assert str(caught.value) == f"q_proj: a matrix of floats is needed, not {shown}"


def test_doubles_beyond_float32_are_refused() -> None:
    """A float64 that is infinite in float32 counts as infinite."""
    with pytest.raises(ModelError, match=r"1 of 64 .* in float32, the first \(1e\+300\)"):
        quantize_nf4(with_value(torch.zeros(1, 64, dtype=torch.float64), 0, 9, 1e300), double=False, name="w")


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_nbytes(double: bool) -> None:
    """A weight of 4 bits takes 4.5 bits with float32 scales, and 4.127 with double quantisation."""
    weight = quantize_nf4(randn(256, 1024), double=double, name="w")

    count = 256 * 1024
    scales = count // 64 + count // 64 // 256 * 4 + 4 if double else count // 64 * 4
    assert weight.nbytes == count // 2 + scales
