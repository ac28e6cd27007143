"""Attention over packed samples against each sample alone, and against one dense mask."""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AttentionInterface

from kernel_tiers import PASS_TIERS, running
from qlora_trainer.modeling import attention
from qlora_trainer.modeling.attention import packed_attention
from qlora_trainer.modeling.key_value_cache import CachedSequence

pytestmark = pytest.mark.process

SEGMENTS = {
    "one": [20],
    "several": [7, 1, 5, 4, 3],
    "single tokens": [1, 1, 1, 1],
    "single tokens around": [1, 9, 1],
    "longest last": [2, 3, 31],
}
HEADS = {"plain": (4, 4), "grouped": (6, 2), "one key head": (4, 1)}


def inputs(
    tokens: int, heads: int, key_heads: int, dtype: torch.dtype = torch.float64, size: int = 8
) -> list[Tensor]:
    """Random query, key and value that need gradients."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(1, h, tokens, size, generator=generator, dtype=dtype).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


def packed(qkv: list[Tensor], segments: list[int], **options: Any) -> Tensor:
    """Ours: (1, tokens, heads, head size)."""
    q, k, v = qkv
    return packed_attention(nn.Identity(), q, k, v, None, segment_lengths=segments, **options)[0]


def dense(
    qkv: list[Tensor],
    segments: list[int],
    window: int | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition, with all scores and one mask over the whole row."""
    q, k, v = qkv
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    sample = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
    distance = torch.arange(len(sample))[:, None] - torch.arange(len(sample))[None, :]
    seen = (sample[:, None] == sample[None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    scores = q @ k.transpose(2, 3) * (scaling or 1 / math.sqrt(q.shape[-1]))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        further = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, further], dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


def with_gradients(run: Callable[[list[Tensor]], Tensor], qkv: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of a weighted sum of it."""
    out = run(qkv)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), qkv)]


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Shapes equal, numbers equal up to fp64 rounding."""
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("window", [None, 1, 3, 1000])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_equals_one_dense_mask(segments: list[int], window: int | None, heads: tuple[int, int]) -> None:
    """Output and gradients are those of a dense mask that lets a token see its own sample's last tokens only."""
    qkv = inputs(sum(segments), *heads)

    found = with_gradients(lambda x: packed(x, segments, sliding_window=window), qkv)

    assert_all_close(found, with_gradients(lambda x: dense(x, segments, window), qkv))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.one_of(st.none(), st.integers(1, 14)),
    st.booleans(),
)
def test_equals_samples_run_alone(segments: list[int], window: int | None, grouped: bool) -> None:
    """Each sample's output and gradients are the same in a packed row as alone."""
    qkv = inputs(sum(segments), 4, 2 if grouped else 4)
    whole = with_gradients(lambda x: packed(x, segments, sliding_window=window), qkv)

    def alone(x: list[Tensor]) -> Tensor:
        pieces = zip(*(torch.split(t, segments, dim=2) for t in x), strict=True)
        return torch.cat(
            [packed(list(p), [n], sliding_window=window) for p, n in zip(pieces, segments, strict=True)],
            dim=1,
        )

    assert_all_close(whole, with_gradients(alone, qkv))


def test_a_sample_never_depends_on_another() -> None:
    """Changing one sample's numbers, even to NaN, changes no other sample's output by a bit."""
    segments = [5, 4, 6]
    qkv = [x.detach() for x in inputs(15, 4, 2, torch.float32)]
    before = packed(qkv, segments)
    for x in qkv:
        x[:, :, 5:9] = math.nan
    after = packed(qkv, segments)

    assert torch.equal(before[:, :5], after[:, :5])
    assert torch.equal(before[:, 9:], after[:, 9:])
    assert bool(after[:, 5:9].isnan().all())


def test_scaling_is_used() -> None:
    """A model's own factor of the scores takes the place of 1 / sqrt(head size)."""
    qkv = inputs(9, 2, 2)

    found = packed(qkv, [4, 5], scaling=0.7)

    torch.testing.assert_close(found, dense(qkv, [4, 5], None, 0.7), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("softcap", [0.3, 2.0, 50.0])
@pytest.mark.parametrize("window", [None, 3, 7])
def test_scores_are_capped(window: int | None, softcap: float) -> None:
    """With a cap c, scores s are c tanh(s / c), before a mask hides any; gradients follow."""
    segments, qkv = [7, 1, 20], inputs(28, 6, 2)

    found = with_gradients(lambda x: packed(x, segments, sliding_window=window, softcap=softcap), qkv)

    assert_all_close(found, with_gradients(lambda x: dense(x, segments, window, None, softcap), qkv))


SINKS = torch.tensor([-30.0, -1.0, 0.5, 2.0, 6.0, 90.0])
"""Of six heads: from one that takes nothing to one that takes all."""


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3, 200])
def test_sinks_take_their_share(window: int | None, softcap: float | None) -> None:
    """A head's sink is one more score of each token, whose key has no value; gradients follow."""
    segments, qkv = [7, 1, 140], inputs(148, 6, 2)
    options: dict[str, Any] = {"sliding_window": window, "softcap": softcap}

    found = with_gradients(lambda x: packed(x, segments, s_aux=SINKS, **options), qkv)

    assert_all_close(found, with_gradients(lambda x: dense(x, segments, window, None, softcap, SINKS), qkv))


