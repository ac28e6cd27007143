"""Attention over packed samples against each sample alone, and against one dense mask."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AttentionInterface

from qlora_trainer.modeling import attention
from qlora_trainer.modeling.attention import packed_attention

pytestmark = pytest.mark.process

SEGMENTS = {
    "one": [20],
    "several": [7, 1, 5, 4, 3],
    "single tokens": [1, 1, 1, 1],
    "single tokens around": [1, 9, 1],
    "longest last": [2, 3, 31],
}
HEADS = {"plain": (4, 4), "grouped": (6, 2), "one key head": (4, 1)}


def inputs(tokens: int, heads: int, key_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random query, key and value that need gradients."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(1, h, tokens, 8, generator=generator, dtype=dtype).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


def packed(qkv: list[Tensor], segments: list[int], **options: Any) -> Tensor:
    """Ours: (1, tokens, heads, head size)."""
    q, k, v = qkv
    return packed_attention(nn.Identity(), q, k, v, None, segment_lengths=segments, **options)[0]


def dense(qkv: list[Tensor], segments: list[int], window: int | None, scaling: float | None = None) -> Tensor:
    """The definition, with all scores and one mask over the whole row."""
    q, k, v = qkv
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    sample = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
    distance = torch.arange(len(sample))[:, None] - torch.arange(len(sample))[None, :]
    seen = (sample[:, None] == sample[None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    scores = q @ k.transpose(2, 3) * (scaling or 1 / math.sqrt(q.shape[-1]))
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
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
