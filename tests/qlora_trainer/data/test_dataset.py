"""The training and evaluation samples of a dataset."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_contract.containers import CONTAINERS
from qlora_contract.plan import BadRecords, LengthBin
from qlora_contract.run_config import Columns, Dataset
from qlora_trainer.data import bad_records
from qlora_trainer.data.dataset import Facts, LoadedData, Samples, load
from qlora_trainer.data.records import PromptCompletion, Record, content_digest
from qlora_trainer.data.tokenization import TokenizationOptions
from qlora_trainer.errors import ConfigurationError, DataError

pytestmark = pytest.mark.process

Make = Callable[..., Any]


def _dataset(**fields: Any) -> Dataset:
    return Dataset(source="pvc://claim/data", **fields)


def _refuse(path: Path, tokenizer: Any, **fields: Any) -> str:
    """Why a file is refused."""
    with pytest.raises(DataError) as caught:
        load(_dataset(**{"eval_fraction": 0.0} | fields), path, tokenizer, 100)
    return str(caught.value)


def _write(path: Path, *records: tuple[str, str]) -> Path:
    lines = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in records)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def _numbered(count: int) -> list[tuple[str, str]]:
    return [("n=", str(i)) for i in range(count)]


def _texts(samples: Samples | None, tokenizer: Any) -> list[str]:
    assert samples is not None
    return [tokenizer.decode(samples.sample(i)[0]) for i in range(len(samples))]


@pytest.fixture
def tokenizer(byte_tokenizer: Make) -> Any:
    """One token a byte, and EOS."""
    return byte_tokenizer()


def test_samples_stand_end_to_end(tmp_path: Path, tokenizer: Any) -> None:
    """Samples keep the file's order; lengths and targets are counted per sample."""
    path = _write(tmp_path / "d.jsonl", ("ab", "c"), ("", "de"))

    samples = load(_dataset(eval_fraction=0.0), path, tokenizer, 100).train

    assert len(samples) == 2
    assert samples.lengths().tolist() == [4, 3]
    assert samples.supervised_counts().tolist() == [2, 2]
    assert [samples.sample(i)[1].tolist() for i in range(2)] == [[0, 0, 1, 1], [0, 1, 1]]
    assert _texts(samples, tokenizer) == ["abc<|im_end|>", "de<|im_end|>"]
    assert (samples.ids.dtype, samples.mask.dtype, samples.offsets.dtype) == (np.int32, np.uint8, np.int64)


def test_a_fraction_is_held_out(tmp_path: Path, tokenizer: Any) -> None:
    """Every record is trained on or held out, about evalFraction of them the latter."""
    loaded = load(_dataset(eval_fraction=0.2), _write(tmp_path / "d.jsonl", *_numbered(500)), tokenizer, 100)
    train, held_out = _texts(loaded.train, tokenizer), _texts(loaded.evaluation, tokenizer)

    assert sorted(train + held_out) == sorted(f"n={i}<|im_end|>" for i in range(500))
    assert 70 <= len(held_out) <= 130


def test_what_is_held_out_does_not_depend_on_the_file(tmp_path: Path, tokenizer: Any) -> None:
    """Order and other records never move a record to the other side, and copies stay together."""
    records = _numbered(200)
    files = [
        _write(tmp_path / "a.jsonl", *records),
        _write(tmp_path / "b.jsonl", *reversed(records), ("new", "one"), *records[:50]),
    ]

    first, second = (load(_dataset(eval_fraction=0.3), path, tokenizer, 100) for path in files)

    assert set(_texts(first.evaluation, tokenizer)) <= set(_texts(second.evaluation, tokenizer))
    assert not set(_texts(second.train, tokenizer)) & set(_texts(second.evaluation, tokenizer))


def test_without_a_fraction_nothing_is_evaluated(tmp_path: Path, tokenizer: Any) -> None:
    """evalFraction 0 trains on everything."""
    loaded = load(_dataset(eval_fraction=0.0), _write(tmp_path / "d.jsonl", *_numbered(9)), tokenizer, 100)

    assert (len(loaded.train), loaded.evaluation, loaded.evaluation_facts) == (9, None, None)


