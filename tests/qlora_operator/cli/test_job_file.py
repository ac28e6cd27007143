"""The job that a command is about."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_operator.cli.job_file import job_name, job_of_flags, on_a_cluster, one_job
from qlora_operator.cli.settings import Setting
from qlora_operator.errors import InvalidFileError


def test_paths_of_a_file_are_relative_to_it(
    tmp_path: Path, job_document: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of --set are relative to the working directory, those of home to it; what has a scheme is no path."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    document = job_document(
        workspace="~/work", model={"source": "../m"}, dataset={"source": "hf://datasets/a/b"}
    )
    file = tmp_path / "jobs" / "job.json"
    file.parent.mkdir()
    file.write_text(json.dumps(document))
    job = one_job(str(file), None, [Setting("dataset.source=data.jsonl")])

    assert job.spec.workspace == f"pvc://this-machine{home}/work"
    assert job.spec.model.source == f"pvc://this-machine{tmp_path}/m"
    assert job.spec.dataset.source == f"pvc://this-machine{here}/data.jsonl"
    assert "model.source: pvc://CLAIM/m" in (on_a_cluster(job) or "")


def test_a_job_of_the_cluster_is_as_it_was(
    tmp_path: Path, job_document: Callable[..., dict[str, Any]]
) -> None:
    """Claims stay claims."""
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job_document()))
    job = one_job(str(file), None)

    assert job.spec.model.source == job_document()["spec"]["model"]["source"]
    assert on_a_cluster(job) is None


def test_a_job_without_a_file_has_a_name_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the same command goes on with it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"max_position_embeddings": 256}')
    first, second = (job_of_flags("m", "docs.jsonl", None, "work") for _ in range(2))

    assert first == second
    assert first.metadata.name == "m-docs"
    assert first.spec.training.max_sequence_length == 256
    assert first.spec.workspace == f"pvc://this-machine{tmp_path}/work"


def test_what_is_wrong_with_flags_is_told_of_flags() -> None:
    """Not of a file that nobody wrote; what looks like the Hub's is asked about."""
    with pytest.raises(InvalidFileError) as refused:
        job_of_flags("org/name", "org/data", None, "work", [Setting("training.epochs=0")])

    text = str(refused.value)
    assert "--model: is the string 'org/name'" in text
    assert "did you mean hf://org/name?" in text
    assert "did you mean hf://datasets/org/data?" in text
    assert "--set: spec.training.epochs: is the number 0" in text


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("hf://HuggingFaceTB/SmolLM2-135M-Instruct", "./docs.jsonl.gz", "smollm2-135m-instruct-docs"),
        ("/srv/7B", "hf://datasets/a/No_Robots", "job-7b-no-robots"),
        ("m" * 80, "d" * 80, "m" * 25 + "-" + "d" * 24),
    ],
)
def test_a_name_is_made_of_model_and_data(model: str, data: str, name: str) -> None:
    """A valid one, whatever they are called."""
    assert job_name(model, data) == name
