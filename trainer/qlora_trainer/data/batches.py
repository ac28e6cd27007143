"""Rows as tokens, a batch at a time: in this process, or in as many as there are cores, in the order of the rows.

Rows are read by one process, since a compressed file cannot be read in parts; what they mean, their text and their
tokens take 20 times as long, and are found by the others. These are forked, so they share the tokenizer; they keep
nothing, and end with the process that started them.
"""

import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.data.readers import BadRow, Row
from qlora_trainer.data.records import Chat, PromptCompletion, Record
from qlora_trainer.data.sources import Interpret
from qlora_trainer.data.tokenization import Sample, Tokenization
from qlora_trainer.errors import OutOfMemory
from qlora_trainer.host.process import die_with_parent

BATCH_ROWS = 256
BATCH_BYTES = 2**18
"""Rows of a batch, at most, and their bytes, but for one row that has more."""
BATCHES_ALONE = 4
"""Data of so few batches are tokenized before other processes would have been started."""
AHEAD = 2
"""Batches for each process that are read before they are needed."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """What became of a batch of rows, in their order."""

    ids: NDArray[np.int32]
    """Of the records in which there is something to learn, end to end."""
    mask: NDArray[np.uint8]
    """As ids."""
    lengths: NDArray[np.int64]
    """(good records,): tokens of each; 0: nothing is left to learn."""
    digests: NDArray[np.uint64]
    """(good records,): the first 64 bits of Record.digest."""
    truncated: NDArray[np.bool_]
    """(good records,): whether it was too long."""
    bad: tuple[BadRow, ...]
    chats: bool
    """Whether there is a conversation among the records."""
    raw: bool
    """Whether there are a prompt and a completion that are texts among them."""

    @property
    def rows(self) -> int:
        """How many rows there were."""
        return len(self.lengths) + len(self.bad)


@dataclass(frozen=True)
class Workers:
    """The processes that tokenize."""

    count: int = 1
    """1: this process alone."""
    cpus: Collection[int] = ()
    """Where they may run. Empty: where this process may."""


ALONE = Workers()


def tokenize(
    rows: Iterable[Row | BadRow],
    interpret: Interpret,
    tokenization: Tokenization,
    workers: Workers = ALONE,
) -> Iterator[TokenBatch]:
    """The rows' tokens, in their order. Memory holds a few batches.

    Args:
        rows: as readers give them.
        interpret: what they mean.
        tokenization: what makes tokens of that; its `advance` is called for each batch, and may raise.
        workers: which processes do the work.

    Raises:
        DataError, ModelError, ConfigurationError: see Tokenization.outcomes.
        OutOfMemory: a process was killed.
    """
    batches = _pickled(rows)
    task = _Task(interpret, tokenization)
    first = list(islice(batches, BATCHES_ALONE if workers.count > 1 else 0))
    work = chain(first, batches)
    advance = tokenization.options.advance
    alone = len(first) < BATCHES_ALONE
    with closing(
        _one_by_one(task, work) if alone else _in_processes(task, work, workers, advance)
    ) as results:
        for batch in results:
            advance(batch.rows)
            yield batch


def _one_by_one(task: "_Task", batches: Iterator[list[bytes]]) -> Generator[TokenBatch, None, None]:
    yield from map(task, batches)


def _pickled(rows: Iterable[Row | BadRow]) -> Iterator[list[bytes]]:
    """The rows in batches, each as bytes: so their size is known, and they are ready to be sent."""
    batch: list[bytes] = []
    size = 0
    for row in rows:
        data = pickle.dumps(
            (row.location, row.fields if isinstance(row, Row) else row.reason), pickle.HIGHEST_PROTOCOL
        )
        if batch and (len(batch) == BATCH_ROWS or size + len(data) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(data)
        size += len(data)
    if batch:
        yield batch


@dataclass(frozen=True)
class _Task:
    """A batch's rows -> their tokens."""

    interpret: Interpret
    tokenization: Tokenization

    def __call__(self, batch: Sequence[bytes]) -> TokenBatch:
        items = list(self.interpret(map(_row, batch)))
        records = [item for item in items if isinstance(item, Record)]
        outcomes = self.tokenization.outcomes(records)
        results = [next(outcomes) if isinstance(item, Record) else item for item in items]
        pairs = [
            (item, result)
            for item, result in zip(items, results, strict=True)
            if isinstance(item, Record) and isinstance(result, Sample)
        ]
        drops = self.tokenization.options.overlong == "drop"
        kept = [
            sample if sample.mask.any() and not (drops and sample.truncated) else None for _, sample in pairs
        ]
        return TokenBatch(
            _joined([sample.ids for sample in kept if sample], np.int32),
            _joined([sample.mask for sample in kept if sample], np.uint8),
            np.array([len(sample.ids) if sample else 0 for sample in kept], np.int64),
            np.array([int.from_bytes(record.digest[:8], "big") for record, _ in pairs], np.uint64),
            np.array([sample.truncated for _, sample in pairs], np.bool_),
            tuple(result for result in results if isinstance(result, BadRow)),
            any(isinstance(record.content, Chat) for record in records),
            any(isinstance(record.content, PromptCompletion) for record in records),
        )


def _row(data: bytes) -> Row | BadRow:
    location, content = pickle.loads(data)  # noqa: S301 - our own
    return BadRow(location, content) if isinstance(content, str) else Row(location, content)


def _joined(arrays: list[Any], dtype: type) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *arrays])


_task: _Task | None = None
"""What the processes inherit, which cannot be pickled."""


def _in_processes(
    task: _Task, batches: Iterator[list[bytes]], workers: Workers, advance: Callable[[int], None]
) -> Generator[TokenBatch, None, None]:
    global _task
    # The others inherit what this compiles and keeps: the chat template, and words that the tokenizer has met.
    yield task(next(batches))
    _task = task
    pool = ProcessPoolExecutor(
        workers.count,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(os.getpid(), tuple(workers.cpus)),
    )
    pending: deque[Future[TokenBatch]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_run, batch))
            advance(0)
            if len(pending) > AHEAD * workers.count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise OutOfMemory(
            "a process that tokenizes was killed, as happens when memory runs out: raise topology.memoryPerRank"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _task = None


def _begin(parent: int, cpus: Sequence[int]) -> None:
    """What a new process does first: end with its parent, and leave its parent's signals and CPUs."""
    if not die_with_parent(signal.SIGKILL, parent):
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if cpus:
        os.sched_setaffinity(0, cpus)


def _run(batch: list[bytes]) -> TokenBatch:
    assert _task is not None, "the process was forked for this task"
    return _task(batch)
