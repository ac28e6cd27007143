"""`qlora init`."""

from pathlib import Path

import pytest

from qlora_contract.plan import CheckReport, LengthBin
from qlora_operator.cli.init import Answers, Found, job_text, sequence_length
from qlora_operator.cli.job_file import one_job
from qlora_operator.cli.main import main


@pytest.mark.parametrize("target", ["machine", "cluster"])
def test_the_text_is_a_valid_job(target: str, tmp_path: Path) -> None:
    """For a machine with the paths as they are, for a cluster with a claim's in their place."""
    where = str(tmp_path / "work") if target == "machine" else "pvc://team/a/work"
    answers = Answers(str(tmp_path / "my model: 1"), str(tmp_path / "d.jsonl"), target, where, "first", {})
    file = tmp_path / "job.yaml"
    found = Found(report=None, has_template=False, weights=2**30, positions=512, memory="768Mi")
    file.write_text(job_text(answers, found, tmp_path))
    job = one_job(str(file), None)
    root = "pvc://team/a" if target == "cluster" else f"pvc://this-machine{tmp_path}"

    assert job.spec.model.source == f"{root}/my model: 1"
    assert job.spec.dataset.source == f"{root}/d.jsonl"
    assert job.spec.workspace == f"{root}/work"
    assert job.spec.training.max_sequence_length == 512
    assert job.spec.topology.memory_per_rank == ("5Gi" if target == "cluster" else "768Mi")


def test_small_data_get_small_batches_and_columns_their_names(tmp_path: Path) -> None:
    """So that a first try has steps enough to learn something from."""
    split = {
        "format": "alpaca", "records": 40, "samples": 40, "tokens": 2400, "supervised_tokens": 1100, "truncated": 0,
        "dropped": 0, "lengths": [{"up_to": 128, "count": 40}],
    }  # fmt: skip
    report = CheckReport.model_validate(
        {"files": [], "unit": "tokens", "training": split, "samples": [], "problems": [], "warnings": []}
    )
    columns = {"instruction": "Question: ", "output": "answer"}
    found = Found(report, has_template=True, weights=None, positions=None, memory="64Gi")
    answers = Answers("hf://a/b", str(tmp_path / "d.csv"), "machine", "qlora", "first", columns)
    file = tmp_path / "job.yaml"
    file.write_text(job_text(answers, found, tmp_path))
    job = one_job(str(file), None)

    assert job.spec.dataset.columns.instruction == "Question: "
    assert job.spec.training.max_sequence_length == 256
    assert job.spec.training.global_batch_tokens == 256
    assert job.spec.topology.memory_per_rank == "16Gi"


def test_a_length_holds_nearly_all_samples() -> None:
    """One in a hundred may be cut off; without any sample nothing is said."""
    bins = [LengthBin(up_to=200, count=99), LengthBin(up_to=4000, count=1)]

    assert sequence_length(bins) == 256
    assert sequence_length([LengthBin(up_to=600, count=9)]) == 1024
    assert sequence_length([]) == 0


def test_without_a_terminal_what_is_needed_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody is asked."""
    assert main(["init", "--model", "hf://a/b"]) == 2
    assert "give --data" in capsys.readouterr().err


def test_a_file_that_is_there_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless its end is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b-d.yaml").write_text("mine")
    arguments = ["init", "--model", "hf://a/b", "--data", "hf://datasets/c/d"]

    assert main(arguments) == 2
    assert (tmp_path / "b-d.yaml").read_text() == "mine"
    assert main([*arguments, "--force"]) == 0
    assert main(["validate", "b-d.yaml"]) == 0
    assert "b-d.yaml: b-d: valid" in capsys.readouterr().out
