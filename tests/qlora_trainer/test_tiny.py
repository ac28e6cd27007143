"""A model and data that show whether an installation works."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_trainer import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written once."""
    place = tmp_path_factory.mktemp("tiny")
    assert tiny.main([str(place)]) == 0
    return place


def test_a_folder_as_the_hub_has_it(folder: Path) -> None:
    """Stock transformers reads the model and its tokenizer, without pickles or code."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)

    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer("any text: é漢").input_ids) == "any text: é漢"
    assert not [path for path in (folder / "model").iterdir() if path.suffix in (".bin", ".py")]


def test_the_answers_alone_are_to_be_learnt(folder: Path) -> None:
    """The chat template marks what the assistant says."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
    record = json.loads((folder / "data.jsonl").read_text().splitlines()[0])
    encoded = tokenizer.apply_chat_template(
        record["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    learnt = [t for t, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]

    assert tokenizer.decode(learnt) == "After 0 comes 1.<|end|>"


def test_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    """Two writings are equal, byte for byte."""
    tiny.write(tmp_path)

    for path in ("model/model.safetensors", "model/tokenizer.json", "data.jsonl"):
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes()


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says where, and ends with 1."""
    (tmp_path / "file").write_text("in the way")

    assert tiny.main([str(tmp_path / "file")]) == 1
    assert f"{tmp_path / 'file'} cannot be written" in capsys.readouterr().err
