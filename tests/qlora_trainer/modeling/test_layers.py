"""Norms and gated activations: the reference and every tier of the kernel library against fp64."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_tiers import PASS_TIERS, running
from qlora_trainer.modeling.layers import ClampedGatedMlp, RmsNorm, _Gated

pytestmark = pytest.mark.process

TYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0, 8), (1, 7), (3, 17), (31, 64), (257, 100), (2, 33, 576)]
EPSILON = 1e-5


@pytest.fixture(params=PASS_TIERS, scope="module", autouse=True)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with the reference and with each tier."""
    with running(request.param):
        yield request.param


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Normal values, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """The layer's."""
    result: Tensor = RmsNorm(weight, EPSILON)(x)
    return result


def rms_norm_formula(x: Tensor, weight: Tensor) -> Tensor:
    """By its definition."""
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The layer's."""
    result: Tensor = _Gated.apply(gate, up)
    return result


def swiglu_formula(gate: Tensor, up: Tensor) -> Tensor:
    """By its definition."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """The layer's."""
    result: Tensor = _Gated.apply(gate, up, "gelu_pytorch_tanh")
    return result


def geglu_formula(gate: Tensor, up: Tensor) -> Tensor:
    """By its definition."""
    return F.gelu(gate, approximate="tanh") * up


def wide_norm(x: Tensor, weight: Tensor) -> Tensor:
    """The layer's, its weight in fp32."""
    return rms_norm(x, weight.float() if weight.dtype == torch.bfloat16 else weight)


LAYERS = {
    "rms_norm": (rms_norm, rms_norm_formula),
    "wide_norm": (wide_norm, rms_norm_formula),
    "swiglu": (swiglu, swiglu_formula),
    "geglu": (geglu, geglu_formula),
}
GATED = pytest.mark.parametrize(
    ("gate_layer", "formula"), [("swiglu", swiglu_formula), ("geglu", geglu_formula)]
)
EVERY_LAYER = pytest.mark.parametrize("layer", LAYERS)


def inputs_of(layer: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """The layer's two inputs, and a gradient of its output."""
    second = shape[-1:] if layer.endswith("norm") else shape
    x, y, dy = (2 * randn(*s, seed=n, dtype=dtype) for n, s in enumerate((shape, second, shape)))
    return [x, y, dy]


def with_gradients(run: Callable[..., Tensor], inputs: list[Tensor], wide: bool = False) -> list[Tensor]:
    """The output and the gradients of what is trained through: both inputs, but not a norm's weight."""
    *inputs, dy = (t.double() if wide else t for t in inputs)
    first, second = inputs
    first = first.detach().requires_grad_()
    needing = [first]
    if second.dim() == first.dim():
        second = second.detach().requires_grad_()
        needing.append(second)
    out = run(first, second)
    return [out.detach(), *torch.autograd.grad(out, needing, dy)]


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm; 0 for nothing."""
    norm = float(exact.norm())
    return float((found.double() - exact).norm()) / norm if norm else 0.0


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_clamped_gate_is_that_of_its_formula(dtype: torch.dtype) -> None:
    """Gates and ups that take turns, some beyond the limit, some at it: fp64's output and gradient, rounded twice."""
    alpha, limit = 1.702, 1.5
    x = 2 * randn(31, 64, seed=0, dtype=dtype)
    x[0, :4] = torch.tensor([limit, limit, -limit, -limit])
    dy = randn(31, 32, seed=1, dtype=dtype)

    def formula(both: Tensor) -> Tensor:
        gate, up = both[:, ::2].clamp(max=limit), both[:, 1::2].clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)

    def both_of(run: Callable[[Tensor], Tensor], wide: bool) -> list[Tensor]:
        own = (x.double() if wide else x).requires_grad_()
        out = run(own)
        return [out, *torch.autograd.grad(out, own, dy.to(out.dtype))]

    layer = ClampedGatedMlp(torch.nn.Identity(), torch.nn.Identity(), alpha, limit)
    exact = both_of(formula, wide=True)
    for mine, right in zip(both_of(layer, wide=False), exact, strict=True):
        assert mine.dtype == dtype
        assert error(mine.detach(), right.detach()) <= torch.finfo(dtype).eps


