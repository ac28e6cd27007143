"""The chunked cross-entropy against torch's own over the whole logits."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_tiers import PASS_TIERS, running
from qlora_trainer.modeling import loss
from qlora_trainer.modeling.loss import summed_cross_entropy
from qlora_trainer.modeling.passes import passes_for

pytestmark = pytest.mark.process

ROWS, HIDDEN, VOCABULARY = 13, 24, 101


@pytest.fixture(params=PASS_TIERS, scope="module", autouse=True)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with the reference and with each tier."""
    with running(request.param):
        yield request.param


def case(rows: int = ROWS, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, head and targets, the first and last word among them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=generator) * scale
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator) / math.sqrt(HIDDEN)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    targets[:1], targets[1:2] = 0, VOCABULARY - 1
    return hidden, head, targets


def ours(
    hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The summed loss and a third of its gradient (so that the factor from above is seen)."""
    hidden = hidden.clone().requires_grad_()
    total = summed_cross_entropy(hidden, head, targets, softcap)
    return total.detach(), torch.autograd.grad(total / 3, hidden)[0]


def exact(
    hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same by torch, in fp64, over the whole logits."""
    hidden = hidden.double().requires_grad_()
    logits = hidden @ head.double().t()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    total = F.cross_entropy(logits, targets, reduction="sum")
    return total.detach(), torch.autograd.grad(total / 3, hidden)[0]


@pytest.mark.parametrize("chunk", [1, 2, 4, 12, 13, 1000])
@pytest.mark.parametrize("head_slice", [1, 7, 1000])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_chunked_equals_full(
    monkeypatch: pytest.MonkeyPatch, chunk: int, head_slice: int, stored: torch.dtype
) -> None:
    """Loss and gradient are those of the whole logits, whatever the chunks, also of a head that is stored narrow."""
    monkeypatch.setattr(loss, "LOGITS_BYTES", chunk * 4 * VOCABULARY)
    monkeypatch.setattr(loss, "SLICE_BYTES", head_slice * 4 * HIDDEN)
    hidden, head, targets = case()
    head = head.to(stored)

    found, expected = ours(hidden, head, targets), exact(hidden, head, targets)

    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_the_library_widens_no_slice_of_the_head(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stored: torch.dtype
) -> None:
    """It multiplies with the head as it is stored."""
    hidden, head, targets = case()
    expected, gradient = ours(hidden.to(dtype), head.to(stored), targets)
    if passes_for(hidden) is not None:
        monkeypatch.setattr(loss, "_slices", None)
    found = ours(hidden.to(dtype), head.to(stored), targets)

    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], gradient)


@pytest.mark.parametrize("softcap", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_capped_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stored: torch.dtype, softcap: float
) -> None:
    """Logits l are c tanh(l / c), in chunks of rows and slices of the head; in bf16 from logits that are rounded."""
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * 4 * VOCABULARY)
    monkeypatch.setattr(loss, "SLICE_BYTES", 30 * 4 * HIDDEN)
    hidden, head, targets = case(scale=4.0)
    hidden, head = hidden.to(dtype), head.to(stored).to(dtype if dtype == torch.bfloat16 else stored)

    found, expected = ours(hidden, head, targets, softcap), exact(hidden, head, targets, softcap)

    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[0], expected[0], rtol=rounding, atol=0)
    error = (found[1].double() - expected[1]).norm() / expected[1].norm()
    assert float(error) <= rounding


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000), st.floats(0.1, 20.0))
def test_equals_torch(rows: int, seed: int, scale: float) -> None:
    """For any rows and spread of logits, loss and gradient are torch's."""
    found, expected = ours(*case(rows, seed, scale)), exact(*case(rows, seed, scale))

    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-4, atol=1e-5)


def test_no_rows_give_zero() -> None:
    """A batch in which nothing is supervised costs 0 and has an empty, finite gradient."""
    hidden, head, targets = case(0)
    total, gradient = ours(hidden, head, targets)

    assert total == 0.0
    assert gradient.shape == (0, HIDDEN)


def test_no_rows_of_a_batch_give_zero_gradients_above() -> None:
    """Where rows are chosen from a batch and none is, every hidden state's gradient is 0, not NaN."""
    hidden, head, _ = case()
    hidden.requires_grad_()
    none = torch.empty(0, dtype=torch.int64)
    summed_cross_entropy(hidden[none], head, none).backward()  # type: ignore[no-untyped-call]

    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("size", [1e3, 1e4, 1e30])