@pytest.mark.parametrize("window", [5, 100, 128, 129, 250, 299, 300])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_samples_of_many_blocks(window: int, softcap: float | None) -> None:
    """Windows within, across and beyond blocks of queries, the last block short."""
    segments, qkv = [300, 131], inputs(431, 2, 1)

    found = with_gradients(lambda x: packed(x, segments, sliding_window=window, softcap=softcap), qkv)

    assert_all_close(found, with_gradients(lambda x: dense(x, segments, window, None, softcap), qkv))


@pytest.mark.parametrize(
    "options",
    [{"sliding_window": 64}, {"softcap": 5.0}, {"s_aux": torch.ones(2)}],
    ids=["window", "softcap", "sinks"],
)
def test_nothing_of_a_whole_sample_s_square_is_kept(options: dict[str, Any]) -> None:
    """What autograd keeps of a long sample grows with its tokens: twice as many, about twice the bytes."""

    def kept(tokens: int) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = packed(inputs(tokens, 2, 1), [tokens], **options)
        assert output.requires_grad
        return sum(sizes.values())

    assert kept(2048) < 2.3 * kept(1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"segment_lengths": None}, "needs segment_lengths", id="no segments"),
        pytest.param({"segment_lengths": [3, 4]}, "7 tokens do not cover", id="too few tokens"),
        pytest.param({"segment_lengths": [3, 6]}, "9 tokens do not cover", id="too many tokens"),
        pytest.param({"segment_lengths": []}, "0 tokens do not cover", id="none at all"),
        pytest.param({"segment_lengths": [8], "dropout": 0.1}, "neither a mask nor dropout", id="dropout"),
        pytest.param({"segment_lengths": [8], "mask": torch.ones(1, 1, 8, 8)}, "neither a mask", id="mask"),
    ],
)
def test_refuses_what_would_be_wrong(options: dict[str, Any], message: str) -> None:
    """Without segments that cover the row, or with a mask or dropout, it raises instead of leaking."""
    options = dict(options)
    mask = options.pop("mask", None)
    q, k, v = inputs(8, 2, 2)

    with pytest.raises(ValueError, match=message):
        packed_attention(nn.Identity(), q, k, v, mask, **options)


def test_refuses_several_rows() -> None:
    """A batch of rows is refused: segments describe one."""
    q, k, v = (torch.cat([x, x]) for x in inputs(8, 2, 2))

    with pytest.raises(ValueError, match="do not cover"):
        packed_attention(nn.Identity(), q, k, v, None, segment_lengths=[8])


def test_is_registered_under_its_name() -> None:
    """After register(), transformers finds it by NAME."""
    attention.register()

    assert AttentionInterface()[attention.NAME] is packed_attention


# --- the kernel library

TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=PASS_TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference and each tier."""
    with running(request.param):
        yield request.param


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative, in the Frobenius norm, of the output and of each gradient."""
    return [
        float(((mine.double() - right).norm() / right.norm()).detach())
        for mine, right in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("segments", "heads", "size", "window"),
    [
        pytest.param([3, 31, 1, 65], (6, 2), 40, None, id="size off the vector"),
        pytest.param([100, 97, 63], (9, 3), 64, None, id="the demo's heads"),
        pytest.param([49, 257, 2], (4, 1), 72, 50, id="window within blocks"),
        pytest.param([300], (2, 2), 32, 2, id="a window of two"),
        pytest.param([200, 30], (2, 1), 128, 64, id="a window of a block"),
        pytest.param([130, 70], (2, 1), 256, 10**6, id="a window beyond all"),
        pytest.param([270, 190], (4, 2), 64, None, id="many blocks"),
    ],
)
def test_errors_against_fp64(
    tier: str,
    dtype: torch.dtype,
    segments: list[int],
    heads: tuple[int, int],
    size: int,
    window: int | None,
) -> None:
    """Errors are at most three times (and 1e-7) those of torch's attention in fp32, rounded at the end.

    In fp32, gradients of keys are summed over queries in another order. In bf16 the output enters the backward pass
    rounded, as in FlashAttention; that is felt where a query sees few keys. Most cases are within a fifth.
    """
    qkv = inputs(sum(segments), *heads, dtype, size)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    exact = with_gradients(lambda x: dense(x, segments, window), wide)

    found = with_gradients(lambda x: packed(x, segments, sliding_window=window), qkv)

    with running("reference"):
        narrow = [x.detach().float().requires_grad_() for x in qkv]
        reference = with_gradients(lambda x: packed(x, segments, sliding_window=window), narrow)
    assert all(x.dtype == dtype for x in found)
    bounds = errors([x.to(dtype) for x in reference], exact)
    for mine, theirs in zip(errors(found, exact), bounds, strict=True):
        assert mine <= 3 * theirs + 1e-7


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    ("dtype", "softcap", "bound"),
    [
        (torch.float32, 50.0, 1e-5),
        (torch.float32, 2.0, 1e-5),
        (torch.float32, 0.1, 2e-5),
        (torch.bfloat16, 50.0, 1e-2),
        (torch.bfloat16, 2.0, 1e-2),
        (torch.bfloat16, 0.1, 2e-2),
    ],
    ids=str,
)
def test_capped_scores_against_fp64(
    tier: str, dtype: torch.dtype, softcap: float, bound: float, window: int | None
) -> None:
    """Whether the cap is far above the scores, among them or far below, errors are a few units of the type."""
    segments = [63, 120, 1, 29]
    qkv = inputs(sum(segments), 6, 2, dtype, 40)
    exact = with_gradients(
        lambda x: dense(x, segments, window, None, softcap),
        [x.detach().double().requires_grad_() for x in qkv],
    )

    found = with_gradients(lambda x: packed(x, segments, sliding_window=window, softcap=softcap), qkv)

    assert max(errors(found, exact)) <= bound


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_sinks_against_fp64(tier: str, dtype: torch.dtype, bound: float, window: int | None) -> None:
    """Every tier has the output and gradients of the definition, head for head; a sink that takes all leaves none."""
    segments = [63, 120, 1, 29]
    qkv = inputs(sum(segments), 6, 6, dtype, 40)
    sinks = SINKS.to(dtype)
    exact = with_gradients(
        lambda x: dense(x, segments, window, sinks=sinks), [x.detach().double().requires_grad_() for x in qkv]
    )

    found = with_gradients(lambda x: packed(x, segments, sliding_window=window, s_aux=sinks), qkv)

    of_heads = [found[0].transpose(1, 2), *found[1:]], [exact[0].transpose(1, 2), *exact[1:]]
    for head in range(5):
        assert max(errors(*([x[:, head] for x in each] for each in of_heads))) <= bound
    assert all(float(x[:, 5].detach().abs().max()) < 1e-30 for x in of_heads[0])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_packed_row_has_each_samples_own_bits(tier: str, dtype: torch.dtype) -> None:
    """What stands beside a sample changes no bit of its output and gradients."""
    segments = [70, 1, 130, 48, 15]
    qkv = inputs(sum(segments), 6, 2, dtype, 64)
    whole = with_gradients(lambda x: packed(x, segments), qkv)
    weights = torch.linspace(-1, 1, whole[0].numel(), dtype=dtype).view(whole[0].shape)

    start = 0
    for length in segments:
        part = slice(start, start + length)
        own = [x.detach()[:, :, part].requires_grad_() for x in qkv]
        output = packed(own, [length])
        gradients = torch.autograd.grad((output * weights[:, part]).sum(), own)
        assert torch.equal(output, whole[0][:, part])
        for mine, packed_one in zip(gradients, whole[1:], strict=True):
            assert torch.equal(mine, packed_one[:, :, part])
        start += length


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_threads_change_no_bit(tier: str, dtype: torch.dtype) -> None:
    """1, 2, 3 or 7 threads, and any of them that comes first, give the same output and gradients."""
    if tier == "reference":
        pytest.skip("torch's own operators")
    segments = [150, 20, 40, 7, 63]
    qkv = inputs(sum(segments), 6, 3, dtype, 64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 7, 7):
            torch.set_num_threads(threads)
            results.append(with_gradients(lambda x: packed(x, segments), qkv))
    finally:
        torch.set_num_threads(before)

    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_any_place_in_memory(tier: str, dtype: torch.dtype) -> None:
    """Tokens first, heads first, every other number, an expanded gradient: what contiguous copies give."""
    segments = [33, 50]
    q, k, v = (x.detach() for x in inputs(83, 4, 2, dtype, 24))
    strange = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.repeat_interleave(2, dim=-1)[..., ::2],
        torch.cat([v, v], dim=1)[:, :2],
    ]
    gradient = torch.ones(1, 1, 4, 1, dtype=dtype).expand(1, 83, 4, 24)

    def run(qkv: list[Tensor], dy: Tensor) -> list[Tensor]:
        qkv = [x.requires_grad_() for x in qkv]
        output = packed(qkv, segments)
        return [output, *torch.autograd.grad(output, qkv, dy)]

    found, expected = run(strange, gradient), run([q, k, v], gradient.contiguous())

    for mine, theirs in zip(found, expected, strict=True):
        if tier == "reference":
            torch.testing.assert_close(mine, theirs)
        else:
            assert torch.equal(mine, theirs)