def test_a_folder_holds_splits(tmp_path: Path, tokenizer: Any) -> None:
    """In a folder, split S is S.jsonl; with an evalSplit no training record is held out."""
    _write(tmp_path / "train.jsonl", *_numbered(30))
    _write(tmp_path / "test.jsonl", ("a", "b"))

    loaded = load(_dataset(eval_split="test"), tmp_path, tokenizer, 100)

    assert len(loaded.train) == 30
    assert _texts(loaded.evaluation, tokenizer) == ["ab<|im_end|>"]


def test_a_split_of_a_folder_is_named(tmp_path: Path, tokenizer: Any) -> None:
    """trainSplit names the file to train on."""
    _write(tmp_path / "sft.v2.jsonl", ("a", "b"))

    loaded = load(_dataset(train_split="sft.v2", eval_fraction=0.0), tmp_path, tokenizer, 100)

    assert _texts(loaded.train, tokenizer) == ["ab<|im_end|>"]


def test_records_that_cannot_be_used_are_named_where_too_few_are_left(tmp_path: Path, tokenizer: Any) -> None:
    """They may be why there are too few."""
    path = _write(tmp_path / "d.jsonl", ("a", "b"))
    path.write_text(path.read_text() + "{\n")

    with pytest.raises(
        DataError,
        match=r"can hold out none: .*; beside it 1 cannot be used, the first at d\.jsonl: line 2: .*JSON",
    ):
        load(_dataset(eval_fraction=0.5, on_bad_record="skip", max_bad_share=0.9), path, tokenizer, 100)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"train_split": "sft"}, DataError, r"has no split 'sft' \(sft with .*\); its splits: other, train"),
        (
            {"eval_split": "test"},
            DataError,
            r"has no split 'test' \(test with .*\); its splits: other, train",
        ),
        ({"eval_split": "train"}, ConfigurationError, "evalSplit is the split that is trained on, 'train'"),
        (
            {},
            DataError,
            r"has 1 record, so evalFraction 0\.05 can hold out none: give more, name an evalSplit",
        ),
    ],
    ids=["train", "eval", "same", "none-held-out"],
)
def test_a_folder_that_does_not_fit_is_named(
    tmp_path: Path, tokenizer: Any, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A split that is missing, or of no use, is an error that says what would be right."""
    for name in ("train", "other"):
        _write(tmp_path / f"{name}.jsonl", ("n=", "1"))

    with pytest.raises(error, match=message):
        load(_dataset(**fields), tmp_path, tokenizer, 100)


def test_a_file_has_no_splits(tmp_path: Path, tokenizer: Any) -> None:
    """evalSplit with a single file is an error that says what would be right."""
    path = _write(tmp_path / "d.jsonl", ("a", "b"))

    with pytest.raises(
        ConfigurationError, match=r"evalSplit needs a folder of splits, but .*d\.jsonl is a file"
    ):
        load(_dataset(eval_split="test"), path, tokenizer, 100)


def test_a_missing_source_is_named(tmp_path: Path, tokenizer: Any) -> None:
    """A source that is not there is named."""
    with pytest.raises(
        DataError,
        match=r"gone: no such file; dataset\.source is a file \(JSONL, JSON, CSV, .*\), or a folder of them",
    ):
        load(_dataset(), tmp_path / "gone", tokenizer, 100)


@pytest.mark.parametrize("in_files", [False, True], ids=["memory", "files"])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
def test_each_side_has_a_record_where_there_are_two(
    tmp_path: Path, tokenizer: Any, fraction: float, in_files: bool
) -> None:
    """However few there are: the lowest key is held out, or the highest trained on. Copies stay together."""
    for seed in range(20):
        records = [(f"{seed}", str(i)) for i in range(2 + seed % 4)]
        path = _write(tmp_path / "d.jsonl", *records * 2)
        keys = {
            f"{prompt}{text}<|im_end|>": Record(
                "", (c := PromptCompletion(prompt, text)), content_digest(c)
            ).split_key
            for prompt, text in records
        }

        loaded = load(
            _dataset(eval_fraction=fraction),
            path,
            tokenizer,
            100,
            folder=tmp_path / f"{seed}" if in_files else None,
        )
        train, held_out = _texts(loaded.train, tokenizer), _texts(loaded.evaluation, tokenizer)

        assert sorted(train + held_out) == sorted([*keys] * 2)
        assert not set(train) & set(held_out)
        assert max(keys[text] for text in held_out) < min(keys[text] for text in train)
        assert loaded.evaluation_facts is not None
        assert (loaded.train_facts.records, loaded.evaluation_facts.records) == (len(train), len(held_out))


def test_copies_of_one_record_cannot_be_on_both_sides(tmp_path: Path, tokenizer: Any) -> None:
    """What is trained on shows nothing when it is evaluated on."""
    path = _write(tmp_path / "d.jsonl", *[("a", "b")] * 3)

    with pytest.raises(
        DataError, match=r"has 3 records, all the same, so evalFraction 0\.5 can hold out none"
    ):
        load(_dataset(eval_fraction=0.5), path, tokenizer, 100)


def test_cut_and_dropped_samples_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    """A sample that loses its end is counted, and dropped when nothing is left to learn."""
    path = _write(tmp_path / "d.jsonl", ("abcdefghij", "k"), ("ab", "cdefghijkl"), ("a", "b"))

    loaded = load(_dataset(eval_fraction=0.0), path, tokenizer, 8)

    lengths = (LengthBin(up_to=4, count=1), LengthBin(up_to=8, count=1))
    assert loaded.train_facts == Facts(
        records=3, truncated=2, dropped=1, format="prompt-completion", lengths=lengths, raw=True
    )
    assert _texts(loaded.train, tokenizer) == ["abcdefgh", "ab<|im_end|>"]
    assert loaded.train.supervised_counts().min() > 0


def test_samples_that_are_too_long_may_be_left_out(tmp_path: Path, tokenizer: Any) -> None:
    """All of them, not only those in which nothing is left to learn; they are counted."""
    path = _write(tmp_path / "d.jsonl", ("abcdefghij", "k"), ("ab", "cdefghijkl"), ("a", "b"))

    options = TokenizationOptions(overlong="drop")
    loaded = load(_dataset(eval_fraction=0.0), path, tokenizer, 8, options)

    facts = loaded.train_facts
    assert (facts.records, facts.truncated, facts.dropped, facts.overlong) == (3, 0, 2, 2)
    assert _texts(loaded.train, tokenizer) == ["ab<|im_end|>"]
    assert facts.summary().endswith("; 2 left out, because they are longer than maxSequenceLength")
    with pytest.raises(DataError, match="all 3 records are left out"):
        load(_dataset(eval_fraction=0.0), path, tokenizer, 2, options)


def test_a_sample_that_is_too_long_may_be_a_bad_record(tmp_path: Path, tokenizer: Any) -> None:
    """Which ends the job, or is left out as others are."""
    path = _write(tmp_path / "d.jsonl", ("a", "b"), ("ab", "cdefghijkl"))
    options = TokenizationOptions(overlong="error")

    with pytest.raises(
        DataError, match=r"^d\.jsonl: line 2: is longer than training\.maxSequenceLength, 8 tokens"
    ):
        load(_dataset(eval_fraction=0.0), path, tokenizer, 8, options)
    skip = _dataset(eval_fraction=0.0, on_bad_record="skip", max_bad_share=0.5)
    assert load(skip, path, tokenizer, 8, options).train_facts.bad[0].places == ["d.jsonl: line 2"]


def test_what_is_lost_is_told(tmp_path: Path, tokenizer: Any) -> None:
    """In one line for the log, and as training_report.json has it; nothing is said where nothing is lost."""
    path = tmp_path / "d.jsonl"
    _write(path, ("abcdefghij", "k"), ("ab", "cdefghijkl"), ("a", "b"))
    whole = load(_dataset(eval_fraction=0.0), path, tokenizer, 100).train_facts
    path.write_text(path.read_text() + "{}\n")
    cut = load(
        _dataset(eval_fraction=0.0, on_bad_record="skip", max_bad_share=0.5), path, tokenizer, 8
    ).facts()

    assert (whole.lost, whole.summary()) == (False, "3 records in the prompt-completion format")
    said = cut["training"].summary()
    assert cut["training"].lost
    assert (
        "format; 2 truncated to maxSequenceLength, 1 of them dropped, because that left nothing to train on; 1"
        in said
    )
    assert said.endswith(" (d.jsonl: line 4)")
    assert "; 1 bad records left out: 1 has no key 'prompt'" in said
    report = cut["training"].report()
    assert json.loads(json.dumps(report)) == report
    assert (report["records"], report["truncated"], report["dropped"]) == (3, 2, 1)
    assert report["bad"][0]["places"] == ["d.jsonl: line 4"]


def test_a_label_that_is_not_learned_is_told_in_the_same_line(tmp_path: Path, tokenizer: Any) -> None:
    """For the log, `qlora run` and the condition of a cluster: in the words of `qlora check`."""
    path = tmp_path / "d.csv"
    path.write_text("text,label\ngood,yes\nbad,no\n")
    facts = load(_dataset(eval_fraction=0.5), path, tokenizer, 100).facts()

    assert facts["training"].lost
    assert "; the column label is not learned" in facts["training"].summary()
    assert "label" not in facts["evaluation"].summary()
    assert Facts.of_report(facts["training"].report()) == facts["training"]


def test_data_without_anything_to_learn_are_an_error(tmp_path: Path, tokenizer: Any) -> None:
    """When every sample is dropped, the error says why and what to change."""
    path = _write(tmp_path / "d.jsonl", ("abcdefghij", "k"))

    with pytest.raises(
        DataError, match=r"no supervised token in the training data: all 1 records .* raise it"
    ):
        load(_dataset(eval_fraction=0.0), path, tokenizer, 8)


def test_the_digest_is_what_sha256sum_prints(tmp_path: Path, tokenizer: Any) -> None:
    """The dataset's sha256 can be checked with sha256sum, for a file and for two splits."""
    _write(tmp_path / "train.jsonl", *_numbered(9))
    _write(tmp_path / "test.jsonl", ("a", "b"))
    listing = subprocess.check_output(["sha256sum", "train.jsonl", "test.jsonl"], cwd=tmp_path)

    one = load(_dataset(eval_fraction=0.0), tmp_path, tokenizer, 100)
    both = load(_dataset(eval_split="test"), tmp_path, tokenizer, 100)

    assert one.sha256 == listing.decode().split()[0]
    assert both.sha256 == hashlib.sha256(listing).hexdigest()


def test_samples_have_a_digest_of_their_own(tmp_path: Path, tokenizer: Any) -> None:
    """Equal samples have equal digests; another token, target or cut gives another."""

    def digest(*records: tuple[str, str]) -> str:
        loaded: LoadedData = load(
            _dataset(eval_fraction=0.0), _write(tmp_path / "d.jsonl", *records), tokenizer, 100
        )
        return loaded.train.digest()

    variants = [(("a", "bc"),), (("ab", "c"),), (("a", "bd"),), (("a", "bc"), ("a", "bc"))]

    assert digest(("a", "bc")) == digest(("a", "bc"))
    assert len({digest(*records) for records in variants}) == len(variants)


def _write_parquet(path: Path, *records: tuple[str, str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def test_the_container_changes_nothing_that_is_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    """The same records give the same samples and the same held-out ones from any file, or from several."""
    records = _numbered(60)
    _write(tmp_path / "d.jsonl", *records)
    _write_parquet(tmp_path / "d.parquet", *records)
    (tmp_path / "d.json").write_text(
        json.dumps([{"prompt": p, "completion": c} for p, c in records], indent=2)
    )
    (tmp_path / "d.csv").write_text(
        "completion,prompt\n" + "".join(f"{text},{prompt}\n" for prompt, text in records)
    )
    for part in range(3):
        _write_parquet(
            tmp_path / f"hub/data/train-0000{part}-of-00003.parquet", *records[20 * part : 20 * part + 20]
        )

    loaded = [
        load(_dataset(eval_fraction=0.2), tmp_path / name, tokenizer, 100)
        for name in ("d.jsonl", "d.parquet", "d.json", "d.csv", "hub")
    ]

    assert len({data.train.digest() for data in loaded}) == 1
    assert len({data.evaluation.digest() for data in loaded if data.evaluation is not None}) == 1
    assert len({data.sha256 for data in loaded}) == len(loaded)


def test_a_folder_may_hold_splits_in_any_container(tmp_path: Path, tokenizer: Any) -> None:
    """Each split is read by its own reader."""
    _write(tmp_path / "train.jsonl", *_numbered(9))
    (tmp_path / "test.csv").write_text("prompt,completion\na,b\n")

    loaded = load(_dataset(eval_split="test"), tmp_path, tokenizer, 100)

    assert (len(loaded.train), _texts(loaded.evaluation, tokenizer)) == (9, ["ab<|im_end|>"])


def test_the_card_of_a_folder_says_which_files_a_split_has(tmp_path: Path, tokenizer: Any) -> None:
    """As on the Hub."""
    _write(tmp_path / "raw.jsonl", *_numbered(3))
    _write(tmp_path / "clean.jsonl", ("a", "b"))
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: clean.jsonl\n---\n"
    )
    (tmp_path / "README.md").write_text(card)

    loaded = load(_dataset(eval_fraction=0.0), tmp_path, tokenizer, 100)

    assert _texts(loaded.train, tokenizer) == ["ab<|im_end|>"]


def test_what_the_datasets_library_saves_is_read(tmp_path: Path, tokenizer: Any) -> None:
    """A folder with state.json and Arrow files; or a folder of these, one for each split."""
    import pyarrow as pa

    for split, records in (("train", _numbered(9)), ("test", [("a", "b")])):
        table = pa.Table.from_pylist([{"prompt": prompt, "completion": text} for prompt, text in records])
        (tmp_path / split).mkdir()
        for name in ("data-00000-of-00001.arrow", "cache-0123456789abcdef.arrow"):
            with pa.ipc.new_stream(tmp_path / split / name, table.schema) as writer:
                writer.write_table(table)
        (tmp_path / split / "state.json").write_text("{}")
        (tmp_path / split / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')

    both = load(_dataset(eval_split="test"), tmp_path, tokenizer, 100)
    one = load(_dataset(eval_fraction=0.0), tmp_path / "train", tokenizer, 100)

    assert (len(both.train), _texts(both.evaluation, tokenizer)) == (9, ["ab<|im_end|>"])
    assert both.train.digest() == one.train.digest()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.csv", "prompt,completion\na,b\na,\n", r"^d\.csv: row 3: completion is blank"),
        ("d.csv", "foo,bar\na,b\n", r"^d\.csv: row 2: fits no format \(its columns: foo, bar\)"),
        (
            "d.csv",
            "prompt,completion\n",
            r"d\.csv: holds no record; a line of column names and a row per record",
        ),
        (
            "gone",
            None,
            r"gone: no such file; dataset\.source is a file \(JSONL, JSON, CSV, .*\), or a folder",
        ),
        (".", None, r"has no split 'train' \(train with .*\); its splits: none"),
    ],
    ids=["record", "format", "empty", "missing", "no-split"],
)
def test_errors_name_a_place_in_any_container(
    tmp_path: Path, tokenizer: Any, name: str, text: str | None, message: str
) -> None:
    """What a record means is checked alike whatever it came from; the location is its reader's."""
    if text is not None:
        (tmp_path / name).write_text(text)

    with pytest.raises(DataError, match=message):
        load(_dataset(eval_fraction=0.0), tmp_path / name, tokenizer, 100)


def test_a_split_that_is_there_twice_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    """Which of two files is meant cannot be known."""
    for suffix in CONTAINERS:
        (tmp_path / f"train{suffix}").touch()

    with pytest.raises(DataError, match=r"has split 'train' more than once \(train\.arrow and train\.csv"):
        load(_dataset(), tmp_path, tokenizer, 100)


BAD = '{"prompt": 1, "completion": "hunter2"}'


def _with_bad(path: Path, good: int, *bad: str) -> Path:
    lines = [json.dumps({"prompt": "n=", "completion": str(i)}) for i in range(good)]
    path.write_text("\n".join([*bad, *lines]))
    return path


def test_bad_records_are_told_together(tmp_path: Path, tokenizer: Any) -> None:
    """The first ten at once, each with its place and why; and how to go on without them."""
    path = _with_bad(tmp_path / "d.jsonl", 3, BAD, "nonsense", '{"prompt": "a"}', *[BAD] * 20)

    said = _refuse(path, tokenizer)

    assert said.startswith("10 and more records cannot be trained on")
    assert (
        "(1) d.jsonl: line 1: prompt must be a string, and is a number (2) d.jsonl: line 2: is not JSON"
        in said
    )
    assert "(10) d.jsonl: line 10: " in said
    assert "line 11" not in said
    assert "dataset.onBadRecord: skip" in said
    assert "hunter2" not in said


def test_one_bad_record_is_one_sentence(tmp_path: Path, tokenizer: Any) -> None:
    """Its place and why."""
    said = _refuse(_with_bad(tmp_path / "d.jsonl", 3, BAD), tokenizer)

    assert said == "d.jsonl: line 1: prompt must be a string, and is a number"


def test_what_the_template_refuses_is_a_bad_record_as_well(tmp_path: Path, tokenizer: Any) -> None:
    """It ends the job, together with the others in their order, or is left out and counted."""
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    ended = good.replace('"b"', '"b<|im_end|>"')
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([good, ended, "nonsense", *[good] * 20, ended]))

    said = _refuse(path, tokenizer)
    loaded = load(_dataset(eval_fraction=0.0, on_bad_record="skip", max_bad_share=0.5), path, tokenizer, 100)

    assert said.startswith(
        "3 records cannot be trained on; mend them, or leave them out with dataset.onBadRecord: skip: "
        "(1) d.jsonl: line 2: messages[1]: what the assistant says holds a special token"
    )
    assert "(2) d.jsonl: line 3: is not JSON" in said
    assert "(3) d.jsonl: line 24: messages[1]: " in said
    assert (len(loaded.train), loaded.train_facts.records) == (21, 21)
    assert [bad.count for bad in loaded.train_facts.bad] == [2, 1]
    assert loaded.train_facts.bad[0].places == ["d.jsonl: line 2", "d.jsonl: line 24"]