def test_extreme_logits_stay_finite(size: float) -> None:
    """Logits too large for exp() give the right loss: 0 where the target wins, the distance where it loses."""
    hidden = torch.tensor([[size], [size]])
    head = torch.tensor([[1.0], [0.0], [-1.0]])
    total, gradient = ours(hidden, head, torch.tensor([0, 2]))

    assert float(total) == pytest.approx(2 * size)
    assert bool(gradient.isfinite().all())


def test_nan_reaches_the_loss() -> None:
    """A hidden state that is NaN makes the loss NaN: divergence is never hidden."""
    hidden, head, targets = case()
    hidden[3, 0] = math.nan

    assert math.isnan(float(summed_cross_entropy(hidden, head, targets)))


def test_bf16_computes_the_loss_of_its_rounded_inputs() -> None:
    """In bf16 the losses are still summed in wide numbers: within bf16's rounding of logits of the exact loss."""
    hidden, head, targets = case(200)
    narrow, head = hidden.bfloat16(), head.bfloat16()
    found, gradient = ours(narrow, head, targets)
    expected, exact_gradient = exact(narrow, head, targets)

    assert found.dtype == torch.float64
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    error = (gradient.double() - exact_gradient).norm() / exact_gradient.norm()
    assert float(error) < 1e-2


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130])
def test_bf16_chunks_equal_the_whole(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """In bf16, where rows are filled up, small chunks give the loss and gradient of one: no filler is counted."""
    hidden, head, targets = case(rows)
    whole, gradient = ours(hidden.bfloat16(), head.bfloat16(), targets)
    monkeypatch.setattr(loss, "LOGITS_BYTES", 1)
    chunked, chunked_gradient = ours(hidden.bfloat16(), head.bfloat16(), targets)
    alone = sum(
        float(ours(hidden[i : i + 1].bfloat16(), head.bfloat16(), targets[i : i + 1])[0]) for i in range(rows)
    )

    assert gradient.shape == (rows, HIDDEN)
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(chunked_gradient, gradient)
    assert float(whole) == pytest.approx(alone, rel=1e-3)


def test_the_factor_from_above_is_not_rounded() -> None:
    """A step's 1 / 387 in bf16 would be 1 / 386.2: all of its gradients would be off by as much."""
    hidden, head, targets = case()
    hidden = hidden.bfloat16().requires_grad_()
    whole, part = (
        torch.autograd.grad(summed_cross_entropy(hidden, head.bfloat16(), targets, None) / count, hidden)[0]
        for count in (1, 387)
    )

    assert torch.equal(part, (whole.float() / 387).bfloat16())


def test_without_gradient_nothing_is_kept() -> None:
    """Under no_grad the loss is the same number, and has no graph."""
    hidden, head, targets = case()
    with torch.no_grad():
        total = summed_cross_entropy(hidden.requires_grad_(), head, targets)

    assert not total.requires_grad
    assert torch.equal(total, ours(hidden.detach(), head, targets)[0])


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_vocabulary(vocabulary: int, dtype: torch.dtype) -> None:
    """Whatever the number of words, and wherever the target is among them, losses are those of the logits as stored."""
    generator = torch.Generator().manual_seed(vocabulary)
    rows = 9
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    head = (torch.randn(vocabulary, HIDDEN, generator=generator) / math.sqrt(HIDDEN)).to(dtype)
    targets = torch.linspace(0, vocabulary - 1, rows).long()

    found, gradient = ours(hidden, head, targets)

    stored = (hidden @ head.t()).double()
    expected = F.cross_entropy(stored, targets, reduction="sum")
    probabilities = stored.softmax(dim=1) - F.one_hot(targets, vocabulary)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    exact_gradient = probabilities @ head.double() / 3
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert float((gradient.double() - exact_gradient).norm()) <= bound * float(exact_gradient.norm()) + 1e-6


def test_threads_change_no_bit(tier: str) -> None:
    """Losses and gradients of many rows are the same with 1, 2, 3 and 7 threads."""
    if tier == "reference":
        pytest.skip("torch's own operators")
    logits, targets = torch.randn(50, 3001, generator=torch.Generator().manual_seed(0)), torch.arange(50)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            copy = logits.clone()
            passes = passes_for(copy)
            assert passes is not None
            results.append((passes.cross_entropy(copy, targets, gradient=True), copy))
    finally:
        torch.set_num_threads(before)

    for losses, gradient in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(gradient, results[0][1])
