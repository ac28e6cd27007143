"""The numbers of a model that memory, time and the plan depend on, read from config.json alone."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_contract.memory import ModelShape
from qlora_contract.run import Adapter
from qlora_trainer.adapter import LoraLinear
from qlora_trainer.model import opened, read_config, target_layers, weight_files


def model_shape(folder: Path, adapter: Adapter) -> ModelShape:
    """Measure the model in `folder` without reading its weights.

    Raises:
        ModelError: for a model or target modules that cannot be trained.
    """
    config = read_config(folder)
    with torch.device("meta"):
        graph = AutoModelForCausalLM.from_config(config)
    linears = {
        name: LoraLinear(name, module.weight, None)
        for name, module in graph.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    sizes = [prod(layer.shape) for layer in linears.values()]
    adapted = target_layers(linears, adapter.target_modules).values()
    return ModelShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=_head_size(config),
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        stored_bytes=_stored_bytes(folder),
        linear_weights=sum(sizes),
        largest_linear=max(sizes),
        adapter_weights=sum(adapter.rank * sum(layer.shape) for layer in adapted),
    )


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _stored_bytes(folder: Path) -> int:
    """Bytes per weight, by the first two-dimensional tensor."""
    with opened(weight_files(folder)[0]) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            part = tensors.get_slice(name)
            if len(part.get_shape()) == 2:
                return {"F32": 4, "F64": 8}.get(part.get_dtype(), 2)
    return 2
