"""Telling the weights of models apart."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from model_folders import configure, shard
from qlora_trainer.modeling.families import read_config
from qlora_trainer.modeling.stored.reading import stored_weights
from qlora_trainer.modeling.weight_files import WeightsHash, fingerprint, weight_files

pytestmark = pytest.mark.process

Make = Callable[..., Path]


@pytest.mark.parametrize("text", ['{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "{"])
def test_the_single_file_goes_before_a_stale_index(copied: Make, text: str) -> None:
    """As in transformers: the index was left behind when shards were joined."""
    folder = copied("llama")
    (folder / "model.safetensors.index.json").write_text(text)

    assert weight_files(folder) == [folder / "model.safetensors"]


def hash_of(folder: Path) -> str:
    """The hash of all weights."""
    taken = WeightsHash(2)
    for weight in stored_weights(folder, read_config(folder)):
        for name, tensor in weight.stored.items():
            taken.add(name, tensor)
    return taken.hexdigest()


def test_the_hash_of_the_weights_is_of_every_bit(copied: Make) -> None:
    """Shards have the hash of the single file, since tensors count; one bit makes another, also where headers agree."""
    folder, changed_model = copied("llama"), copied("llama")
    with (changed_model / "model.safetensors").open("r+b") as file:
        file.seek(-7, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-7, os.SEEK_END)
        file.write(bytes([byte ^ 1]))

    assert hash_of(shard(copied("llama"))) == hash_of(folder)
    assert hash_of(changed_model) != hash_of(folder)
    assert fingerprint(changed_model) == fingerprint(folder)
    assert hash_of(copied("llama", "bfloat16")) != hash_of(folder)


def test_fingerprint_tells_models_apart(copied: Make) -> None:
    """Copies have one fingerprint; another configuration, tensor or split has another."""
    folder = copied("llama")
    found = {
        fingerprint(folder),
        fingerprint(copied("llama", "bfloat16")),
        fingerprint(configure(copied("llama"), rms_norm_eps=1e-5)),
        fingerprint(shard(copied("llama"))),
    }

    assert len(found) == 4
    assert fingerprint(copied("llama")) == fingerprint(folder)
