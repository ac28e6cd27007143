"""What can be said of data without a model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.plan import LengthBin, TextSpan
from qlora_contract.run_config import Dataset
from qlora_trainer.data.survey import survey
from qlora_trainer.errors import DataError


def _dataset(**fields: Any) -> Dataset:
    return Dataset(source="pvc://claim/data", on_bad_record="skip", max_bad_share=1.0, **fields)


def _write(path: Path, *records: dict[str, Any] | str) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def _asked(number: int) -> dict[str, Any]:
    return {"instruction": f"What is {number:03}?", "output": "It is."}


def test_records_are_counted_and_measured_in_characters(tmp_path: Path) -> None:
    """Format, copies, bad records by reason, and lengths in powers of two."""
    path = _write(
        tmp_path / "d.jsonl",
        *[_asked(n) for n in range(20)],
        _asked(0),
        "nonsense",
        {"instruction": 1, "output": "a"},
    )

    training, evaluation, first = survey(_dataset(eval_fraction=0.0), [([path], [])])

    assert (training.format, training.records, training.duplicates, evaluation) == ("alpaca", 21, 1, None)
    assert [(bad.count, bad.places) for bad in training.bad] == [
        (1, ["d.jsonl: line 22"]),
        (1, ["d.jsonl: line 23"]),
    ]
    assert training.lengths == [LengthBin(up_to=64, count=21)]
    assert first[1] == [
        TextSpan(text="user: ", supervised=False),
        TextSpan(text="What is 001?", supervised=False),
        TextSpan(text="\n", supervised=False),
        TextSpan(text="assistant: ", supervised=False),
        TextSpan(text="It is.", supervised=True),
        TextSpan(text="\n", supervised=False),
    ]


def test_records_of_both_splits_are_counted(tmp_path: Path) -> None:
    """An evaluation that repeats what is trained on shows nothing."""
    train = _write(tmp_path / "train.jsonl", *[_asked(n) for n in range(20)])
    test = _write(tmp_path / "test.jsonl", *[_asked(n) for n in range(15, 25)])

    _, evaluation, _ = survey(_dataset(), [([train], [test])])

    assert evaluation is not None
    assert (evaluation.records, evaluation.overlap, evaluation.duplicates) == (10, 5, 0)


def test_a_fraction_is_held_out_as_training_does(tmp_path: Path) -> None:
    """No record is on both sides, and none is lost."""
    path = _write(tmp_path / "d.jsonl", *[_asked(n) for n in range(200)])

    training, evaluation, _ = survey(_dataset(eval_fraction=0.2), [([path], [])])

    assert evaluation is not None
    assert training.records + evaluation.records == 200
    assert 20 <= evaluation.records <= 60


def test_a_file_without_a_good_record_is_refused(tmp_path: Path) -> None:
    """By the sentences that training would end with."""
    with pytest.raises(DataError, match=r"^2 of 2 records cannot be trained on: 2 is not JSON"):
        survey(_dataset(), [([_write(tmp_path / "d.jsonl", "a", "b")], [])])
    with pytest.raises(DataError, match="holds no record"):
        survey(_dataset(), [([_write(tmp_path / "e.jsonl")], [])])


@pytest.mark.process
def test_nothing_of_it_needs_torch() -> None:
    """So that a file is refused in a second, not in ten."""
    program = "import sys; import qlora_trainer.data.survey; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_several_sources_are_told_each(tmp_path: Path) -> None:
    """Each with its format, its bad records and what it repeats; an evaluation record may stand in another source."""
    first = _write(tmp_path / "a.jsonl", *[_asked(n) for n in range(5)], "nonsense")
    second = _write(tmp_path / "b.jsonl", {"text": "a"}, {"text": "a"})
    test = _write(tmp_path / "test.jsonl", _asked(3))
    dataset = Dataset.model_validate(
        {
            "sources": [{"source": "pvc://c/a"}, {"source": "pvc://c/b"}, {"source": "pvc://c/c"}],
            "on_bad_record": "skip",
            "max_bad_share": 1.0,
            "eval_fraction": 0.0,
        }
    )

    training, evaluation, _ = survey(dataset, [([first], []), ([second], []), ([second], [test])])

    assert evaluation is not None
    assert (training.records, training.format, training.duplicates) == (9, "alpaca and text", 3)
    assert [(each.records, each.format, each.duplicates) for each in training.sources] == [
        (5, "alpaca", 0),
        (2, "text", 1),
        (2, "text", 1),
    ]
    assert [sum(bad.count for bad in each.bad) for each in training.sources] == [1, 0, 0]
    assert [each.overlap for each in evaluation.sources] == [0, 0, 1]
