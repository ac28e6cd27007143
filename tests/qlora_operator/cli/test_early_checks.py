"""What is seen at a glance of a model, of data and of a workspace."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli.early_checks import (
    data_fault,
    missing,
    model_fault,
    newer_inputs,
    require_inputs,
    require_place,
)
from qlora_operator.errors import CommandError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def files(folder: Path, **contents: str) -> Path:
    """A folder with files, `a__b` for a/b, and `x_dot_y` for x.y."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.mark.parametrize(
    ("contents", "phrase"),
    [
        ({}, "is an empty folder"),
        ({"adapter_config_dot_json": json.dumps({"base_model_name_or_path": "a/b"})}, "is an adapter of a/b"),
        ({"snapshots__abc__config_dot_json": "{}", "refs__main": "abc"}, "the model itself is {}/snapshots/abc"),
        ({"models--a--b__snapshots__abc__config_dot_json": "{}"}, "a model in it is {}/models--a--b/snapshots/abc"),
        ({"inner__config_dot_json": "{}"}, "did you mean {}/inner?"),
        ({"config_dot_json": "{}", "model_dot_safetensors": POINTER}, "run `git lfs pull` in {}"),
        ({"notes_dot_txt": ""}, "has no config.json"),
        ({"config_dot_json": "{}", "tokenizer_dot_json": "{}", "pytorch_model_dot_bin": "x"}, "has neither model.safe"),
        ({"config_dot_json": "{}", "model_dot_safetensors": "x"}, "{} has no tokenizer: copy tokenizer.json"),
        ({"config_dot_json": "{}"}, "nothing else is read; it has no tokenizer"),
    ],
    ids=["empty", "adapter", "cached model", "cache", "folder above", "pointers", "something else",
         "weights of another kind", "no tokenizer", "neither"],
)  # fmt: skip
def test_a_folder_that_is_no_model_is_named_for_what_it_is(
    contents: dict[str, str], phrase: str, tmp_path: Path
) -> None:
    """With what would be right."""
    folder = files(tmp_path / "x", **contents)

    assert phrase.format(folder) in (model_fault(folder) or "")


@pytest.mark.parametrize("name", ["m.gguf", "m.safetensors"])
def test_a_file_of_a_model_leads_to_its_folder(name: str, tmp_path: Path) -> None:
    """Which is what a job names."""
    (tmp_path / name).write_text("x")

    assert str(tmp_path) in (model_fault(tmp_path / name) or "").removeprefix(f"{tmp_path / name}")


def test_a_model_and_data_that_look_right_are_left_to_the_trainer(tmp_path: Path) -> None:
    """It reads them."""
    whole = {"config_dot_json": "{}", "tokenizer_dot_json": "{}", "model_dot_safetensors": "x"}
    assert model_fault(files(tmp_path / "m", **whole)) is None
    assert model_fault(files(tmp_path / "g", m_dot_gguf="x")) is None
    assert data_fault(files(tmp_path / "d", train_dot_jsonl="{}")) is None
    assert data_fault(tmp_path / "d" / "train.jsonl") is None


def test_data_that_are_none_are_named(tmp_path: Path) -> None:
    """An empty file, an empty folder, a pointer, a model."""
    folder = files(tmp_path / "d", a_dot_jsonl="", b_dot_jsonl=POINTER)
    (tmp_path / "e").mkdir()

    assert data_fault(folder / "a.jsonl") == f"{folder}/a.jsonl is empty"
    assert "is a pointer of git-lfs" in (data_fault(folder / "b.jsonl") or "")
    assert data_fault(tmp_path / "e") == f"{tmp_path}/e is an empty folder"
    assert "has a model in it" in (data_fault(files(tmp_path / "m", config_dot_json="{}")) or "")
    files(tmp_path / "m", tokenizer_dot_json="{}", model_dot_safetensors="x")
    assert "has a model in it" in (data_fault(tmp_path / "m") or "")
    adapter = files(tmp_path / "t", adapter_config_dot_json="{}", adapter_model_dot_safetensors="x")
    assert "has an adapter in it" in (data_fault(adapter) or "")
    assert "must be .arrow, .csv," in (data_fault(files(tmp_path / "p", a_dot_pdf="x")) or "")