class Layer(nn.Module):
    """An attention layer, as far as packed attention asks."""

    layer_idx = 0


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "steps", [[[4, 3, 2], [1, 1, 1], [1, 1, 1]], [[2, 1, 1], [5, 1, 3]]], ids=["one", "many"]
)
def test_a_cached_sequence_goes_on_as_if_it_were_whole(
    tier: str, steps: list[list[int]], window: int | None, sinks: Tensor | None
) -> None:
    """Sequences side by side that grow by one token or several give what each gives whole; the last is not cached."""
    q, k, v = (x.detach() for x in inputs(40, 6, 2, torch.float32))
    sequences = [CachedSequence(20), CachedSequence(20)]
    found: list[list[Tensor]] = [[], []]
    for lengths in steps:
        spans = [slice(20 * number + s.length, 20 * number + s.length + n)
                 for number, (s, n) in enumerate(zip(sequences, lengths, strict=False))]  # fmt: skip
        spans.append(slice(0, lengths[2]))
        row = [torch.cat([x[:, :, span] for span in spans], dim=2) for x in (q, k, v)]
        output = packed_attention(
            Layer(),
            *row,
            None,
            segment_lengths=lengths,
            sliding_window=window,
            cached=[*sequences, None],
            s_aux=sinks,
        )[0]
        *own, alone = torch.split(output, lengths, dim=1)
        for number, part in enumerate(own):
            found[number].append(part)
            sequences[number].advance(lengths[number])
        expected = dense([x[:, :, : lengths[2]] for x in (q, k, v)], [lengths[2]], window, sinks=sinks)
        torch.testing.assert_close(alone, expected)

    for number, sequence in enumerate(sequences):
        whole = slice(20 * number, 20 * number + sequence.length)
        expected = dense([x[:, :, whole] for x in (q, k, v)], [sequence.length], window, sinks=sinks)
        torch.testing.assert_close(torch.cat(found[number], dim=1), expected)


def test_samples_are_apart_in_every_tier(tier: str) -> None:
    """NaN in one sample reaches no other, neither the output nor a gradient."""
    segments = [5, 64, 6]
    qkv = inputs(75, 4, 2, torch.float32, 32)
    for x in qkv:
        x.data[:, :, 5:69] = math.nan
    output, *gradients = with_gradients(lambda x: packed(x, segments), qkv)

    assert bool(output[:, 5:69].isnan().all())
    for rows in (output.transpose(1, 2), *gradients):
        assert bool(rows[:, :, :5].isfinite().all() and rows[:, :, 69:].isfinite().all())


def test_large_scores_choose_one_key(tier: str) -> None:
    """Scores far beyond exp()'s range are a choice of the largest, with no NaN anywhere."""
    q = torch.full((1, 1, 100, 8), 1e4)
    k = torch.arange(100.0)[:, None].expand(1, 1, 100, 8)
    v = torch.randn(1, 1, 100, 8, generator=torch.Generator().manual_seed(0))
    output, *gradients = with_gradients(
        lambda x: packed(x, [100]), [t.requires_grad_() for t in (q, k.clone(), v)]
    )

    assert torch.equal(output.transpose(1, 2), v)
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_a_forked_child_computes_the_same(tier: str) -> None:
    """The library's threads do not live on in a child; it starts its own."""
    if tier == "reference":
        pytest.skip("torch's threads do not survive a fork")
    qkv = [x.detach() for x in inputs(150, 6, 3, torch.float32, 64)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        expected = packed(qkv, [70, 80]).numpy().tobytes()
        child = os.fork()
        if child == 0:  # where nothing of torch may use its own threads
            os._exit(0 if packed(qkv, [70, 80]).numpy().tobytes() == expected else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
