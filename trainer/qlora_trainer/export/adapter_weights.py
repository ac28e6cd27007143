"""A finished adapter, read back from its folder: what it adds to each layer."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_contract.files import read_json
from qlora_contract.job_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHAT_TEMPLATE
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.adapter_parameters import PEFT_PREFIX

_MATRIX = re.compile(rf"{re.escape(PEFT_PREFIX)}(?P<layer>.+)\.lora_(?P<which>[AB])\.weight")
_CHANGES_THE_FORMULA = (
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
)
"""Settings of PEFT's under which a layer adds something else than scale B A, or other layers change."""


@dataclass(frozen=True)
class LayerAdapter:
    """What is added to the weight of a linear layer: scale B A."""

    a: Tensor
    """(rank, in), fp32."""
    b: Tensor
    """(out, rank), fp32."""
    scale: float

    @property
    def rank(self) -> int:
        """Columns of b."""
        return self.a.shape[0]

    def merge(self, weight: Tensor) -> Tensor:
        """weight + scale B A: (out, in) in fp32, added up in fp32."""
        return torch.addmm(weight.float(), self.b, self.a, alpha=self.scale)


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter of PEFT's format."""

    layers: Mapping[str, LayerAdapter]
    """By the layer's path in transformers' causal language model (`model.layers.0.mlp.up_proj`)."""
    chat_template: str | None
    """What it was trained with, if the adapter says so."""


def read_adapter(folder: Path) -> AdapterWeights:
    """The adapter in a folder.

    Raises:
        ModelError: it is no LoRA adapter, or one that is more than scale B A on linear layers.
    """
    try:
        config: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
        if (kind := config.get("peft_type", "LORA")) != "LORA":
            raise ModelError(
                f"{folder} is an adapter of PEFT's kind {kind}: only LoRA's become part of the weights, as merged and "
                "gguf need it; serve this one beside its base model"
            )
        alpha, alphas = float(config["lora_alpha"]), dict(config.get("alpha_pattern") or {})
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} is not a LoRA adapter in PEFT's format: {error}") from error
    if others := [name for name in _CHANGES_THE_FORMULA if config.get(name)]:
        raise ModelError(f"{folder}/{ADAPTER_CONFIG} sets {', '.join(others)}, which cannot be exported")
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _MATRIX.fullmatch(name)
        if match is None:
            raise ModelError(f"{folder} holds {name}, which is no LoRA matrix of a linear layer")
        halves.setdefault(match["layer"], {})[match["which"]] = tensor.float()
    if lonely := [layer for layer, pair in halves.items() if len(pair) < len("AB")]:
        raise ModelError(f"{folder} holds one of the two LoRA matrices of {lonely[0]}")
    template = folder / CHAT_TEMPLATE
    root = bool(config.get("use_rslora"))
    layers = {}
    for layer, pair in halves.items():
        # As PEFT scales: LoRA by alpha / r; rsLoRA (Kalajdzievski 2023) by alpha / sqrt(r).
        rank = pair["A"].shape[0]
        of_layer = alphas.get(next(filter(partial(_matches, layer), alphas), ""), alpha)
        layers[layer] = LayerAdapter(pair["A"], pair["B"], of_layer / (math.sqrt(rank) if root else rank))
    return AdapterWeights(
        layers,
        template.read_text(encoding="utf-8") if template.is_file() else None,
    )


def _matches(layer: str, key: str) -> bool:
    """Whether a key of PEFT's patterns, a regular expression, names a layer by its path or the end of it."""
    return re.match(rf"(.*\.)?({key})$", layer) is not None
