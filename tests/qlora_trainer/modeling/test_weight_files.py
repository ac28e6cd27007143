"""Telling the weights of models apart."""

from collections.abc import Callable
from pathlib import Path

import pytest

from model_folders import configure, shard
from qlora_trainer.modeling.weight_files import fingerprint

pytestmark = pytest.mark.process

Make = Callable[..., Path]


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
