"""A model and data that show whether an installation works."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_trainer import smoke_model
from qlora_trainer import smoke_model as smoke_model_module

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written once."""
    folder = tmp_path_factory.mktemp("smoke")
    assert smoke_model.main([str(folder)]) == 0
    return folder


def test_stock_transformers_reads_model_and_tokenizer(folder: Path) -> None:
    """The folder is what the Hub has, without pickles or code."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)

    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer("any text: é漢").input_ids) == "any text: é漢"
    assert not [path for path in (folder / "model").iterdir() if path.suffix in (".bin", ".py")]


def test_only_the_answers_are_supervised(folder: Path) -> None:
    """The chat template marks what the assistant says."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
    record = json.loads((folder / "data.jsonl").read_text().splitlines()[0])
    encoded = tokenizer.apply_chat_template(
        record["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    supervised = [t for t, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]

    assert tokenizer.decode(supervised) == "After 0 comes 1.<|end|>"


def test_every_call_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Model, tokenizer and data of two calls are equal."""
    smoke_model.write(tmp_path)

    for path in ("model/model.safetensors", "model/tokenizer.json", "data.jsonl"):
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is 1."""
    (tmp_path / "file").write_text("in the way")

    assert smoke_model.main([str(tmp_path / "file")]) == 1
    assert f"{tmp_path / 'file'} cannot be written" in capsys.readouterr().err


def test_the_name_of_the_release_before_still_works() -> None:
    """A chart of release 0.1.0 tests an installation with `tiny.write`, in whatever image it finds."""
    assert smoke_model_module.write is smoke_model.write