def test_a_bad_record_ends_a_job_without_reading_all_others(tmp_path: Path, tokenizer: Any) -> None:
    """Of ten million records only so many behind the first bad one are looked at."""
    path = _with_bad(tmp_path / "d.jsonl", bad_records.LOOKED_AT_BEHIND + 1000, BAD)
    path.write_text(path.read_text() + "\n" + BAD)

    assert _refuse(path, tokenizer) == "d.jsonl: line 1: prompt must be a string, and is a number"


def test_bad_records_may_be_left_out(tmp_path: Path, tokenizer: Any) -> None:
    """They are counted by reason, with the first five places of each, and the others are trained on."""
    path = _with_bad(tmp_path / "d.jsonl", 100, *['{"a": }', *[BAD] * 6, '{"a": 1, }'])

    loaded = load(_dataset(on_bad_record="skip", max_bad_share=0.1, eval_fraction=0.0), path, tokenizer, 100)

    assert (len(loaded.train), loaded.train_facts.records) == (100, 100)
    places = [f"d.jsonl: line {number}" for number in range(2, 7)]
    assert loaded.train_facts.bad[0] == BadRecords(
        reason="prompt must be a string, and is a number", count=6, places=places
    )
    assert sum(bad.count for bad in loaded.train_facts.bad) == 8
    assert all(bad.places and "is not JSON" in bad.reason for bad in loaded.train_facts.bad[1:])


