"""Which samples make up which bin, step and shard of a rank."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.run_config import Training
from qlora_trainer.data.packing import (
    WINDOW,
    MixPart,
    StepSchedule,
    bin_lengths,
    epoch_order,
    epoch_permutation,
    micro_batches,
    pack,
    shard,
    steps,
)

MAX = 32
LENGTHS = st.lists(st.integers(1, MAX), min_size=1, max_size=200).map(np.array)
SEEDS = st.integers(0, 2**32 - 1)


def _training(**fields: Any) -> Training:
    given_fields: dict[str, Any] = {"epochs": 2, "max_sequence_length": MAX, "global_batch_tokens": 2 * MAX}
    return Training(**{**given_fields, **fields})


def _naive_first_fit_decreasing(lengths: list[int], max_length: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        for samples in bins:
            if sum(lengths[other] for other in samples) + lengths[sample] <= max_length:
                samples.append(sample)
                break
        else:
            bins.append([sample])
    return bins


def test_an_order_never_changes() -> None:
    """The order of a seed and epoch is the same in every version: a resume depends on it."""
    assert epoch_permutation(8, seed=0, epoch=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_permutation(8, seed=4_294_967_295, epoch=3).tolist() == [6, 5, 7, 3, 4, 2, 1, 0]


@given(count=st.integers(0, 300), seed=SEEDS, epoch=st.integers(0, 10_000))
def test_an_order_has_each_sample_once(count: int, seed: int, epoch: int) -> None:
    """An order is a permutation."""
    assert sorted(epoch_permutation(count, seed, epoch).tolist()) == list(range(count))


def test_orders_differ_between_epochs_and_seeds() -> None:
    """Neither two epochs of a seed nor two seeds share their order."""
    orders = [tuple(epoch_permutation(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)]

    assert len(set(orders)) == 16


@given(lengths=LENGTHS, seed=SEEDS, packing=st.booleans())
def test_a_bin_holds_whole_samples_within_the_length(lengths: np.ndarray, seed: int, packing: bool) -> None:
    """Every sample is in exactly one bin, and no bin is longer than allowed."""
    bins = pack(lengths, epoch_permutation(len(lengths), seed, 0), MAX, packing)

    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert max(bin_lengths(bins, lengths)) <= MAX
    assert bin_lengths(bins, lengths) == [sum(lengths[b].tolist()) for b in bins]


@given(lengths=LENGTHS)
def test_packing_is_first_fit_decreasing(lengths: np.ndarray) -> None:
    """A window is packed exactly as a plain first-fit-decreasing does it."""
    bins = pack(lengths, np.arange(len(lengths)), MAX, packing=True)

    assert sorted(bins) == sorted(_naive_first_fit_decreasing(lengths.tolist(), MAX))


def test_windows_are_packed_apart() -> None:
    """A sample is never packed with one of another window."""
    lengths = np.full(2 * WINDOW + 5, 1)

    bins = pack(lengths, np.arange(len(lengths)), 1_000_000, packing=True)

    assert [len(samples) for samples in bins] == [WINDOW, WINDOW, 5]


def _pack_before_groups(
    lengths: np.ndarray, order: np.ndarray, max_length: int, packing: bool
) -> list[list[int]]:
    """The bins of the releases before samples had groups: a running job must find the same ones."""
    if not packing:
        return [[sample] for sample in order.tolist()]
    bins: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        found = _naive_first_fit_decreasing(lengths[window].tolist(), max_length)
        bins += [window[positions].tolist() for positions in sorted(found)]
    return bins


@given(lengths=LENGTHS, seed=SEEDS, packing=st.booleans())
def test_without_groups_the_bins_are_those_of_every_version(
    lengths: np.ndarray, seed: int, packing: bool
) -> None:
    """Without groups, and with a group for each sample, bins are exactly what they were, in the same order."""
    order = epoch_permutation(len(lengths), seed, 0)
    expected = _pack_before_groups(lengths, order, MAX, packing)

    assert pack(lengths, order, MAX, packing) == expected
    assert pack(lengths, order, MAX, packing, np.arange(len(lengths) + 1)) == expected


def test_bins_never_change() -> None:
    """The bins of a seed are the same in every version: a checkpoint's data position counts on it."""
    lengths = (np.arange(40) * 7919) % MAX + 1

    bins = pack(lengths, epoch_permutation(40, 3, 1), MAX, packing=True)

    assert bins[:5] == [[31, 3], [27, 7], [8, 26], [19, 15], [36, 30]]
    assert len(bins) == 22


