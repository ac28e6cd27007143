"""The training and evaluation samples of a dataset."""

import csv
import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.run_config import Dataset
from qlora_trainer.data.dataset import Facts, LoadedData, Samples, hold_out, load, read_records
from qlora_trainer.data.readers import READERS, Reader, Row
from qlora_trainer.errors import ConfigurationError, DataError

pytestmark = pytest.mark.process

Make = Callable[..., Any]


def _dataset(**fields: Any) -> Dataset:
    return Dataset(source="pvc://claim/data", **fields)


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


def test_what_is_held_out_does_not_depend_on_the_file(tmp_path: Path) -> None:
    """Order and other records never move a record to the other side, and copies stay together."""
    records = _numbered(200)
    first = read_records(_write(tmp_path / "a.jsonl", *records))
    second = read_records(_write(tmp_path / "b.jsonl", *reversed(records), ("new", "one"), *records[:50]))

    held_out = {record.digest for record in hold_out(first, 0.3)[1]}
    trained, held_out_again = ({record.digest for record in side} for side in hold_out(second, 0.3))

    assert held_out <= held_out_again
    assert not trained & held_out_again


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


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"train_split": "sft"}, DataError, r"has no split 'sft' \(sft\.jsonl\); its splits: other, train"),
        ({"eval_split": "test"}, DataError, r"has no split 'test' \(test\.jsonl\); its splits: other, train"),
        ({"eval_split": "train"}, ConfigurationError, "evalSplit is the split that is trained on, 'train'"),
        (
            {},
            DataError,
            r"evalFraction 0\.05 holds out none of the 1 records: give more, name an evalSplit",
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
        DataError, match=r"gone: no such file; dataset\.source is a JSONL file, or a folder of them"
    ):
        load(_dataset(), tmp_path / "gone", tokenizer, 100)


def test_the_fraction_that_an_error_names_is_enough(tmp_path: Path, tokenizer: Any) -> None:
    """Following the advice about evalFraction helps: with a little more, a record is held out."""
    path = _write(tmp_path / "d.jsonl", *_numbered(4))
    least = min(record.split_key for record in read_records(path))

    with pytest.raises(DataError, match=f"set it above {least:.4f}"):
        load(_dataset(eval_fraction=least), path, tokenizer, 100)
    assert len(load(_dataset(eval_fraction=least + 1e-4), path, tokenizer, 100).evaluation or ()) == 1


def test_a_fraction_that_a_job_cannot_have_is_not_advised(tmp_path: Path, tokenizer: Any) -> None:
    """Where only more than half of the records would do, the advice is another."""
    far = [record for record in _numbered(50) if _split_key(tmp_path, record) > 0.5][:3]
    path = _write(tmp_path / "d.jsonl", *far)

    with pytest.raises(DataError, match="3 records: give more, name an evalSplit"):
        load(_dataset(), path, tokenizer, 100)


def test_nothing_to_train_on_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    """A fraction that holds out every record leaves nothing to train on."""
    records = [record for record in _numbered(50) if _split_key(tmp_path, record) < 0.5]

    with pytest.raises(DataError, match=r"evalFraction 0\.5 holds out every record; give more, or set 0"):
        load(_dataset(eval_fraction=0.5), _write(tmp_path / "d.jsonl", records[0]), tokenizer, 100)


def _split_key(folder: Path, record: tuple[str, str]) -> float:
    return read_records(_write(folder / "one.jsonl", record))[0].split_key


def test_cut_and_dropped_samples_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    """A sample that loses its end is counted, and dropped when nothing is left to learn."""
    path = _write(tmp_path / "d.jsonl", ("abcdefghij", "k"), ("ab", "cdefghijkl"), ("a", "b"))

    loaded = load(_dataset(eval_fraction=0.0), path, tokenizer, 8)

    assert loaded.train_facts == Facts(records=3, truncated=2, dropped=1)
    assert _texts(loaded.train, tokenizer) == ["abcdefgh", "ab<|im_end|>"]
    assert loaded.train.supervised_counts().min() > 0


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


