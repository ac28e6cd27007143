"""LoRA layers against the formula, finite differences and fp64."""

import itertools
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernel_tiers import PASS_TIERS, running
from qlora_trainer.kernels.library import TIERS
from qlora_trainer.modeling import lora_linear
from qlora_trainer.modeling.lora import attach_adapters
from qlora_trainer.modeling.lora_linear import Dropout, LoraLinear, Mask, philox, seeded_generator
from qlora_trainer.quantization.frozen_weight import FrozenWeight, UnquantizedWeight
from qlora_trainer.quantization.schemes import Int8, Nf4, Scheme, Unquantized

pytestmark = pytest.mark.process

ROWS, IN, OUT, RANK = 6, 64, 10, 3
SCALE = 1.7


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def frozen(kind: str, dtype: torch.dtype = torch.float32, out: int = OUT, in_: int = IN) -> FrozenWeight:
    """A base weight, quantized or not."""
    weight = randn(out, in_, seed=1, dtype=dtype)
    if kind == "dense":
        return UnquantizedWeight(weight)
    return Nf4(double=kind == "nf4-double").freeze("w", weight, dtype)


def layer(
    weight: FrozenWeight, bias: Tensor | None = None, dropout: Dropout | None = None
) -> tuple[LoraLinear, nn.Parameter, nn.Parameter]:
    """A layer with a random adapter, and the adapter's matrices."""
    made = LoraLinear("layer", weight, bias)
    out, in_ = made.shape
    a = nn.Parameter(randn(RANK, in_, seed=2) / math.sqrt(in_))
    b = nn.Parameter(randn(out, RANK, seed=3))
    made.attach(a, b, SCALE, dropout)
    return made, a, b


def by_formula(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """The layer as its definition says, left to autograd."""
    y = x @ weight.t() + SCALE * (x @ a.t()) @ b.t()
    return y if bias is None else y + bias


# --- the layer


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(ROWS,), (1, ROWS), (2, 3), ()], ids=str)
@pytest.mark.parametrize("kind", ["dense", "nf4", "nf4-double"])
def test_forward_and_gradients_follow_the_formula(kind: str, shape: tuple[int, ...], bias: bool) -> None:
    """Output and every gradient are autograd's of the formula with the dequantised weight, for any leading shape."""
    weight, constant = frozen(kind), randn(OUT, seed=4) if bias else None
    made, a, b = layer(weight, constant)
    x = randn(*shape, IN, seed=5).requires_grad_()
    up = randn(*shape, OUT, seed=6)

    found = [made(x), *torch.autograd.grad((made(x) * up).sum(), [x, a, b])]

    expected_y = by_formula(x, weight.dequantize(torch.float32), constant, a, b)
    expected = [expected_y, *torch.autograd.grad((expected_y * up).sum(), [x, a, b])]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_gradcheck_in_fp64() -> None:
    """Analytic gradients of x, A and B equal numerical ones in fp64."""
    weight = frozen("dense", torch.float64, 5, 4)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        made = LoraLinear("layer", weight, randn(5, seed=9, dtype=torch.float64))
        made.attach(a, b, SCALE, None)  # type: ignore[arg-type]  # gradcheck's own leaves
        result: Tensor = made(x)
        return result

    inputs = [
        randn(*s, seed=n, dtype=torch.float64).requires_grad_()
        for n, s in enumerate([(3, 4), (2, 4), (5, 2)])
    ]

    assert torch.autograd.gradcheck(run, inputs)


def test_gradcheck_with_dropout() -> None:
    """With dropout, the gradients are those of the masked formula."""
    weight = frozen("dense", torch.float64, 5, 4)
    dropout = Dropout(0.4, 0)
    dropout.at(3, [(0, 2), (1, 1)])

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        made = LoraLinear("layer", weight, None)
        made.attach(a, b, SCALE, dropout)  # type: ignore[arg-type]
        result: Tensor = made(x)
        return result

    inputs = [
        randn(*s, seed=n, dtype=torch.float64).requires_grad_()
        for n, s in enumerate([(3, 4), (2, 4), (5, 2)])
    ]

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("scheme", [Nf4(double=True), Int8(), Unquantized()], ids=str)
def test_gradcheck_of_the_kernel_library(tier: str, scheme: Scheme) -> None:
    """Of fp32: the layer is linear in each of its inputs, so that differences over any distance are exact."""
    with running(tier):
        weight = scheme.freeze("w", randn(33, IN, seed=1), torch.float32)

        def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            made = LoraLinear("layer", weight, randn(33, seed=9))
            made.attach(a, b, SCALE, None)  # type: ignore[arg-type]  # gradcheck's own leaves
            result: Tensor = made(x)
            return result

        inputs = [randn(*s, seed=n).requires_grad_() for n, s in enumerate([(3, IN), (2, IN), (33, 2)])]

        assert hasattr(weight, "linear_with")
        with warnings.catch_warnings(category=UserWarning, action="ignore"):  # that this is not float64
            assert torch.autograd.gradcheck(run, inputs, eps=1.0, atol=1e-4, rtol=1e-4)