GROUPS = st.lists(st.lists(st.integers(1, MAX // 3), min_size=1, max_size=3), min_size=1, max_size=60)


def _grouped(groups: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of all samples, and the groups' offsets."""
    return np.array([n for group in groups for n in group]), np.cumsum([0, *map(len, groups)])


@given(groups=GROUPS, seed=SEEDS, packing=st.booleans())
def test_the_samples_of_a_group_share_a_bin(groups: list[list[int]], seed: int, packing: bool) -> None:
    """A group is packed whole, its samples side by side in their order; every sample is in exactly one bin."""
    lengths, offsets = _grouped(groups)
    order = epoch_permutation(len(groups), seed, 0)

    bins = pack(lengths, order, MAX, packing, offsets)

    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert max(bin_lengths(bins, lengths)) <= MAX
    for first, stop in itertools.pairwise(offsets.tolist()):
        (home,) = [samples for samples in bins if first in samples]
        start = home.index(first)
        assert home[start : start + stop - first] == list(range(first, stop))
    assert packing or len(bins) == len(groups)


def test_a_group_longer_than_a_bin_is_refused() -> None:
    """Samples that belong together and do not fit together are an error, never torn apart."""
    with pytest.raises(ValueError, match="longer than 32 tokens"):
        pack(np.array([16, 17]), np.arange(1), MAX, packing=True, group_offsets=np.array([0, 2]))


@given(groups=GROUPS, seed=SEEDS, world_size=st.integers(1, 4), micro=st.integers(MAX, 3 * MAX))
def test_a_group_is_one_rank_s_and_one_micro_batch_s(
    groups: list[list[int]], seed: int, world_size: int, micro: int
) -> None:
    """Through steps, shards and micro-batches of a schedule, groups stay whole, and each epoch has all of them."""
    lengths, offsets = _grouped(groups)
    schedule = StepSchedule(lengths, _training(seed=seed, epochs=1), offsets)
    together: list[set[int]] = []
    for number in range(schedule.total_steps):
        step = schedule.step(number)
        for rank in range(world_size):
            mine = shard(step.bins, rank, world_size)
            together += [
                set(itertools.chain(*batch))
                for batch in micro_batches(mine, bin_lengths(mine, lengths), micro)
            ]

    for first, stop in itertools.pairwise(offsets.tolist()):
        assert [samples >= set(range(first, stop)) for samples in together].count(True) == 1
    assert sum(map(len, together)) == len(lengths)


def test_without_packing_a_bin_is_one_sample_in_shuffled_order() -> None:
    """Without packing the bins are the order itself."""
    shuffled = epoch_permutation(20, 7, 0)

    assert pack(np.full(20, 3), shuffled, MAX, packing=False) == [[sample] for sample in shuffled.tolist()]


def test_long_bins_do_not_come_first() -> None:
    """The bins of a window are shuffled, though the longest samples are packed first."""
    lengths = np.arange(1, 1001)
    bins = pack(lengths, epoch_permutation(1000, 0, 0), 1000, packing=True)
    longest = [max(lengths[samples].tolist()) for samples in bins]
    half = len(bins) // 2

    assert np.mean(longest[:half]) == pytest.approx(np.mean(longest[half:]), rel=0.05)


def test_a_sample_longer_than_a_bin_is_refused() -> None:
    """A sample that fits no bin is an error, never lost."""
    with pytest.raises(ValueError, match="longer than 32 tokens"):
        pack(np.array([3, 33]), np.arange(2), MAX, packing=True)


@given(tokens=st.lists(st.integers(1, MAX), max_size=100), budget=st.integers(MAX, 5 * MAX))
def test_a_step_is_the_longest_run_within_the_budget(tokens: list[int], budget: int) -> None:
    """Steps cover every bin once, in order, and none could take the next bin as well."""
    found = steps(tokens, budget)

    assert list(itertools.chain(*found)) == list(range(len(tokens)))
    for run in found:
        total = sum(tokens[i] for i in run)
        assert total <= budget
        assert run.stop == len(tokens) or total + tokens[run.stop] > budget


def test_a_bin_larger_than_a_step_is_refused() -> None:
    """A bin that fits no step is an error, never a step over its budget."""
    with pytest.raises(ValueError, match="larger than a step of 8 tokens"):
        steps([4, 9], 8)


@given(count=st.integers(0, 40), world_size=st.integers(1, 50))
def test_the_shards_of_all_ranks_make_up_the_step(count: int, world_size: int) -> None:
    """Each bin of a step goes to exactly one rank, as evenly as may be; a rank may get none."""
    shards = [shard(range(count), rank, world_size) for rank in range(world_size)]

    assert sorted(itertools.chain(*shards)) == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert all(i % world_size == rank for rank, mine in enumerate(shards) for i in mine)


@given(tokens=st.lists(st.integers(1, MAX), max_size=40), limit=st.integers(1, 3 * MAX))
def test_micro_batches_hold_the_limit_or_one_bin(tokens: list[int], limit: int) -> None:
    """A rank's bins are all run, in order; a group is over the limit only if it is a single bin."""
    groups = micro_batches(range(len(tokens)), tokens, limit)

    assert list(itertools.chain(*groups)) == list(range(len(tokens)))
    assert all(len(group) == 1 or sum(tokens[i] for i in group) <= limit for group in groups)


@given(lengths=LENGTHS, seed=SEEDS, packing=st.booleans())
def test_an_epoch_of_a_schedule_has_each_sample_once(lengths: np.ndarray, seed: int, packing: bool) -> None:
    """Over all steps, each epoch runs every sample exactly once, within the budget of a step."""
    schedule = StepSchedule(lengths, _training(seed=seed, packing=packing))
    seen: dict[int, list[int]] = {}
    for number in range(schedule.total_steps):
        step = schedule.step(number)
        seen.setdefault(step.epoch, []).extend(itertools.chain(*step.bins))
        assert sum(step.bin_tokens) <= 2 * MAX
        assert step.bin_tokens == bin_lengths(step.bins, lengths)

    assert sorted(seen) == [0, 1]
    assert all(sorted(samples) == list(range(len(lengths))) for samples in seen.values())


@given(lengths=LENGTHS, seed=SEEDS, data=st.data())
def test_a_schedule_starts_anywhere(lengths: np.ndarray, seed: int, data: st.DataObject) -> None:
    """A step asked for first is the one that a run from the start gets there."""
    settings = _training(seed=seed, epochs=None, max_steps=40)
    number = data.draw(st.integers(0, 39))
    walked = StepSchedule(lengths, settings)
    steps_walked = [walked.step(step) for step in range(40)]

    assert StepSchedule(lengths, settings).step(number) == steps_walked[number]
    assert walked.step(number) == steps_walked[number]


def test_max_steps_may_take_many_epochs() -> None:
    """With maxSteps the schedule goes on into as many epochs as it takes."""
    schedule = StepSchedule(np.full(4, MAX), _training(epochs=None, max_steps=7))

    assert schedule.total_steps == 7
    assert [schedule.step(step).epoch for step in range(7)] == [0, 0, 1, 1, 2, 2, 3]


def test_epochs_done_counts_with_the_fraction() -> None:
    """Epochs done grow from 0 to the number of epochs, by a step's share of its epoch."""
    schedule = StepSchedule(np.full(8, MAX), _training(epochs=2))

    assert [schedule.epochs_done(step) for step in range(9)] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]


@pytest.mark.parametrize("step", [-1, 8])
def test_a_step_beyond_the_schedule_is_refused(step: int) -> None:
    """Only the schedule's own steps can be asked for."""
    with pytest.raises(IndexError, match="not one of 8"):
        StepSchedule(np.full(8, MAX), _training(epochs=2)).step(step)


def test_a_schedule_without_samples_is_refused() -> None:
    """No samples make no endless schedule."""
    with pytest.raises(ValueError, match="no sample to train on"):
        StepSchedule(np.array([], dtype=np.int64), _training())


# --- several sources


def test_an_order_of_a_mix_never_changes() -> None:
    """A resume depends on it."""
    mix = [MixPart(4, 0.5), MixPart(3, 2)]

    assert epoch_order(7, seed=0, epoch=0, mix=mix).tolist() == [2, 6, 1, 6, 5, 4, 4, 5]
    assert epoch_order(7, seed=0, epoch=1, mix=mix).tolist() == [6, 4, 5, 6, 5, 3, 0, 4]


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    weights=st.lists(st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.25]), min_size=5, max_size=5),
    seed=SEEDS,
    epochs=st.integers(1, 12),
)
def test_a_weight_is_how_often_a_sample_is_seen_in_an_epoch(
    counts: list[int], weights: list[float], seed: int, epochs: int
) -> None:
    """After any number of epochs, every sample of a source was seen weight x epochs times, up to one."""
    mix = [MixPart(count, weight) for count, weight in zip(counts, weights, strict=False)]
    orders = [epoch_order(sum(counts), seed, epoch, mix) for epoch in range(epochs)]
    seen = np.bincount(np.concatenate(orders).astype(int), minlength=sum(counts))

    first = 0
    for part in mix:
        of_source = seen[first : first + part.count]
        wanted = part.weight * epochs
        assert all(np.floor(wanted) <= count <= np.ceil(wanted) for count in of_source.tolist())
        assert abs(of_source.sum() - part.count * wanted) < 1
        first += part.count


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=4), seed=SEEDS, epoch=st.integers(0, 99))
def test_sources_of_weight_one_are_one_after_the_other_in_one_file(
    counts: list[int], seed: int, epoch: int
) -> None:
    """They are put together, and shuffled as one."""
    mix = [MixPart(count, 1.0) for count in counts]

    assert epoch_order(sum(counts), seed, epoch, mix).tolist() == (
        epoch_permutation(sum(counts), seed, epoch).tolist()
    )


def test_sources_are_mixed_and_not_one_behind_the_other() -> None:
    """Each tenth of an epoch has of every source."""
    order = epoch_order(2000, 3, 0, [MixPart(1000, 0.5), MixPart(1000, 1.5)])
    shares = [(part < 1000).mean() for part in np.split(order, 10)]

    assert len(order) == 2000
    assert all(0.1 < share < 0.4 for share in shares)


def test_steps_have_what_the_weights_say() -> None:
    """A sample that is seen twice is in two places of the epoch's bins."""
    schedule = StepSchedule(np.full(6, 8), _training(epochs=1), mix=[MixPart(2, 0.5), MixPart(4, 2)])
    bins = [bin_ for number in range(schedule.total_steps) for bin_ in schedule.step(number).bins]
    seen = np.bincount(np.concatenate(bins), minlength=6).tolist()

    assert sorted(seen[:2]) == [0, 1]
    assert seen[2:] == [2, 2, 2, 2]