def csv_rows(path: Path) -> Iterator[Row]:
    """A reader that is not the trainer's: a row a line, its columns named by the first."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        for number, fields in enumerate(reader, start=2):
            yield Row(f"{path.name}: row {number}", dict(fields))


@pytest.fixture
def csv_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """CSV is one entry in the table of readers."""
    monkeypatch.setitem(READERS, ".csv", Reader("CSV file", "a row per record is expected", csv_rows))


@pytest.mark.usefixtures("csv_reader")
def test_the_container_changes_nothing_that_is_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    """The same records give the same samples and the same held-out ones from CSV as from JSONL."""
    _write(tmp_path / "d.jsonl", *_numbered(60))
    (tmp_path / "d.csv").write_text(
        "prompt,completion\n" + "".join(f"{prompt},{text}\n" for prompt, text in _numbered(60))
    )

    ours, theirs = (
        load(_dataset(eval_fraction=0.2), tmp_path / name, tokenizer, 100) for name in ("d.jsonl", "d.csv")
    )

    assert ours.evaluation is not None
    assert theirs.evaluation is not None
    assert ours.train.digest() == theirs.train.digest()
    assert ours.evaluation.digest() == theirs.evaluation.digest()


@pytest.mark.usefixtures("csv_reader")
def test_a_folder_may_hold_splits_in_any_container(tmp_path: Path, tokenizer: Any) -> None:
    """A split is found by its name with the suffix of any reader; each is read by its own."""
    _write(tmp_path / "train.jsonl", *_numbered(9))
    (tmp_path / "test.csv").write_text("prompt,completion\na,b\n")

    loaded = load(_dataset(eval_split="test"), tmp_path, tokenizer, 100)

    assert (len(loaded.train), _texts(loaded.evaluation, tokenizer)) == (9, ["ab<|im_end|>"])


@pytest.mark.usefixtures("csv_reader")
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.csv", "prompt,completion\na,b\na,\n", r"^d\.csv: row 3: completion is blank"),
        ("d.csv", "prompt,answer\na,b\n", r"^d\.csv: row 2: fits no format; a record is"),
        ("d.csv", "prompt,completion\n", r"d\.csv: holds no record; a row per record is expected"),
        (
            "gone",
            None,
            r"gone: no such file; dataset\.source is a JSONL file or CSV file, or a folder of them",
        ),
        (".", None, r"has no split 'train' \(train\.jsonl or train\.csv\); its splits: none"),
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


@pytest.mark.usefixtures("csv_reader")
def test_a_split_that_is_there_twice_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    """Which of two files is meant cannot be known."""
    for suffix in READERS:
        (tmp_path / f"train{suffix}").touch()

    with pytest.raises(DataError, match=r"has split 'train' more than once \(train\.jsonl or train\.csv\)"):
        load(_dataset(), tmp_path, tokenizer, 100)


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"], ids=["empty", "blank", "mark"])
def test_a_file_without_records_is_named(tmp_path: Path, text: str) -> None:
    """An empty file is an error that names it."""
    (tmp_path / "d.jsonl").write_text(text)

    with pytest.raises(DataError, match=r"d\.jsonl: holds no record; one JSON object per line is expected"):
        read_records(tmp_path / "d.jsonl")


@given(content=st.binary(max_size=200))
def test_any_bytes_are_an_error_with_the_file_s_name(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    """Whatever a file holds that is not records, it is refused with its name."""
    path = tmp_path_factory.mktemp("any") / "file.jsonl"
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"file\.jsonl"):
        read_records(path)


def test_samples_without_groups_have_the_digest_of_every_version() -> None:
    """A checkpoint of any release knows its data again; groups make another digest."""
    arrays = (np.arange(6, dtype=np.int32), np.array([0, 1, 1, 0, 1, 1], np.uint8), np.array([0, 3, 6]))

    plain = Samples(*arrays).digest()

    assert plain == hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert plain.startswith("ac1edfaf8c547189")
    assert Samples(*arrays, group_offsets=np.array([0, 2])).digest() != plain


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