def test_layer_without_adapter_passes_gradients_through() -> None:
    """A layer that is not adapted is the frozen base, and gives x its gradient."""
    weight, bias = frozen("nf4"), randn(OUT, seed=4)
    x = randn(ROWS, IN, seed=5).requires_grad_()
    y = LoraLinear("layer", weight, bias)(x)
    dense = weight.dequantize(torch.float32)

    torch.testing.assert_close(y, x @ dense.t() + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], torch.ones(ROWS, OUT) @ dense, rtol=1e-5, atol=1e-5
    )


def test_no_rows_give_no_rows() -> None:
    """An empty batch gives an empty output and zero gradients."""
    made, a, b = layer(frozen("nf4"))
    made(torch.empty(0, IN)).sum().backward()

    for parameter in (a, b):
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_rows_that_are_not_contiguous() -> None:
    """A transposed input, and a transposed gradient, give the same numbers as contiguous ones."""
    made, a, b = layer(frozen("nf4"))
    x = randn(IN, ROWS, seed=5).t()
    up = randn(OUT, ROWS, seed=6).t()
    strided = torch.autograd.grad(made(x), [a, b], up)
    plain = torch.autograd.grad(made(x.contiguous()), [a, b], up.contiguous())

    for mine, theirs in zip(strided, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("wanted", [False, True], ids=["frozen input", "input needs a gradient"])
def test_no_work_for_a_gradient_that_nobody_needs(wanted: bool) -> None:
    """The product with the base weight is made in the backward pass only where x needs its gradient."""
    made, _, _ = layer(frozen("dense"))
    y = made(randn(ROWS, IN, seed=5).requires_grad_(wanted))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    adapter = 2 * ROWS * RANK * (OUT + IN + OUT)  # dy B, its product with x, and dB
    through = 2 * ROWS * IN * OUT

    assert adapter < through
    assert (counter.get_total_flops() >= adapter + through) == wanted


def test_bf16_computes_in_bf16_and_learns_in_fp32() -> None:
    """With bf16 activations, the output is bf16 and near the exact one; the adapter's gradients are fp32."""
    weight = frozen("nf4-double")
    made, a, b = layer(weight)
    x = randn(ROWS, IN, seed=5).bfloat16()
    y = made(x)
    grads = torch.autograd.grad(y.float().sum(), [a, b])
    exact = by_formula(x.double(), weight.dequantize(torch.float64), None, a.double(), b.double())

    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]
    assert float(((y.double() - exact).norm() / exact.norm()).detach()) < 2e-2


def test_finite_difference_of_a_two_layer_toy() -> None:
    """Moving all adapters of a quantised two-layer network a little changes its loss as the gradient says."""
    layers = {n: LoraLinear(n, frozen("nf4-double", out=IN), None) for n in ("first", "second")}
    parameters = attach_adapters(layers, rank=RANK, alpha=5.0, dropout=None, seed=0)
    start = parameters.flat.data.add_(randn(parameters.flat.numel(), seed=7), alpha=0.05).clone()
    x = randn(ROWS, IN, seed=5) / 8

    def loss(at: Tensor) -> Tensor:
        parameters.flat.data.copy_(at)
        hidden = torch.tanh(layers["first"](x) / 8)
        result: Tensor = (layers["second"](hidden).double() ** 2).mean()
        return result

    loss(start).backward()  # type: ignore[no-untyped-call]
    gradient, random = parameters.gradient.clone(), randn(parameters.flat.numel(), seed=8)
    # along the gradient too, so that the slope stands out of fp32's noise
    step = (gradient / gradient.norm() + random / random.norm()) * 1e-2
    with torch.no_grad():
        difference = float(loss(start + step) - loss(start - step)) / 2

    assert difference == pytest.approx(float(gradient.double() @ step.double()), rel=2e-3)


# --- dropout

BINS = [(0, 5), (3, 2), (4, 7)]


def masks(dropout: Dropout, step: int, bins: list[tuple[int, int]], name: str = "layer") -> Tensor:
    """The mask of one forward pass over these bins."""
    dropout.at(step, bins)
    return dropout.mask(name).times(torch.ones(sum(tokens for _, tokens in bins), IN))