def test_too_many_bad_records_are_an_error(tmp_path: Path, tokenizer: Any) -> None:
    """More than maxBadShare of the split, by reason; and there must be one that is good."""
    path = _with_bad(tmp_path / "d.jsonl", 98, BAD, BAD)

    skip = _dataset(on_bad_record="skip", max_bad_share=0.02, eval_fraction=0.0)
    assert len(load(skip, path, tokenizer, 100).train) == 98
    assert _refuse(path, tokenizer, on_bad_record="skip").startswith(
        "2 of 100 records cannot be trained on, more than dataset.maxBadShare 0.01 allows: 2 prompt "
    )
    none = _with_bad(tmp_path / "e.jsonl", 0, "nonsense", "{}}")
    assert _refuse(none, tokenizer, on_bad_record="skip", max_bad_share=1.0).startswith(
        "2 of 2 records cannot be trained on"
    )


def test_columns_are_those_of_the_dataset(tmp_path: Path, tokenizer: Any) -> None:
    """dataset.columns reaches the records."""
    path = tmp_path / "d.csv"
    path.write_text("q,completion\n2+2=,4\n")

    loaded = load(_dataset(columns=Columns(prompt="q"), eval_fraction=0.0), path, tokenizer, 100)

    assert _texts(loaded.train, tokenizer) == ["2+2=4<|im_end|>"]


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"], ids=["empty", "blank", "mark"])
def test_a_file_without_records_is_named(tmp_path: Path, tokenizer: Any, text: str) -> None:
    """An empty file is an error that names it."""
    (tmp_path / "d.jsonl").write_text(text)

    assert "d.jsonl: holds no record; one JSON object per line, or an array" in _refuse(
        tmp_path / "d.jsonl", tokenizer
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_are_an_error_with_the_file_s_name(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, content: bytes
) -> None:
    """Whatever a file holds that is not records, it is refused with its name."""
    path = tmp_path_factory.mktemp("any") / "file.jsonl"
    path.write_bytes(content)

    assert "file.jsonl" in _refuse(path, tokenizer)


def test_samples_without_groups_have_the_digest_of_every_version() -> None:
    """A checkpoint of any release knows its data again; groups make another digest."""
    arrays = (np.arange(6, dtype=np.int32), np.array([0, 1, 1, 0, 1, 1], np.uint8), np.array([0, 3, 6]))

    plain = Samples(*arrays).digest()

    assert plain == hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert plain.startswith("ac1edfaf8c547189")
    assert Samples(*arrays, group_offsets=np.array([0, 2])).digest() != plain


LIMITED = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from qlora_contract.run_config import Dataset
from qlora_trainer.data.batches import Workers
from qlora_trainer.data.dataset import load

data, warm, model, folder = map(Path, sys.argv[1:5])
dataset, tokenizer = Dataset(source="pvc://a/b", eval_fraction=0.1), AutoTokenizer.from_pretrained(model)
load(dataset, warm, tokenizer, 1000, folder=folder / "warm", workers=Workers(2))
[used] = [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData")]
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[5]),) * 2)
where = folder / "cold" if sys.argv[6] == "files" else None
loaded = load(dataset, data, tokenizer, 1000, folder=where, workers=Workers(2))
print(len(loaded.train.ids) + len(loaded.evaluation.ids))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["files", "memory"])
def test_memory_does_not_grow_with_the_data(
    tmp_path: Path, byte_tokenizer: Callable[..., Any], where: str
) -> None:
    """With 64 MiB to spare a process makes 150 MB of tokens in files; in memory, as a check, it cannot."""
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = "".join(chr(97 + number % 26) for number in range(900))
    for name, count in (("warm", 3000), ("data", 33_000)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(count))
    (tmp_path / "out").mkdir()

    ended = subprocess.run(
        [
            *(sys.executable, "-c", LIMITED, tmp_path / "data.jsonl", tmp_path / "warm.jsonl"),
            *(tmp_path / "model", tmp_path / "out", str(64 * 2**20), where),
        ],
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    if where == "files":
        assert ended.returncode == 0, ended.stderr
        assert int(ended.stdout) > 29_000_000
    else:
        assert "MemoryError" in ended.stderr


@pytest.mark.model
def test_loads_conversations_for_the_real_model(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    """Conversations load with the real model's tokenizer and template."""
    turns = [
        [{"role": "user", "content": f"What is {i}+1?"}, {"role": "assistant", "content": f"It is {i + 1}."}]
        for i in range(60)
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))

    loaded = load(_dataset(eval_fraction=0.2), path, smollm2_tokenizer, 64)

    assert loaded.evaluation is not None
    assert len(loaded.train) + len(loaded.evaluation) == 60
    for i in range(len(loaded.train)):
        ids, mask = loaded.train.sample(i)
        assert smollm2_tokenizer.decode(ids[mask == 1]).startswith("It is ")
        assert ids[mask == 1][-1] == smollm2_tokenizer.eos_token_id


# --- several sources


def _mix(*sources: dict[str, Any], **fields: Any) -> Dataset:
    return Dataset.model_validate(
        {"sources": [{"source": f"pvc://claim/{n}", **each} for n, each in enumerate(sources)], **fields}
    )


def test_several_sources_are_put_together_each_in_its_own_format(tmp_path: Path, tokenizer: Any) -> None:
    """Samples are in the order of the sources; what became of each is told for each."""
    csv = tmp_path / "a.csv"
    csv.write_text("q,a\nwhat,that\nwhat,that\nwho,\n")
    docs = _write(tmp_path / "b.jsonl", *_numbered(3))
    dataset = _mix(
        {"columns": {"prompt": "q", "completion": "a"}},
        {"format": "prompt-completion", "weight": 2.0},
        eval_fraction=0.0,
        on_bad_record="skip",
        max_bad_share=0.5,
    )

    loaded = load(dataset, [csv, docs], tokenizer, 100)

    assert _texts(loaded.train, tokenizer) == ["whatthat<|im_end|>"] * 2 + [
        f"n={n}<|im_end|>" for n in range(3)
    ]
    first, second = loaded.train_facts.sources
    assert (first.source, first.weight, first.records, first.duplicates) == ("pvc://claim/0", 1.0, 2, 1)
    assert [(bad.count, bad.places) for bad in first.bad] == [(1, ["a.csv: row 4"])]
    assert (second.records, second.samples, second.bad) == (3, 3, [])
    assert first.sha256 == hashlib.sha256(csv.read_bytes()).hexdigest()
    both = f"{first.sha256}\n{second.sha256}\n"
    assert loaded.sha256 == hashlib.sha256(both.encode()).hexdigest()
    assert [(part.count, part.weight) for part in loaded.mix] == [(2, 1.0), (3, 2.0)]
    assert loaded.epoch_samples == 8
    assert "5 records in the prompt-completion format from 2 sources" in loaded.train_facts.summary()
    assert Facts.of_report(json.loads(json.dumps(loaded.train_facts.report()))) == loaded.train_facts


def test_each_of_several_sources_holds_out_its_own(tmp_path: Path, tokenizer: Any) -> None:
    """By its evalSplit, or by evalFraction; a copy in another source is held out there, too."""
    split = tmp_path / "split"
    split.mkdir()
    _write(split / "train.jsonl", ("a", "1"), ("b", "2"))
    _write(split / "test.jsonl", ("a", "1"), ("c", "3"))
    plain = _write(tmp_path / "plain.jsonl", *_numbered(300))
    dataset = _mix({"eval_split": "test"}, {}, {}, eval_fraction=0.2)

    loaded = load(dataset, [split, plain, plain], tokenizer, 100)

    assert loaded.evaluation_facts is not None
    held = [each.records for each in loaded.evaluation_facts.sources]
    trained = [each.records for each in loaded.train_facts.sources]
    assert (held[0], trained[0]) == (2, 2)
    assert held[1] == held[2] == 300 - trained[1]
    assert 0 < held[1] < 150
    assert [each.overlap for each in loaded.evaluation_facts.sources] == [1, 0, 0]
    assert len(loaded.evaluation or ()) == sum(held)


def test_an_error_says_which_of_several_sources_it_is_about(tmp_path: Path, tokenizer: Any) -> None:
    """Files of several sources may have the same name."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    good = _write(tmp_path / "a" / "d.jsonl", ("a", "1"))
    bad = tmp_path / "b" / "d.jsonl"
    bad.write_text("nonsense\n")

    with pytest.raises(DataError, match=r"^dataset\.sources\[1\]: d\.jsonl: line 1"):
        load(_mix({}, {"format": "text"}, eval_fraction=0.0), [good, bad], tokenizer, 100)
    with pytest.raises(
        ConfigurationError, match=r"^dataset\.sources\[0\]: dataset\.evalSplit needs a folder"
    ):
        load(_mix({"eval_split": "test"}, {}), [good, good], tokenizer, 100)


def test_two_sources_of_a_record_each_give_one_to_train_on_and_one_to_evaluate(
    tmp_path: Path, tokenizer: Any
) -> None:
    """As with the same two in one file; what is trained on keeps its source."""
    files = [_write(tmp_path / f"{n}.jsonl", (f"{n}", "x")) for n in range(2)]

    loaded = load(_mix({}, {"weight": 3.0}, eval_fraction=0.05), files, tokenizer, 100)

    assert loaded.evaluation is not None
    assert (len(loaded.train), len(loaded.evaluation)) == (1, 1)
    (trained,) = _texts(loaded.train, tokenizer)
    assert [part.count for part in loaded.mix] == ([1, 0] if trained.startswith("0") else [0, 1])


def test_what_is_kept_has_the_addresses_and_weights_of_now(tmp_path: Path, tokenizer: Any) -> None:
    """Tokens depend on neither, so a job with others finds them in the cache."""
    file = _write(tmp_path / "d.jsonl", *_numbered(4))
    then, now = (_mix({"weight": weight}, {}, eval_fraction=0.0) for weight in (0.5, 3.0))

    loaded = load(then, [file, file], tokenizer, 100)

    assert [part.weight for part in loaded.of_dataset(now).mix] == [3.0, 1.0]
