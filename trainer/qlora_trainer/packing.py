"""Which samples make up which bin, step and rank's share: pure, and the same on every rank.

An epoch is one seeded order of all samples. Samples are packed into bins; a step
is a run of bins bounded by tokens, so neither the number of ranks nor the
micro-batch size changes what a step learns from.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from qlora_contract.run import Training

Integers = NDArray[np.int64]
Bin = list[int]
"""Numbers of the samples that share one sequence of at most maxSequenceLength tokens."""
T = TypeVar("T")

WINDOW = 1024
"""Shuffled samples that are packed together: enough to fill bins, few enough to stay shuffled."""


def order(count: int, seed: int, epoch: int) -> Integers:
    """The order of `count` samples in an epoch.

    Samples are sorted by raw 64-bit words of Philox keyed by (seed, epoch):
    numpy keeps a bit generator's words for ever, while it may change what
    Generator.permutation makes of them.
    """
    words = np.random.Philox(key=seed + (epoch << 64)).random_raw(count)
    return np.argsort(words, kind="stable")


def pack(lengths: Integers, order: Integers, max_length: int, packing: bool) -> list[Bin]:
    """Bins of whole samples, at most `max_length` tokens each; every sample of `order` once.

    First-fit-decreasing within windows of WINDOW samples of `order`; without
    `packing`, one sample a bin. The bins of a window stand in the order of their
    longest samples in `order`. That is a fair shuffle, since an order does not
    know of lengths; as packed, the longest samples would come first.
    """
    if len(order) and int(lengths[order].max()) > max_length:
        raise ValueError(f"a sample is longer than {max_length} tokens")
    if not packing:
        return [[sample] for sample in order.tolist()]
    bins: list[Bin] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        bins += [window[positions].tolist() for positions in _fit(lengths[window], max_length)]
    return bins


def _fit(lengths: Integers, max_length: int) -> list[list[int]]:
    """Positions of first-fit-decreasing bins, sorted by each bin's longest sample's position."""
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


def tokens_of(bins: Sequence[Bin], lengths: Integers) -> list[int]:
    """Tokens of each bin."""
    if not bins:
        return []
    starts = np.cumsum([0] + [len(samples) for samples in bins[:-1]])
    flat = np.concatenate([np.asarray(samples) for samples in bins])
    totals: list[int] = np.add.reduceat(lengths[flat].astype(np.int64), starts).tolist()
    return totals


def runs(tokens: Sequence[int], budget: int) -> list[range]:
    """The fewest runs of next items that total at most `budget` tokens each; one item at least."""
    ends = np.cumsum(tokens, dtype=np.int64)
    found: list[range] = []
    start, used = 0, 0
    while start < len(tokens):
        stop = max(start + 1, int(np.searchsorted(ends, used + budget, side="right")))
        found.append(range(start, stop))
        start, used = stop, int(ends[stop - 1])
    return found


def steps(bin_tokens: Sequence[int], global_batch_tokens: int) -> list[range]:
    """Which bins make up each step: the longest run of next bins within the budget.

    Every bin is in exactly one step; an epoch's tail is a shorter step.
    """
    if bin_tokens and max(bin_tokens) > global_batch_tokens:
        raise ValueError(f"a bin is larger than a step of {global_batch_tokens} tokens")
    return runs(bin_tokens, global_batch_tokens)


def rank_share(bins: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """What a rank runs of a step: bin i goes to rank i mod world_size. It may be none."""
    return bins[rank::world_size]


def micro_batches(bins: Sequence[T], bin_tokens: Sequence[int], micro_batch_tokens: int) -> list[Sequence[T]]:
    """A rank's bins in the groups that are run at once: at most `micro_batch_tokens`, one bin at least."""
    return [bins[run.start : run.stop] for run in runs(bin_tokens, micro_batch_tokens)]


@dataclass(frozen=True)
class Step:
    """What one optimiser step of all ranks learns from."""

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


class Plan:
    """Every step of a training, by its number from 0, so that a resume can start at any of them.

    Epochs are packed when they are asked for; one is kept. The number of steps
    of an epoch depends on its order, so a step of a later epoch needs the
    earlier ones counted once.
    """

    def __init__(self, lengths: NDArray[np.integer], training: Training) -> None:
        """`lengths`: tokens of each training sample, at most maxSequenceLength; at least one sample."""
        if not len(lengths):
            raise ValueError("there is no sample to train on")
        self._lengths = lengths.astype(np.int64)
        self._training = training
        self._first_steps = [0]
        self._kept = self._pack(0)
        self.total_steps = training.max_steps or self._count(training.epochs or 0)
        """Optimiser steps of the whole training."""

    def at(self, step: int) -> Step:
        """The step of this number."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is not one of {self.total_steps}")
        number = self._epoch_of(step)
        epoch = self._epoch(number)
        run = epoch.steps[step - self._first_steps[number]]
        span = slice(run.start, run.stop)
        return Step(number, epoch.bins[span], epoch.bin_tokens[span])

    def epochs_done(self, steps_done: int) -> float:
        """Epochs seen after so many steps, with the fraction of the current one in steps."""
        if steps_done <= 0:
            return 0.0
        number = self._epoch_of(steps_done - 1)
        first, following = self._first_steps[number : number + 2]
        return number + (steps_done - first) / (following - first)

    def _epoch_of(self, step: int) -> int:
        while self._first_steps[-1] <= step:
            self._count(len(self._first_steps))
        return bisect_right(self._first_steps, step) - 1

    def _count(self, epochs: int) -> int:
        """Steps of the first `epochs` epochs."""
        for number in range(len(self._first_steps) - 1, epochs):
            self._first_steps.append(self._first_steps[-1] + len(self._epoch(number).steps))
        return self._first_steps[epochs]

    def _epoch(self, number: int) -> _Epoch:
        if self._kept.number != number:
            self._kept = self._pack(number)
        return self._kept

    def _pack(self, number: int) -> _Epoch:
        training = self._training
        shuffled = order(len(self._lengths), training.seed, number)
        bins = pack(self._lengths, shuffled, training.max_sequence_length, training.packing)
        bin_tokens = tokens_of(bins, self._lengths)
        return _Epoch(number, bins, bin_tokens, steps(bin_tokens, training.global_batch_tokens))
