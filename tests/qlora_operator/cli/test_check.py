"""`qlora check`, with the real trainer; it needs no model here."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_contract.plan import CheckReport, LengthBin
from qlora_operator.cli import check
from qlora_operator.cli.job_file import is_job_file
from qlora_operator.cli.main import main

pytestmark = pytest.mark.process


def _split(**fields: Any) -> dict[str, Any]:
    known = {"format": "alpaca", "records": 800, "truncated": 0, "dropped": 0, "samples": 800, "tokens": 4000}
    return {**known, "supervised_tokens": 1000, "lengths": [{"up_to": 8, "count": 800}], **fields}


def a_report(**fields: Any) -> CheckReport:
    """What the trainer might tell of an array."""
    known = {
        "files": [{"name": "a.json", "content": "a JSON array"}],
        "unit": "tokens",
        "training": _split(
            duplicates=3, bad=[{"reason": "output is blank", "count": 2, "places": ["a.json: row 3"]}]
        ),
        "evaluation": _split(records=10, overlap=4),
        "steps": {"per_epoch": 4, "total": 10, "epochs": 2.5, "tokens_per_step": 1000.0, "fill": 0.9},
        "samples": [[{"text": "What?\x1b ", "supervised": False}, {"text": "That.", "supervised": True}]],
        "problems": ["2 bad ones"],
        "warnings": ["mind the gap"],
    }
    return CheckReport.model_validate(known | fields)


def shown(report: CheckReport, **console: Any) -> str:
    """What a user sees."""
    out = io.StringIO()
    check.show(report, Console(file=out, width=200, highlight=False, **console))
    return out.getvalue()


def test_a_report_is_shown_in_the_words_of_who_has_the_data() -> None:
    """What it is first; then counts, lengths, a sample with marks, and what is wrong with it."""
    text = shown(a_report())

    assert text.startswith("a.json: this is a JSON array of 812 alpaca records\n")
    for said in (
        "training  800 records, 800 samples, 4,000 tokens, 25 % of them learned",
        "3 say the same as an earlier one",
        "2 cannot be trained on: output is blank (a.json: row 3)",
        "4 are trained on as well",
        "up to 8 tokens  ######################################## 800",
        "steps     10 (2.50 epochs of 4), 1,000 tokens per step, bins 90 % full",
        "What?\N{REPLACEMENT CHARACTER} [[That.]]",
        "problem: 2 bad ones",
        "warning: mind the gap",
    ):
        assert said in text


def test_on_a_terminal_what_is_learned_is_colored() -> None:
    """Instead of the marks."""
    text = shown(a_report(), force_terminal=True, color_system="standard")

    assert "[[" not in text
    assert "\x1b[4;32mThat." in text


def test_without_faults_that_is_said() -> None:
    """And without a model how to see more."""
    text = shown(a_report(problems=[], warnings=[], steps=None, unit="characters"))

    assert "nothing to complain of" in text
    assert "give the model with --model to see tokens" in text
    assert "tokens, 25 %" not in text


def test_bars_have_the_length_of_their_share() -> None:
    """Even one record of many is seen."""
    bins = [LengthBin(up_to=8, count=1), LengthBin(up_to=1024, count=1000)]

    assert check.histogram_lines(bins, "tokens") == [
        "up to     8 tokens  # 1",
        f"up to 1,024 tokens  {'#' * 40} 1,000",
    ]


def _file(path: Path, *records: Any) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


PAIR = {"q": "2+2=", "a": "4"}


def test_a_file_is_checked_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No job, no claim, no model."""
    path = _file(tmp_path / "faq.jsonl", PAIR, {"q": "3+3=", "a": "6"})

    assert main(["check", path, "--columns", "instruction=q,output=a", "-o", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["training"]["format"], report["training"]["records"], report["unit"]) == (
        "alpaca",
        2,
        "characters",
    )


def test_a_file_that_a_job_would_refuse_ends_with_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a whole, or for a record."""
    assert main(["check", _file(tmp_path / "faq.jsonl", PAIR)]) == 11
    assert "faq.jsonl: line 1: fits no format (its columns: q, a)" in capsys.readouterr().err
    good = {"instruction": "a", "output": "b"}
    assert main(["check", _file(tmp_path / "b.jsonl", good, good | {"output": 1})]) == 11
    assert "problem: 1 training record(s) cannot be trained on" in capsys.readouterr().out


def test_the_data_of_a_job_are_checked(
    tmp_path: Path, job_document: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the job's settings; without its model, if that one's claim has no folder here."""
    (tmp_path / "data").mkdir()
    _file(tmp_path / "data/d.jsonl", PAIR, {"q": "3+3=", "a": "6"})
    dataset = {"source": "pvc://team/d.jsonl", "columns": {"instruction": "q", "output": "a"}}
    document = job_document("small", dataset=dataset, model={"source": "pvc://models/m"})
    (tmp_path / "job.json").write_text(json.dumps(document))
    job = str(tmp_path / "job.json")

    assert main(["check", job]) == 2
    assert "add --volume team=PATH" in capsys.readouterr().err
    assert main(["check", job, "--format", "chat"]) == 2
    assert "--format: a job file says that itself" in capsys.readouterr().err
    assert main(["check", job, "--volume", f"team={tmp_path / 'data'}"]) == 0
    assert "d.jsonl: this is a JSONL file of 2 alpaca records" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.jsonl"], "gone.jsonl: no such file or folder"),
        (["hf://datasets/a/b"], "hf://datasets/a/b: is not on this machine"),
        ([".", "--model", "gone"], "gone: no such file or folder"),
        ([".", "--columns", "a"], "--columns: must be NAME=COLUMN"),
        ([".", "--format", "parquet"], "format: Input should be 'auto', 'chat'"),
        ([".", "--max-length", "1"], "max_sequence_length: Input should be greater"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what would be right."""
    assert main(["check", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.yaml", "", True),
        ("-", "", True),
        ("a.json", '{"kind": "QLoRAJob"}', True),
        ("a.json", '[{"text": "a"}]', False),
        ("a.jsonl", '{"text": "QLoRAJob"}', False),
    ],
)
def test_a_job_file_is_told_from_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: bool
) -> None:
    """By its suffix, or by what it holds."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)

    assert is_job_file(name) is expected


def test_what_is_neither_a_file_nor_a_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe would be waited for, and links in a circle lead nowhere."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")

    assert main(["check", str(tmp_path / "pipe.jsonl")]) == 2
    assert "pipe.jsonl: is neither a file nor a folder; give the path of the data" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "loop.jsonl")]) == 2
    assert "loop.jsonl: " in capsys.readouterr().err
