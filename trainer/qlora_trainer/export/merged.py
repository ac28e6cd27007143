"""The merged model: the original weights with the adapter in them, as a folder that transformers and others load."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_contract.files import read_json
from qlora_contract.job_folder import CHAT_TEMPLATE
from qlora_trainer.artifacts.tensors import save_tensors
from qlora_trainer.errors import ModelError
from qlora_trainer.export.merged_weights import StoredTensor

SHARD_BYTES = 2 << 30
"""Weights of a file, at most, unless one tensor alone is larger: what is in memory at once."""
INDEX = "model.safetensors.index.json"
_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.jinja", "*.model")
"""Configuration and tokenizer."""


def write_merged(
    target: Path,
    source: Path,
    tensors: Sequence[StoredTensor],
    chat_template: str | None,
    advance: Callable[[int], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's folder.

    Args:
        target: an empty folder.
        source: of the base model.
        tensors: its weights, with what is merged into them.
        chat_template: takes the place of the base's; None: that stays.
        advance: called with the bytes that were just merged; what it raises ends the writing.
        shard_bytes: of a file of weights.

    Raises:
        ModelError: a merged weight is not finite, or too large for the type that the weights are stored in.
    """
    groups = list(shards(tensors, shard_bytes))
    places: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = (
            "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        )
        values: dict[str, Tensor] = {}
        for tensor in group:
            values[tensor.name] = as_stored(tensor)
            advance(tensor.nbytes)
        save_tensors(values, target / file, {"format": "pt"})
        places |= dict.fromkeys(values, file)
    if len(groups) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
    copy_beside_weights(source, target, chat_template)


def shards(tensors: Sequence[StoredTensor], limit: int) -> Iterator[list[StoredTensor]]:
    """The tensors in their order, as groups of at most `limit` bytes, or of one tensor."""
    group: list[StoredTensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.nbytes > limit:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    yield group


def as_stored(tensor: StoredTensor) -> Tensor:
    """The merged weight, rounded once to the type that the base is stored in. Raises ModelError if it does not fit."""
    value = tensor.value()
    if tensor.adapter is None:
        return value
    rounded = value.to(tensor.dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise ModelError(
            f"{tensor.name} with the adapter merged holds numbers that {tensor.dtype} cannot hold"
        )
    return rounded


def copy_beside_weights(source: Path, target: Path, chat_template: str | None) -> None:
    """Copy configuration and tokenizer; the template goes to both places where programs look for it."""
    files = {path for pattern in _BESIDE_WEIGHTS for path in source.glob(pattern)}
    for path in sorted(files):
        if path.is_file() and path.name != INDEX and not path.name.startswith("adapter_"):
            shutil.copyfile(path, target / path.name)
    if chat_template is None:
        return
    (target / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
    settings = target / "tokenizer_config.json"
    if settings.is_file():
        known: dict[str, Any] = read_json(settings)
        known["chat_template"] = chat_template
        settings.write_text(json.dumps(known, indent=2, ensure_ascii=False), encoding="utf-8")
