"""What a row of samples holds, against samples written out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.collate import Batch, collate
from qlora_trainer.data.dataset import Samples

pytestmark = pytest.mark.process

Drawn = list[list[bool]]


def samples(parts: list[tuple[list[int], list[int]]]) -> Samples:
    """Samples of (ids, mask)."""
    offsets = np.cumsum([0] + [len(ids) for ids, _ in parts], dtype=np.int64)
    ids = np.concatenate([np.array(ids, dtype=np.int32) for ids, _ in parts])
    return Samples(ids, np.concatenate([np.array(mask, dtype=np.uint8) for _, mask in parts]), offsets)


SAMPLES = samples([([10, 11, 12], [0, 1, 1]), ([20, 21], [0, 1]), ([30, 31, 32, 33], [0, 0, 1, 0])])


@pytest.mark.parametrize(
    ("numbers", "ids", "positions", "lengths", "logit_positions", "targets"),
    [
        pytest.param([0], [10, 11, 12], [0, 1, 2], [3], [0, 1], [11, 12], id="one"),
        pytest.param(
            [0, 1], [10, 11, 12, 20, 21], [0, 1, 2, 0, 1], [3, 2], [0, 1, 3], [11, 12, 21], id="two"
        ),
        pytest.param(
            [2, 0],
            [30, 31, 32, 33, 10, 11, 12],
            [0, 1, 2, 3, 0, 1, 2],
            [4, 3],
            [1, 4, 5],
            [32, 11, 12],
            id="as given",
        ),
    ],
)
def test_samples_stand_side_by_side_in_a_row(
    numbers: list[int],
    ids: list[int],
    positions: list[int],
    lengths: list[int],
    logit_positions: list[int],
    targets: list[int],
) -> None:
    """Samples stand side by side in the order given; positions start anew; a position predicts the token after it."""
    batch = collate(SAMPLES, numbers)

    assert batch.ids.tolist() == ids
    assert batch.positions.tolist() == positions
    assert batch.lengths == lengths
    assert batch.logit_positions.tolist() == logit_positions
    assert batch.targets.tolist() == targets
    assert (batch.tokens, batch.padding, batch.supervised) == (len(ids), 0, len(targets))


@pytest.mark.parametrize(
    ("multiple", "padding"),
    [pytest.param(1, 0, id="none"), pytest.param(5, 0, id="whole"), pytest.param(64, 59, id="up")],
)
def test_padding_is_a_segment_of_its_own(multiple: int, padding: int) -> None:
    """A padded row holds the same samples; the padding is one more segment, and nothing is learnt from it."""
    plain, batch = collate(SAMPLES, [0, 1]), collate(SAMPLES, [0, 1], multiple)

    assert len(batch.ids) % multiple == 0
    assert batch.padding == padding
    assert batch.lengths == plain.lengths + [padding] * bool(padding)
    assert batch.tokens == plain.tokens
    assert batch.positions.tolist() == [*plain.positions.tolist(), *range(padding)]
    assert torch.equal(batch.ids[: plain.tokens], plain.ids)
    assert torch.equal(batch.logit_positions, plain.logit_positions)
    assert torch.equal(batch.targets, plain.targets)


def test_everything_is_int64() -> None:
    """The embedding and the loss index with int64, though samples are kept as int32."""
    batch = collate(SAMPLES, [0, 1])

    assert {t.dtype for t in (batch.ids, batch.positions, batch.logit_positions, batch.targets)} == {
        torch.int64
    }


def test_samples_are_not_changed() -> None:
    """A batch is a copy: writing to it leaves the data alone."""
    before = SAMPLES.digest()
    batch: Batch = collate(SAMPLES, [0])
    batch.ids.zero_()

    assert SAMPLES.digest() == before


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=8), min_size=1, max_size=6))
def test_every_target_is_predicted_by_the_token_before_it(drawn: Drawn) -> None:
    """Each supervised token appears once, predicted from its predecessor in its own sample; none is lost."""
    masks = [[0, *map(int, rest)] for rest in drawn]
    made = samples([(list(range(100 * i, 100 * i + len(m))), m) for i, m in enumerate(masks)])
    batch = collate(made, range(len(masks)))
    before = batch.ids[batch.logit_positions]

    assert torch.equal(batch.targets, before + 1)
    assert batch.targets.tolist() == [
        100 * i + j for i, m in enumerate(masks) for j, on in enumerate(m) if on
    ]
    assert batch.supervised == int(made.supervised_counts().sum())
    assert sum(batch.lengths) == batch.tokens == len(made.ids)
