"""The job that a command is about."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.plan import Machine
from qlora_operator.cli.job_file import columns, job_name, job_of_flags, on_a_cluster, one_job, plain_paths
from qlora_operator.cli.settings import Setting
from qlora_operator.errors import CommandError, InvalidFileError
from qlora_operator.placement.local import on_this_machine


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


def test_every_field_that_names_a_place_may_be_a_path(
    tmp_path: Path, job_document: Callable[..., dict[str, Any]]
) -> None:
    """Also those of one of several sources, and of the adapter to go on from; `org/name` is left to be asked about."""
    sources: list[dict[str, Any]] = [
        {"source": "a.csv", "weight": 2},
        {"source": "pvc://team/b.jsonl"},
        {"source": "/srv/c"},
    ]
    document = job_document(adapter={"initialAdapter": "old/jobs/adapter"})
    document["spec"]["dataset"] = {"sources": sources}
    file = tmp_path / "job.json"
    file.write_text(json.dumps(document))
    job = one_job(str(file), None)
    here = f"pvc://this-machine{tmp_path}"

    assert job.spec.dataset.sources is not None
    assert [each.source for each in job.spec.dataset.sources] == [
        f"{here}/a.csv",
        "pvc://team/b.jsonl",
        "pvc://this-machine/srv/c",
    ]
    assert job.spec.adapter.initial_adapter == f"{here}/old/jobs/adapter"
    paths = plain_paths(job)
    assert {field: str(path) for field, path in paths.items()} == {
        "dataset.sources[0].source": f"{tmp_path}/a.csv",
        "dataset.sources[2].source": "/srv/c",
        "adapter.initialAdapter": f"{tmp_path}/old/jobs/adapter",
    }
    assert "dataset.sources[2].source: pvc://CLAIM/c, adapter.initialAdapter: pvc://CLAIM/adapter" in (
        on_a_cluster(job) or ""
    )


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        pytest.param({"sources": ["a.csv"]}, "spec.dataset.sources[0]: is the string 'a.csv'", id="texts"),
        pytest.param({"sources": "a.csv"}, "spec.dataset.sources: is the string 'a.csv'", id="one text"),
        pytest.param(
            {"sources": [{"source": "./a.csv"}, {"source": "org/name"}]},
            "spec.dataset.sources[1].source: is the string 'org/name'",
            id="a repository",
        ),
        pytest.param({"sources": [{"source": 7}]}, "spec.dataset.sources[0].source: is the number 7", id="7"),
    ],
)
def test_sources_of_another_form_are_refused_where_they_are(
    dataset: dict[str, Any], said: str, tmp_path: Path, job_document: Callable[..., dict[str, Any]]
) -> None:
    """Whatever stands where a path may stand, nothing breaks, and the place is named."""
    file = tmp_path / "job.json"
    document = job_document()
    document["spec"]["dataset"] = dataset
    file.write_text(json.dumps(document))
    with pytest.raises(InvalidFileError) as refused:
        one_job(str(file), None)

    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param([], (4, "5120Mi"), id="nothing said"),
        pytest.param(["topology="], (4, "5120Mi"), id="nothing at all"),
        pytest.param(["topology.ranksPerPod=2"], (2, "10240Mi"), id="ranks"),
        pytest.param(["topology.memoryPerRank=1Gi"], (4, "1Gi"), id="memory"),
        pytest.param(["topology.memoryPerRank=12Gi"], (2, "12Gi"), id="more memory, fewer ranks"),
    ],
)
def test_a_job_without_a_file_shares_the_memory_among_its_ranks(
    settings: list[str], expected: tuple[int, str]
) -> None:
    """On a machine of several NUMA clusters there is a rank for each, and each holds the model."""
    job = job_of_flags("/m", "/d.jsonl", None, "work", [Setting(text) for text in settings])
    machine = Machine(
        tiers=[], lacking={}, cpus=list(range(32)), clusters=4, memory=32 * 2**30, free_memory=25 * 2**30 + 1
    )
    placed = on_this_machine(job.spec.topology, machine)

    assert (placed.ranks_per_pod, placed.memory_per_rank) == expected


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
    with pytest.raises(
        InvalidFileError, match=r"^--columns: spec\.dataset\.columns\.answer: no such field"
    ) as refused:
        job_of_flags("/m", "/d.csv", None, "work", named={"answer": "a"})


def test_columns_of_a_job_without_a_file_are_taken_as_they_are() -> None:
    """Whatever the file's own names look like."""
    job = job_of_flags(
        "/m", "/d.csv", None, "work", named={"instruction": "Question #1: text", "output": "2"}
    )

    assert job.spec.dataset.columns.instruction == "Question #1: text"
    assert job.spec.dataset.columns.output == "2"


def test_a_misspelt_name_in_a_folder_that_is_there_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`data/docs.json` is then no repository of the Hub, and what is near it can be said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    job = job_of_flags("hf://a/b", "data/docs.json", None, "work")

    assert job.spec.dataset.source == f"pvc://this-machine{tmp_path}/data/docs.json"


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


def test_columns_are_pairs() -> None:
    """In one argument or in several."""
    assert columns(["a=b,c=d", "e=f"]) == {"a": "b", "c": "d", "e": "f"}
    with pytest.raises(CommandError, match="NAME=COLUMN"):
        columns(["a=b,c"])