def test_what_is_missing_is_told_with_what_is_near(tmp_path: Path) -> None:
    """A misspelt name, a missing folder, a dangling link."""
    (tmp_path / "docs.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to("gone")

    assert missing(tmp_path / "doc.jsonl").endswith(f"did you mean {tmp_path}/docs.jsonl?")
    assert missing(tmp_path / "a" / "b").endswith(f"there is no {tmp_path}/a either")
    assert missing(tmp_path / "$DATA" / "d").endswith("$DATA is not replaced here: write what it stands for")
    assert missing(tmp_path / r"C:\data\d").endswith("separated by /, not by \\")
    assert missing(tmp_path / "link") == f"{tmp_path}/link is a link to gone, which does not exist"


def test_all_that_is_wrong_with_a_job_is_told_at_once(a_job: Callable[..., QLoRAJob], tmp_path: Path) -> None:
    """With the code of the first."""
    with pytest.raises(CommandError) as refused:
        require_inputs(a_job(model={"source": "pvc://c/m"}, dataset={"source": "pvc://c/d"}), {"c": tmp_path})

    assert refused.value.code == 12
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == ["the model", "the data"]


def test_a_wrong_source_of_several_is_named_by_its_place(
    job_document: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Each of those that are wrong; remote ones are left to the transfer."""
    files(tmp_path, m__config_dot_json="{}", m__a_dot_gguf="x", a_dot_csv="x", empty_dot_jsonl="")
    uris = ["pvc://c/a.csv", "pvc://c/b.csv", "hf://datasets/o/n", "pvc://c/empty.jsonl"]
    document = job_document(model={"source": "pvc://c/m"})
    document["spec"]["dataset"] = {"sources": [{"source": uri} for uri in uris]}
    job = QLoRAJob.model_validate(document)
    with pytest.raises(CommandError) as refused:
        require_inputs(job, {"c": tmp_path})

    assert refused.value.code == 11
    assert str(refused.value).splitlines() == [
        f"the data (dataset.sources[1]): {tmp_path}/b.csv: no such file or folder; did you mean {tmp_path}/a.csv?",
        f"the data (dataset.sources[3]): {tmp_path}/empty.jsonl is empty",
    ]


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        pytest.param({"adapter_config_dot_json": "{}", "adapter_model_dot_safetensors": "x"}, None, id="one"),
        pytest.param({}, "{}/a has no adapter_config.json", id="an empty folder"),
        pytest.param({"config_dot_json": "{}"}, "{}/a is a whole model", id="a model"),
        pytest.param({"adapter__adapter_config_dot_json": "{}"}, "did you mean {}/a/adapter?", id="a job"),
        pytest.param(
            {
                "checkpoints__step-00000009__adapter_config_dot_json": "{}",
                "checkpoints__step-00000010__adapter_config_dot_json": "{}",
                "checkpoints__step-00000011__adapter_dot_safetensors": "x",
            },
            "did you mean {}/a/checkpoints/step-00000010?",
            id="a job that is not finished",
        ),
        pytest.param(
            {"step-00000010__adapter_config_dot_json": "{}"},
            "did you mean {}/a/step-00000010?",
            id="checkpoints",
        ),
        pytest.param({"adapter_config_dot_json": "{}"}, "has no adapter_model.safetensors", id="no weights"),
        pytest.param(
            {"adapter_config_dot_json": "{}", "adapter_model_dot_safetensors": POINTER},
            "adapter_model.safetensors is a pointer of git-lfs",
            id="a pointer",
        ),
    ],
)
def test_a_folder_that_is_no_adapter_is_named_for_what_it_is(
    contents: dict[str, str], said: str | None, a_job: Callable[..., QLoRAJob], tmp_path: Path
) -> None:
    """A job's folder, its checkpoints, a model: where an adapter to go on from is asked for."""
    files(tmp_path, m__config_dot_json="{}", m__a_dot_gguf="x", d_dot_jsonl="x")
    files(tmp_path / "a", **contents)
    job = a_job(
        model={"source": "pvc://c/m"},
        dataset={"source": "pvc://c/d.jsonl"},
        adapter={"initialAdapter": "pvc://c/a"},
    )
    if said is None:
        require_inputs(job, {"c": tmp_path})
        return
    with pytest.raises(CommandError) as refused:
        require_inputs(job, {"c": tmp_path})

    assert refused.value.code == 12
    assert str(refused.value).startswith("the initial adapter: ")
    assert said.format(tmp_path) in str(refused.value)


def test_a_workspace_that_is_a_file_is_refused(a_job: Callable[..., QLoRAJob], tmp_path: Path) -> None:
    """Before anything is written; one that is not there yet is made later."""
    (tmp_path / "w").write_text("")

    require_place(a_job(workspace="pvc://c/new/one"), {"c": tmp_path})
    with pytest.raises(CommandError, match="w is not a folder") as refused:
        require_place(a_job(workspace="pvc://c/w"), {"c": tmp_path})
    assert refused.value.code == 10


def test_data_that_changed_after_the_end_are_noticed(a_job: Callable[..., QLoRAJob], tmp_path: Path) -> None:
    """And nothing is said of what is as it was, or gone."""
    files(tmp_path, training_report_dot_json="{}", d_dot_jsonl="{}")
    job = a_job(model={"source": "pvc://c/m"}, dataset={"source": "pvc://c/d.jsonl"})
    os.utime(tmp_path / "training_report.json", (1000, 1000))

    assert f"{tmp_path}/d.jsonl changed after the job ended" in (
        newer_inputs(job, {"c": tmp_path}, tmp_path) or ""
    )
    os.utime(tmp_path / "d.jsonl", (900, 900))
    assert newer_inputs(job, {"c": tmp_path}, tmp_path) is None
