"""The numbers of a model that memory, time and the plan depend on, read from config.json alone."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_contract.memory import ModelShape
from qlora_contract.run_config import Adapter
from qlora_contract.units import first_line
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.adapter_methods import method_for
from qlora_trainer.modeling.families import FAMILIES, read_config
from qlora_trainer.modeling.weight_files import bytes_per_weight


def model_shape(folder: Path, adapter: Adapter) -> ModelShape:
    """Measure the model in `folder`, and the adapter that it would get, without reading weights.

    Raises:
        ModelError: for a model or target modules that cannot be trained.
    """
    config = read_config(folder)
    head = FAMILIES[config.model_type].head
    try:
        with torch.device("meta"):
            graph = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers computes with whatever config.json says
        raise ModelError(
            f"{folder}/config.json does not describe a model ({type(error).__name__}: {first_line(error)})"
        ) from error
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in graph.named_modules()
        if isinstance(module, nn.Linear) and name != head
    }
    sizes = [prod(shape) for shape in linears.values()]
    return ModelShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        positions=positions(config),
        tied=bool(config.tie_word_embeddings),
        stored_bytes=bytes_per_weight(folder),
        linear_weights=sum(sizes),
        largest_linear=max(sizes),
        adapter_weights=method_for(adapter).parameter_count(linears),
    )


def positions(config: Any) -> int | None:
    """The longest sequence, in tokens, by config.json; None where that does not say.

    Scaled rotary embeddings reach `factor` times as far as the model was first trained to, whether or not
    max_position_embeddings has been raised to that.
    """
    written = getattr(config, "max_position_embeddings", None)
    if written is None:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    first = rope.get("original_max_position_embeddings") or written
    return max(int(written), int(first * (rope.get("factor") or 1.0)))