@EVERY_LAYER
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_those_of_a_few_roundings(layer: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Output and gradients are fp64's up to two roundings of the dtype, and not half as far again as the reference's.

    Of few numbers one decides, and may be rounded otherwise.
    """
    inputs = inputs_of(layer, shape, dtype)
    run, formula = LAYERS[layer]

    found = with_gradients(run, inputs)

    exact = with_gradients(formula, inputs, wide=True)
    with running("reference"):
        reference = with_gradients(run, inputs)
    rounding = torch.finfo(dtype).eps / 2
    for mine, theirs, right in zip(found, reference, exact, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == right.shape
        assert error(mine, right) <= 2 * rounding
        assert error(mine, right) <= 1.5 * error(theirs, right) + (rounding if right.numel() < 1000 else 0)


def test_the_norm_in_bf16_is_transformers_bit_for_bit(tier: str) -> None:
    """It is rounded before the weight; all but the few numbers that the sum's last bit decides are the reference's."""
    x, weight, _ = inputs_of("rms_norm", (500, 576), torch.bfloat16)
    with running("reference"):
        expected = rms_norm(x, weight)

    assert int((rms_norm(x, weight) != expected).sum()) <= 5


def test_a_norm_with_a_wide_weight_is_rounded_once(tier: str) -> None:
    """In bf16 its output is the nearest to the exact one, up to fp32's own error."""
    inputs = inputs_of("wide_norm", (64, 100), torch.bfloat16)
    exact = with_gradients(rms_norm_formula, inputs, wide=True)[0]

    mine = with_gradients(wide_norm, inputs)[0]
    assert float(((mine.double() - exact).abs() / exact.abs().clamp(min=1e-30)).max()) < 2**-8 * 1.01


@GATED
def test_gates_in_bf16_are_rounded_once(tier: str, gate_layer: str, formula: Callable[..., Tensor]) -> None:
    """Every number of the compiled passes is the nearest to the exact one, up to fp32's own error."""
    if tier == "reference":
        pytest.skip("torch rounds after every operator")
    inputs = inputs_of(gate_layer, (64, 100), torch.bfloat16)
    exact = with_gradients(formula, inputs, wide=True)

    for mine, right in zip(with_gradients(LAYERS[gate_layer][0], inputs), exact, strict=True):
        error = (mine.double() - right).abs() / right.abs().clamp(min=1e-6)  # a slope passes through 0
        assert float(error.max()) < 2**-8 * 1.02


def test_gradcheck_in_fp64() -> None:
    """Types that the library does not take are the reference's: analytic gradients equal numerical ones."""
    gate, up, _ = (t.double().requires_grad_() for t in inputs_of("swiglu", (3, 5), torch.float32))

    assert torch.autograd.gradcheck(swiglu, (gate, up))
    assert torch.autograd.gradcheck(geglu, (gate, up))


@EVERY_LAYER
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_no_bit(layer: str, dtype: torch.dtype, threads: int, tier: str) -> None:
    """Whatever their number, output and gradients are those of one thread."""
    if tier == "reference":
        pytest.skip("torch's own operators")
    inputs = inputs_of(layer, (257, 333), dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            results.append(with_gradients(LAYERS[layer][0], inputs))
    finally:
        torch.set_num_threads(before)

    for alone, together in zip(*results, strict=True):
        assert torch.equal(alone, together)


@EVERY_LAYER
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_inputs_that_are_not_contiguous(layer: str, dtype: torch.dtype) -> None:
    """Transposed inputs and gradients, every other column, and an expanded gradient give what their copies give."""
    x, y, dy = inputs_of(layer, (33, 33), dtype)
    strange = [x.t(), y.repeat_interleave(2, dim=-1)[..., ::2], dy[:1].expand(33, 33)]

    found = with_gradients(LAYERS[layer][0], strange)

    for mine, expected in zip(
        found, with_gradients(LAYERS[layer][0], [t.contiguous() for t in strange]), strict=True
    ):
        torch.testing.assert_close(mine, expected)


@EVERY_LAYER
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_hidden(layer: str, value: float) -> None:
    """Where the formula gives NaN or infinity, so does the layer."""
    inputs = inputs_of(layer, (5, 37), torch.float32)
    inputs[0][2, 35] = value
    run, formula = LAYERS[layer]

    for mine, right in zip(
        with_gradients(run, inputs), with_gradients(formula, inputs, wide=True), strict=True
    ):
        assert bool((mine.isfinite() <= right.isfinite()).all())


@GATED
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gates_far_from_zero(dtype: torch.dtype, gate_layer: str, formula: Callable[..., Tensor]) -> None:
    """A gate far below 0 closes, one far above passes what it holds: no exponential overflows into NaN."""
    gate = torch.tensor([-1e10, -1e4, -200.0, -89.0, -0.0, 0.0, 89.0, 200.0, 1e4, 1e10], dtype=dtype)
    ones = torch.ones_like(gate)
    out, dgate, dup = with_gradients(LAYERS[gate_layer][0], [gate, ones, ones])

    expected = [0, 0, 0, 0, 0, 0, *gate[6:].tolist()]
    assert out.tolist() == pytest.approx(expected, abs=1e-30)
    assert dup.tolist() == pytest.approx(expected, abs=1e-30)
    assert dgate.tolist() == pytest.approx([0, 0, 0, 0, 0.5, 0.5, 1, 1, 1, 1], abs=1e-30)
