"""Telling the weights of models apart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qlora_trainer.modeling.weight_files import fingerprint

pytestmark = pytest.mark.process

Make = Callable[..., Path]


def configure(folder: Path, **values: Any) -> Path:
    """Change config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def shard(folder: Path) -> Path:
    """Split model.safetensors into three files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    places: dict[str, str] = {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        mine = names[number::3]
        save_file({n: tensors[n] for n in mine}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(mine, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


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