def test_masks_do_not_depend_on_the_grouping_of_bins() -> None:
    """A bin meets the same mask alone, beside others, in any order, and when it is asked for again."""
    whole = torch.split(masks(Dropout(0.3, 1), 2, BINS), [tokens for _, tokens in BINS])
    for order in itertools.permutations(range(len(BINS))):
        together = masks(Dropout(0.3, 1), 2, [BINS[i] for i in order])
        for i, part in zip(order, torch.split(together, [BINS[i][1] for i in order]), strict=True):
            assert torch.equal(part, whole[i])
            assert torch.equal(masks(Dropout(0.3, 1), 2, [BINS[i]]), whole[i])


@pytest.mark.parametrize(
    ("seed", "step", "number", "name"),
    [
        pytest.param(2, 2, 0, "layer", id="seed"),
        pytest.param(1, 3, 0, "layer", id="step"),
        pytest.param(1, 2, 1, "layer", id="bin"),
        pytest.param(1, 2, 0, "other", id="layer"),
    ],
)
def test_each_part_of_the_key_changes_the_mask(seed: int, step: int, number: int, name: str) -> None:
    """Seed, step, bin and layer each give another mask."""
    same = masks(Dropout(0.3, 1), 2, [(0, 50)])
    other = masks(Dropout(0.3, seed), step, [(number, 50)], name)

    # independent masks of 0.7 agree in 0.7^2 + 0.3^2 of all places
    assert float((same == other).float().mean()) == pytest.approx(0.58, abs=0.03)


def test_masks_keep_the_mean() -> None:
    """Kept inputs are scaled by 1 / (1 - p), as many as they should be."""
    mask = masks(Dropout(0.25, 0), 0, [(0, 2000)])

    assert sorted(set(mask.flatten().tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.01)


def test_dropout_never_touches_torchs_generator() -> None:
    """There is no generator's state to save: torch's own is as before."""
    before = torch.get_rng_state()
    masks(Dropout(0.25, 0), 0, BINS)

    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_reaches_the_adapter_alone() -> None:
    """The base sees every input; the adapter sees the masked ones; in eval mode nothing is masked."""
    dropout = Dropout(0.5, 0)
    weight = frozen("dense")
    made, a, b = layer(weight, None, dropout)
    dense = weight.dequantize(torch.float32)
    x = randn(ROWS, IN, seed=5)
    mask = masks(dropout, 0, [(0, ROWS)])

    expected = x @ dense.t() + SCALE * ((x * mask) @ a.t()) @ b.t()
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.eval()(x), by_formula(x, dense, None, a, b), rtol=1e-5, atol=1e-5)


# Salmon et al.'s own known answers: counter, key, result.
KNOWN = [
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_its_known_answers(counter: list[int], key: int, expected: list[int]) -> None:
    """The generator is Random123's, to the bit."""
    assert [int(word) for word in philox([torch.tensor([c]) for c in counter], key)] == expected


@pytest.fixture(params=PASS_TIERS[1:])
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each tier of the kernel library."""
    with running(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("probability", [0.05, 0.5, 1 - 2**-40], ids=["few", "half", "all"])
def test_compiled_masks_are_the_references(
    tier: str, dtype: torch.dtype, columns: int, probability: float
) -> None:
    """Products with a mask, and sums with them, have the same bits compiled and in plain torch, for any threads."""
    mask = Mask(probability, ((2**64 - 1, 3), (5, 0), (2**63 + 17, 300)))
    x, out = (randn(303, columns, seed=n, dtype=dtype) for n in (0, 1))

    def run() -> list[Tensor]:
        added = out.clone()
        mask.add_times(added, x)
        return [mask.times(x), mask.times(x.t().contiguous().t()), added]

    with running("reference"):
        expected = run()
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            for mine, theirs in zip(run(), expected, strict=True):
                assert torch.equal(mine, theirs)
    finally:
        torch.set_num_threads(before)


def test_the_reference_makes_masks_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its random numbers are made a few rows at a time, and are those of the whole."""
    whole = masks(Dropout(0.3, 1), 2, BINS)
    monkeypatch.setattr(lora_linear, "_RANDOM_AT_ONCE", 2 * IN)
    with running("reference"):
        pieces = masks(Dropout(0.3, 1), 2, BINS)

    assert torch.equal(whole, pieces)


def test_masks_are_not_kept_for_the_backward_pass() -> None:
    """What a layer keeps with dropout is what it keeps without: its inputs, and nothing as large again."""
    kept = []
    for dropout in (None, Dropout(0.3, 0)):
        if dropout is not None:
            dropout.at(0, [(0, ROWS)])
        sizes: list[int] = []
        made, _, _ = layer(frozen("dense"), None, dropout)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t
        ):  # type: ignore[misc]
            made(randn(ROWS, IN, seed=5).requires_grad_())
        kept.append(sizes)

    assert kept[0] == kept[1] != []


def test_seeded_generator_depends_on_its_key() -> None:
    """Equal keys give equal numbers, and others other ones."""
    first, again, other = (torch.rand(4, generator=seeded_generator(k)) for k in ("k", "k", "l"))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
