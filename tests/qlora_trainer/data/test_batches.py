"""Rows as tokens, in one process or in several."""

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.run_config import Dataset
from qlora_trainer.data import batches, dataset
from qlora_trainer.data.batches import Workers, tokenize
from qlora_trainer.data.dataset import LoadedData, load
from qlora_trainer.data.readers import BadRow, Row
from qlora_trainer.data.records import interpret
from qlora_trainer.data.tokenization import Tokenization, TokenizationOptions
from qlora_trainer.errors import DataError, OutOfMemory

pytestmark = pytest.mark.process

DATASET = Dataset(source="pvc://claim/data", on_bad_record="skip", max_bad_share=0.5, eval_fraction=0.2)


@pytest.fixture
def tokenizer(byte_tokenizer: Callable[..., Any]) -> Any:
    """One token a byte, and EOS."""
    return byte_tokenizer()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of several kinds, good and bad, in a few dozen batches."""
    monkeypatch.setattr(batches, "BATCH_ROWS", 16)
    lines = []
    for number in range(600):
        said = "b<|im_end|>" if number % 50 == 7 else "b" * (number % 40 + 1)
        turns = [{"role": "user", "content": str(number)}, {"role": "assistant", "content": said}]
        lines.append("nonsense" if number % 60 == 9 else json.dumps({"messages": turns}))
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines))
    return path


def _loaded(path: Path, tokenizer: Any, workers: int, folder: Path | None = None) -> LoadedData:
    return load(DATASET, path, tokenizer, 64, folder=folder, workers=Workers(workers))


@pytest.mark.parametrize("in_files", [False, True], ids=["memory", "files"])
def test_processes_make_what_one_makes(data: Path, tokenizer: Any, tmp_path: Path, in_files: bool) -> None:
    """The same tokens, sides, counts and places, in the same order."""
    alone = _loaded(data, tokenizer, 1)
    several = _loaded(data, tokenizer, 3, tmp_path / "tokens" if in_files else None)

    assert alone.evaluation is not None
    assert several.evaluation is not None
    assert several.train.digest() == alone.train.digest()
    assert several.evaluation.digest() == alone.evaluation.digest()
    assert several.facts() == alone.facts()
    assert [bad.count for bad in alone.train_facts.bad] == [12, 10]
    assert several.template is not None


def test_work_is_really_shared(data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several processes this one tokenizes the first batch alone, before there are others."""
    monkeypatch.setattr(batches, "_run", partial(_told_by, os.getpid()))

    assert len(_loaded(data, tokenizer, 2).train) > 0


def _told_by(parent: int, batch: list[bytes]) -> Any:
    assert os.getpid() != parent
    assert batches._task is not None
    return batches._task(batch)


def test_a_request_to_stop_is_heeded_between_batches(data: Path, tokenizer: Any) -> None:
    """And no process is left behind."""

    class Stop(Exception):
        pass

    counted: list[int] = []

    def advance(amount: int) -> None:
        counted.append(amount)
        if sum(counted) > 100:
            raise Stop

    before = _own_children()
    with pytest.raises(Stop):
        load(DATASET, data, tokenizer, 64, TokenizationOptions(advance=advance), workers=Workers(2))
    assert sum(counted) < 200
    assert _own_children() <= before


def _own_children() -> set[int]:
    """Processes that multiprocessing has started here, of other tests as well; the dead ones are reaped by asking."""
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def _kill_once(batch: list[bytes]) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_out_of_memory(
    data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does it: nothing waits for it for ever."""
    monkeypatch.setattr(batches, "_run", _kill_once)

    with pytest.raises(OutOfMemory, match=r"raise topology\.memoryPerRank"):
        _loaded(data, tokenizer, 2)


@pytest.mark.slow
def test_the_process_that_reads_keeps_many_others_busy(tmp_path: Path, tokenizer: Any) -> None:
    """By processor time, whatever else the machine does: a record takes more than eight times as long to tokenize as to
    read, to send and to write, so eight processes on CPUs of their own are eight times as fast as one."""

    def seconds(records: int) -> tuple[float, float]:
        path = tmp_path / f"{records}.jsonl"
        turns = [{"role": role, "content": "It is so. " * 20} for role in ("user", "assistant") * 2]
        path.write_text(f"{json.dumps({'messages': turns})}\n" * records)
        before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        tokenizing = Dataset(source="pvc://claim/data", eval_fraction=0.0)
        load(tokenizing, path, tokenizer, 2048, folder=tmp_path / f"tokens-{records}", workers=Workers(2))
        after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own, others = (
            b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True)
        )
        return own, others

    few, many = seconds(1000), seconds(4000)  # the difference: without what it takes to begin

    assert many[1] - few[1] > 8 * (many[0] - few[0]), (few, many)


def test_what_no_record_can_help_ends_it_from_any_process(
    data: Path, byte_tokenizer: Callable[..., Any]
) -> None:
    """A model without a chat template, say."""
    with pytest.raises(DataError, match="has no chat template to write them"):
        _loaded(data, byte_tokenizer(None), 2)


def test_rows_are_read_a_little_ahead(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, memory holds a few batches: with processes as well."""
    monkeypatch.setattr(batches, "BATCH_ROWS", 10)
    read: list[int] = []

    def rows() -> Iterator[Row | BadRow]:
        for number in range(1000):
            read.append(number)
            yield Row("d", {"prompt": "a", "completion": str(number)})

    interpretation = partial(interpret, format="prompt-completion")
    for workers in (1, 2):
        read.clear()
        results = tokenize(rows(), interpretation, Tokenization(tokenizer, 64), Workers(workers))
        assert next(results).rows == 10
        assert len(read) <= 10 * (2 + workers * (batches.AHEAD + 1) + 1)
        assert sum(batch.rows for batch in results) == 990


def test_a_long_record_is_a_batch_of_its_own(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are bounded by bytes, too."""
    monkeypatch.setattr(batches, "BATCH_BYTES", 1000)
    rows = [Row("d", {"prompt": "a", "completion": "b" * size}) for size in (10, 10, 5000, 10, 10)]

    results = tokenize(iter(rows), partial(interpret, format="auto"), Tokenization(tokenizer, 64))

    assert [batch.rows for batch in results] == [2, 1, 2]


def test_the_first_rows_tell_the_format_of_all(tmp_path: Path, tokenizer: Any) -> None:
    """In whichever batch a record is, it is held against that format."""
    path = tmp_path / "d.jsonl"
    good = [json.dumps({"text": str(number)}) for number in range(600)]
    path.write_text("\n".join(["nonsense", *good, '{"prompt": "a", "completion": "b"}']))

    bad = dataset.load(DATASET, path, tokenizer, 64).train_facts.bad

    assert [each.reason for each in bad][1] == (
        "has no key 'text'; as the first record is in the text format, it must be {\"text\": ...}"
    )
