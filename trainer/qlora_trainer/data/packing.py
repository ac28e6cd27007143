"""Which samples make up which bin, step and shard of a rank: pure, and the same on every rank.

An epoch is one seeded permutation of all samples, or of all groups of samples where they have groups. They are packed
into bins; a step is a run of bins bounded by tokens, so neither the number of ranks nor the micro-batch size changes
what a step learns from. A bin is never cut: the samples of a group stand in one bin, and so in one micro-batch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from qlora_contract.run_config import Training

Integers = NDArray[np.int64]
Bin = list[int]
"""Numbers of the samples that share one sequence of at most maxSequenceLength tokens."""
T = TypeVar("T")

WINDOW = 1024
"""Shuffled samples that are packed together: enough to fill bins, few enough to stay shuffled."""


def epoch_permutation(count: int, seed: int, epoch: int) -> Integers:
    """The order of `count` samples, or groups, in an epoch.

    They are sorted by raw 64-bit words of Philox keyed by (seed, epoch):
    numpy keeps a bit generator's words for ever, while it may change what
    Generator.permutation makes of them.
    """
    words = np.random.Philox(key=seed + (epoch << 64)).random_raw(count)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class MixPart:
    """One source of several, whose samples (or groups) stand side by side."""

    count: int
    """Samples, or groups."""
    weight: float
    """How often each of them is in an epoch, on average."""


MIX_STREAM = 1 << 63
"""Above every number of an epoch: what decides which part of a source an epoch has, for source 0, 1, ... of a mix."""


def epoch_order(count: int, seed: int, epoch: int, mix: Sequence[MixPart] = ()) -> Integers:
    """The samples, or groups, of an epoch in their order; with a mix some may be in it twice, or not at all.

    Each source is an endless repetition of its entries, shuffled once by the seed. An epoch takes the next
    count x weight of them, so all have been taken equally often, up to one, after any number of epochs, and exactly
    `weight` times an epoch where that is whole. What is taken is then shuffled as a whole, anew in each epoch.

    Args:
        count: of all of them.
        seed: of the training.
        epoch: from 0.
        mix: the sources; without any, or with weights of 1, every entry is in the epoch once.
    """
    if all(part.weight == 1 for part in mix):
        return epoch_permutation(count, seed, epoch)
    taken, first = [], 0
    for number, part in enumerate(mix):
        start, stop = (int(n * part.count * part.weight + MIX_ROUNDING) for n in (epoch, epoch + 1))
        own = epoch_permutation(part.count, seed, MIX_STREAM + number)
        taken.append(first + (own[np.arange(start, stop) % part.count] if part.count else own))
        first += part.count
    entries = np.concatenate(taken)
    return entries[epoch_permutation(len(entries), seed, epoch)]


MIX_ROUNDING = 1e-6
"""Products such as 10 x 0.1 x 3 fall short of whole numbers by less."""


def pack(
    lengths: Integers,
    order: Integers,
    max_length: int,
    packing: bool,
    group_offsets: Integers | None = None,
) -> list[Bin]:
    """Bins of whole samples, at most `max_length` tokens each; every sample of `order` once.

    First-fit-decreasing within windows of WINDOW entries of `order`; without
    `packing`, one entry a bin. The bins of a window stand in the order of their
    longest entries in `order`. That is a fair shuffle, since an order does not
    know of lengths; as packed, the longest would come first.

    Args:
        lengths: (samples,) tokens of each sample.
        order: numbers of samples; with `group_offsets`, numbers of groups.
        max_length: tokens of a bin, at most.
        packing: whether entries may share a bin.
        group_offsets: (groups + 1,) as Samples has them: a group's samples stand in one bin, side by side.
    """
    if group_offsets is not None:
        of_groups = np.add.reduceat(lengths, group_offsets[:-1])
        bins = pack(of_groups, order, max_length, packing)
        bounds = group_offsets.tolist()
        return [[n for group in bin_ for n in range(*bounds[group : group + 2])] for bin_ in bins]
    if len(order) and int(lengths[order].max()) > max_length:
        raise ValueError(f"a sample or group is longer than {max_length} tokens")
    if not packing:
        return [[number] for number in order.tolist()]
    bins = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        bins += [
            window[positions].tolist() for positions in first_fit_decreasing(lengths[window], max_length)
        ]
    return bins


def first_fit_decreasing(lengths: Integers, max_length: int) -> list[list[int]]:
    """Bins of positions in `lengths`, sorted by each bin's first position, which is its longest entry's."""
    longest_first = np.argsort(-lengths, kind="stable")
    free = np.full(len(lengths), max_length)
    bins: list[list[int]] = []
    for position, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        # One comparison over at most WINDOW bins is faster here than a search tree in Python.
        first = int((free[: len(bins) + 1] >= length).argmax())
        free[first] -= length
        if first == len(bins):
            bins.append([])
        bins[first].append(position)
    return sorted(bins)


def bin_lengths(bins: Sequence[Bin], lengths: Integers) -> list[int]:
    """Tokens of each bin."""
    if not bins:
        return []
    starts = np.cumsum([0] + [len(samples) for samples in bins[:-1]])
    flat = np.concatenate([np.asarray(samples) for samples in bins])
    totals: list[int] = np.add.reduceat(lengths[flat].astype(np.int64), starts).tolist()
    return totals


def partition_by_budget(tokens: Sequence[int], budget: int) -> list[range]:
    """The fewest runs of consecutive items that total at most `budget` tokens each; one item at least."""
    ends = np.cumsum(tokens, dtype=np.int64)
    runs: list[range] = []
    start, used = 0, 0
    while start < len(tokens):
        stop = max(start + 1, int(np.searchsorted(ends, used + budget, side="right")))
        runs.append(range(start, stop))
        start, used = stop, int(ends[stop - 1])
    return runs


def steps(bin_tokens: Sequence[int], global_batch_tokens: int) -> list[range]:
    """Which bins make up each step: the longest run of next bins within the budget.

    Every bin is in exactly one step; an epoch's tail is a shorter step.
    """
    if bin_tokens and max(bin_tokens) > global_batch_tokens:
        raise ValueError(f"a bin is larger than a step of {global_batch_tokens} tokens")
    return partition_by_budget(bin_tokens, global_batch_tokens)


def shard(bins: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """What a rank runs of a step: bin i goes to rank i mod world_size. It may be none."""
    return bins[rank::world_size]


def micro_batches(bins: Sequence[T], bin_tokens: Sequence[int], micro_batch_tokens: int) -> list[Sequence[T]]:
    """A rank's bins in the groups that are run at once: at most `micro_batch_tokens`, one bin at least."""
    return [bins[run.start : run.stop] for run in partition_by_budget(bin_tokens, micro_batch_tokens)]


