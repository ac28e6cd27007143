"""The model families that can be trained: one table of what their graphs look like and what of them is refused.

A family is a `model_type` of config.json. transformers builds its graph; an entry says where our layers go in it, and
which variants would not be computed exactly. A new family is an entry, and tests that compare it with transformers.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from qlora_contract.units import first_line
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.stored import formats, gguf

log = logging.getLogger(__name__)

Refusal = Callable[[Any], str | None]
"""transformers' configuration -> why such a model is refused, to be read after its folder's name; None: it is not."""

LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that depend on a row's length: in a packed row, samples would be rotated differently."""


def length_dependent_rope(config: Any) -> str | None:
    """A packed sample must be rotated as it would be alone."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return (
        f"uses {rope!r} rotary embeddings, which packing cannot keep exact"
        if rope in LENGTH_DEPENDENT_ROPE
        else None
    )


@dataclass(frozen=True)
class Family:
    """What the loader has to know of a family's graph. The defaults are Llama's, which most others follow."""

    decoder: str = "model"
    """Path of the decoder in transformers' causal language model; a decoder saved alone leaves it out of its names."""
    head: str = "lm_head"
    """Path of the output head, which is neither quantized nor adapted."""
    norm_epsilon: str | None = "variance_epsilon"
    """Attribute that holds the epsilon of the modules that compute layers.RmsNorm's formula, and of no others.
    None: the norms are transformers' own."""
    gated_mlp: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    """Names of the three linear layers of the modules that compute layers.GatedMlp's formula, where config.json's
    hidden_act is silu. None: another formula, or gate and up are one layer; then the module is transformers' own."""
    attention: frozenset[str] = frozenset({"full_attention", "sliding_attention"})
    """The kinds of config.json's layer_types whose layers hand segments through to modeling.attention."""
    refusals: tuple[Refusal, ...] = (formats.refusal, length_dependent_rope)

    def refusal(self, config: Any) -> str | None:
        """The first reason for which a model of this family is refused; None if there is none."""
        for kind in getattr(config, "layer_types", None) or ():
            if kind not in self.attention:
                return f"has layers of {kind!r}, which packing cannot keep exact"
        return next(filter(None, (refuse(config) for refuse in self.refusals)), None)


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}
"""By config.json's model_type."""


def read_config(folder: Path) -> Any:
    """transformers' configuration of a model folder.

    Raises:
        ModelError: there is none, it cannot be read, its family is not in FAMILIES, or the family refuses it.
    """
    source = gguf.from_pretrained_arguments(folder, better="config.json")
    if not source and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: model.source must be a Hugging Face model folder")
    if reason := gguf.refusal(folder):
        raise ModelError(f"{folder} {reason}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **source)
    except Exception as error:  # transformers has no errors of its own for a file that makes no sense
        file = source.get("gguf_file", "config.json")
        raise ModelError(f"{folder}/{file} cannot be read: {first_line(error)}") from error
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"{folder} is a {config.model_type!r} model; supported are {known}")
    if reason := FAMILIES[config.model_type].refusal(config):
        raise ModelError(f"{folder} {reason}")
    if (config.pad_token_id or 0) >= config.vocab_size:
        config.pad_token_id = None  # a row of the embedding that is not there; nothing here is padded with it
    if getattr(config, "attention_dropout", 0.0):
        log.warning(
            "%s/config.json asks for attention_dropout %s: not applied", folder, config.attention_dropout
        )
        config.attention_dropout = 0.0
    return config