@dataclass(frozen=True)
class Step:
    """What one optimizer step of all ranks learns from."""

    epoch: int
    """From 0."""
    bins: list[Bin]
    bin_tokens: list[int]
    """Tokens of each bin."""


@dataclass(frozen=True)
class _Epoch:
    number: int
    bins: list[Bin]
    bin_tokens: list[int]
    steps: list[range]


class StepSchedule:
    """Every step of a training, by its number from 0, so that a resume can start at any of them.

    Epochs are packed when they are asked for; one is kept. The number of steps
    of an epoch depends on its order, so a step of a later epoch needs the
    earlier ones counted once.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        training: Training,
        group_offsets: NDArray[np.integer] | None = None,
        mix: Sequence[MixPart] = (),
    ) -> None:
        """Plan a training on at least one sample.

        Args:
            lengths: (samples,) tokens of each sample; a sample or group has at most maxSequenceLength.
            training: the job's settings.
            group_offsets: as Samples has them.
            mix: the sources of the samples, if there are several.
        """
        if not len(lengths):
            raise ValueError("there is no sample to train on")
        self._lengths = lengths.astype(np.int64)
        self._group_offsets = None if group_offsets is None else group_offsets.astype(np.int64)
        self._training = training
        self._mix = tuple(mix)
        self._first_steps = [0]
        self._cached_epoch = self._pack(0)
        self.total_steps = training.max_steps or self._count_steps(training.epochs or 0)
        """Optimizer steps of the whole training."""

    def first_epoch(self) -> tuple[list[int], int]:
        """(tokens of each of its bins, how many steps they make)."""
        epoch = self._epoch(0)
        return epoch.bin_tokens, len(epoch.steps)

    def step(self, number: int) -> Step:
        """The step of this number. Raises IndexError."""
        if not 0 <= number < self.total_steps:
            raise IndexError(f"step {number} is not one of {self.total_steps}")
        epoch_number = self._epoch_of(number)
        epoch = self._epoch(epoch_number)
        run = epoch.steps[number - self._first_steps[epoch_number]]
        span = slice(run.start, run.stop)
        return Step(epoch_number, epoch.bins[span], epoch.bin_tokens[span])

    def epochs_done(self, steps_done: int) -> float:
        """Epochs seen after so many steps, with the fraction of the current one in steps."""
        if steps_done <= 0:
            return 0.0
        number = self._epoch_of(steps_done - 1)
        first, following = self._first_steps[number : number + 2]
        return number + (steps_done - first) / (following - first)

    def _epoch_of(self, step: int) -> int:
        while self._first_steps[-1] <= step:
            self._count_steps(len(self._first_steps))
        return bisect_right(self._first_steps, step) - 1

    def _count_steps(self, epochs: int) -> int:
        """Steps of the first `epochs` epochs."""
        for number in range(len(self._first_steps) - 1, epochs):
            self._first_steps.append(self._first_steps[-1] + len(self._epoch(number).steps))
        return self._first_steps[epochs]

    def _epoch(self, number: int) -> _Epoch:
        if self._cached_epoch.number != number:
            self._cached_epoch = self._pack(number)
        return self._cached_epoch

    def _pack(self, number: int) -> _Epoch:
        training, groups = self._training, self._group_offsets
        count = len(self._lengths) if groups is None else len(groups) - 1
        order = epoch_order(count, training.seed, number, self._mix)
        bins = pack(self._lengths, order, training.max_sequence_length, training.packing, groups)
        bin_tokens = bin_lengths(bins, self._lengths)
        return _Epoch(number, bins, bin_tokens, steps(bin_tokens, training.global_batch_tokens))
