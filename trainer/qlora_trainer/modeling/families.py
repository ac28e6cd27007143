"""The model families that can be trained: one table of what their graphs look like and what of them is refused.

A family is a `model_type` of config.json. transformers builds its graph; an entry says where our layers go in it, and
which variants would not be computed exactly. A new family is an entry, and tests that compare it with transformers.

A multimodal checkpoint is trained as its language model, on text alone. Its tensors and adapters keep the names of the
class that holds the whole model, which is what its users load.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

from qlora_contract.files import read_json
from qlora_contract.model_folder import NO_TOKENIZER, has_tokenizer
from qlora_contract.units import first_line
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.rotary import LONGROPE
from qlora_trainer.modeling.stored import formats, gguf
from qlora_trainer.modeling.weight_files import has_weights, tensor_names

log = logging.getLogger(__name__)

Refusal = Callable[[Any], str | None]
"""transformers' configuration -> why such a model is refused, to be read after its folder's name; None: it is not."""

LANGUAGE_MODEL = "model.language_model"
"""Path of the decoder in transformers' classes of multimodal models."""


def rotary_parameters(config: Any) -> list[dict[str, Any]]:
    """Of each kind of layers that has its own, or one for all."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [kind for kind in rope.values() if kind] if _by_kind(rope) else [rope]


def _by_kind(rope: dict[str, Any]) -> bool:
    return bool(rope) and all(kind is None or isinstance(kind, dict) for kind in rope.values())


LAYERS = "num_hidden_layers"
LARGEST: dict[str, int] = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "moe_intermediate_size": 2**20,
    "shared_intermediate_size": 2**20,
    LAYERS: 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 2**14,
    "max_position_embeddings": 2**31,
    "num_experts": 4096,
    "num_experts_per_tok": 4096,
    "linear_num_key_heads": 4096,
    "linear_num_value_heads": 4096,
    "linear_key_head_dim": 2**14,
    "linear_value_head_dim": 2**14,
    "linear_conv_kernel_dim": 1024,
}
"""Sizes of config.json -> many times the largest of any model: a graph of more would take all memory to be built."""
MOST_LABELS = 100_000
MOST_EXPERTS = 2**17
"""In all layers."""


def absurd_sizes(config: Any) -> str | None:
    """A graph is built of as many modules as the configuration says."""
    for name, largest in LARGEST.items():
        value = getattr(config, name, None)
        zero = name.startswith(("num_experts", "shared"))  # as dense models of such a family have it
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or not (1 - zero) <= value <= largest
        ):
            return f"has a config.json in which {name} is {str(value)[:40]}; expected is a whole number up to {largest}"
    experts = config.num_hidden_layers * (getattr(config, "num_experts", None) or 0)
    return (
        f"has {experts} experts in all layers; up to {MOST_EXPERTS} are read"
        if experts > MOST_EXPERTS
        else None
    )


def length_dependent_rope(config: Any) -> str | None:
    """A packed sample must be rotated as it would be alone: see modeling.rotary."""
    ropes = rotary_parameters(config)
    kinds = [rope.get("rope_type") for rope in ropes]
    if "dynamic" in kinds:
        return "uses 'dynamic' rotary embeddings, which packing cannot keep exact"
    if LONGROPE not in kinds:
        return None
    if _by_kind(config.rope_parameters):
        return "uses 'longrope' rotary embeddings in layers of some kind, which packing cannot keep exact"
    short, long = (_factors(ropes[0].get(name)) for name in ("short_factor", "long_factor"))
    if not short or len(short) != len(long):
        return "uses 'longrope' rotary embeddings without as many numbers above 0 in long_factor as in short_factor"
    first = ropes[0].get("original_max_position_embeddings")
    if not isinstance(first, int) or isinstance(first, bool) or first < 1:
        return f"has an original_max_position_embeddings of {str(first)[:40]}; expected is a number of tokens"
    return None


def _factors(found: Any) -> list[float]:
    """Empty where they are none."""
    right = isinstance(found, list) and all(isinstance(n, int | float) and 0 < n < math.inf for n in found)
    return found if right else []


def bidirectional_attention(config: Any) -> str | None:
    """A causal language model sees only what stands before."""
    if getattr(config, "use_bidirectional_attention", False):
        return "sees the tokens behind each token, too (use_bidirectional_attention): it is no causal language model"
    return None


def mixture_of_experts(config: Any) -> str | None:
    """Experts are trained around in families whose entry says where they are."""
    if experts := getattr(config, "num_local_experts", 0):
        return f"is a mixture of experts (num_local_experts is {experts}); its dense variants can be trained"
    return None


def impossible_routing(config: Any) -> str | None:
    """A router chooses among the experts that there are."""
    if (config.num_experts_per_tok or 0) > (config.num_experts or 0):
        return f"chooses {config.num_experts_per_tok} of {config.num_experts} experts for each token"
    return None


def other_delta_nets(config: Any) -> str | None:
    """modeling.delta_net has one formula."""
    if config.hidden_act != "silu":
        return f"has the activation {str(config.hidden_act)[:40]!r} in its linear attention; only 'silu' is computed"
    if config.linear_num_value_heads % config.linear_num_key_heads:
        return (
            f"has {config.linear_num_value_heads} heads of values (linear_num_value_heads), which is no multiple of "
            f"its {config.linear_num_key_heads} heads of keys (linear_num_key_heads)"
        )
    if not getattr(config, "attn_output_gate", True):
        return "has attention without a gate (attn_output_gate is false), which transformers does not build"
    return None


_REFUSALS: tuple[Refusal, ...] = (
    formats.refusal, length_dependent_rope, bidirectional_attention, mixture_of_experts
)  # fmt: skip
_MIXTURE_REFUSALS: tuple[Refusal, ...] = (
    formats.refusal, length_dependent_rope, bidirectional_attention, impossible_routing
)  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """Which modules compute layers.RmsNorm's formula, and how."""

    epsilon: str = "variance_epsilon"
    """The attribute that holds eps of these modules, and of no others."""
    wide: bool = False
    """The product with the weight is rounded, not what is multiplied with it."""
    offset: float = 0.0
    """Added to the stored weight."""


EXPERTS = "experts"
"""Last part of the paths of the modules that hold a layer's experts."""


@dataclass(frozen=True)
class Mixture:
    """What the experts of a layer look like."""

    width: str = "moe_intermediate_size"
    """An expert's width in config.json."""
    joined: tuple[str, ...] = ()
    """Names of the experts' matrices that checkpoints have in one tensor (experts, in, out), with biases (experts, out)
    under the same names and `_bias`. Empty: they have a matrix (out, in) of each expert."""
    clamped: bool = False
    """Experts compute layers.ClampedGatedMlp's formula; else their MLP is the family's gated_mlp."""


@dataclass(frozen=True)
class Family:
    """What the loader has to know of a family's graph. The defaults are Llama's, which most others follow."""

    members: str
    """Which models it has, for docs/models.md."""
    decoder: str = "model"
    """Path of the decoder in transformers' causal language model; a decoder saved alone leaves it out of its names."""
    head: str = "lm_head"
    """Path of the output head, which is neither quantized nor adapted."""
    norm: Norm | None = field(default_factory=Norm)
    """None: the norms are transformers' own."""
    gated_mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """Names of the linear layers of the modules that compute layers.GatedMlp's formula, where config.json's activation
    is one of passes.ACTIVATIONS; two where gate and up are one layer. Empty: the module is transformers' own."""
    intermediate: str = "intermediate_size"
    """The MLP's width in config.json."""
    experts: Mixture | None = None
    """None: it has none."""
    softcap: str | None = None
    """What in config.json bounds the logits, by a tanh; None: nothing does."""
    logits_divisor: str | None = None
    """What in config.json the logits are divided by; None: they are not."""
    attention: frozenset[str] = frozenset({"full_attention", "sliding_attention"})
    """The kinds of config.json's layer_types whose layers keep packed samples apart."""
    delta_net: str | None = None
    """Last part of the paths of the modules that compute delta_net.GatedDeltaNet's formula; None: it has none."""
    untrained: tuple[str, ...] = ()
    """Prefixes of stored tensors that are of no part of the causal language model."""
    refusals: tuple[Refusal, ...] = _REFUSALS
    wrapped: bool = False
    """The checkpoint is a multimodal model's, whose language model this is."""

    def refusal(self, config: Any) -> str | None:
        """The first reason for which a model of this family is refused; None if there is none."""
        for kind in getattr(config, "layer_types", None) or ():
            if kind not in self.attention:
                return f"has layers of {kind!r}, which packing cannot keep exact"
        return next(filter(None, (refuse(config) for refuse in self.refusals)), None)

    def name_in_graph(self, stored: str) -> str | None:
        """A stored tensor's name in transformers' causal language model; None: it is of a part that is not trained."""
        if stored.startswith(self.untrained):
            return None
        if not self.wrapped:
            return stored
        for prefix, path in _WRAPPED.items():
            if stored.startswith(prefix):
                return None if path is None else path + stored.removeprefix(prefix)
        return stored

    @property
    def auto_class(self) -> str:
        """transformers' class that users of the whole checkpoint load, which the adapter is named for."""
        return "AutoModelForImageTextToText" if self.wrapped else "AutoModelForCausalLM"

    def adapts(self, path: str) -> bool:
        """Whether a linear layer of the graph can have an adapter.

        Not an expert's, nor one of the same name: PEFT takes that for the tensor that holds all experts' weights.
        """
        if self.experts is None:
            return True
        return f".{EXPERTS}." not in path and path.rpartition(".")[2] not in self.gated_mlp

    def public_name(self, path: str) -> str:
        """The path of a layer of the graph in the class that its users load: what adapters and targets are named by."""
        if self.wrapped and path.startswith(f"{self.decoder}."):
            return LANGUAGE_MODEL + path.removeprefix(self.decoder)
        return path


_WRAPPED: dict[str, str | None] = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    f"{LANGUAGE_MODEL}.": "model.",
    "vision_tower.": None,
    "model.vision_tower.": None,
    "multi_modal_projector.": None,
    "model.multi_modal_projector.": None,
    "model.visual.": None,
}
"""Prefixes of tensors in multimodal checkpoints, as files have them or as in transformers' classes -> in the graph."""

_GEMMA = Norm(epsilon="eps", wide=True, offset=1.0)
_FUSED = ("gate_up_proj", "down_proj")

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 2, 3.x, SmolLM2, TinyLlama, R1-Distill-Llama"),
    "mistral": Family("Mistral 7B, Nemo, Ministral 8B (2410), Mistral Small 3 (text of)"),
    "qwen2": Family("Qwen2.5, Qwen2.5-Coder, R1-Distill-Qwen"),
    "qwen3": Family("Qwen3 0.6B to 32B, Thinking and Instruct 2507"),
    "qwen3_moe": Family(
        "Qwen3 30B-A3B, 235B-A22B",
        experts=Mixture(),
        refusals=_MIXTURE_REFUSALS,
    ),
    "gpt_oss": Family(
        "gpt-oss 20B and 120B",
        norm=Norm(wide=True),
        gated_mlp=(),
        experts=Mixture(width="intermediate_size", joined=("gate_up_proj", "down_proj"), clamped=True),
        refusals=_MIXTURE_REFUSALS,
    ),
    "qwen3_5_text": Family(
        "the text part of Qwen3.5 0.8B to 27B (dense)",
        norm=_GEMMA,
        attention=frozenset({"full_attention", "linear_attention"}),
        delta_net="linear_attn",
        untrained=("mtp.",),  # layers that predict further tokens
        refusals=(*_REFUSALS, other_delta_nets),
    ),
    "gemma2": Family("Gemma 2 2B, 9B, 27B", norm=_GEMMA, softcap="final_logit_softcapping"),
    "gemma3_text": Family(
        "Gemma 3 270M, 1B; the text part of 4B, 12B, 27B", norm=_GEMMA, softcap="final_logit_softcapping"
    ),
    "phi3": Family("Phi-3 mini, Phi-3.5 mini, Phi-4, Phi-4-mini", gated_mlp=_FUSED),
    "glm": Family("GLM-4 9B (chat-hf)", gated_mlp=_FUSED),
    "glm4": Family("GLM-4 0414 9B and 32B, GLM-Z1", gated_mlp=_FUSED),
    "smollm3": Family("SmolLM3 3B"),
    "granite": Family("Granite 3.x 2B and 8B", logits_divisor="logits_scaling"),
    "granitemoehybrid": Family(
        "Granite 4 350M and 1B (dense, without Mamba layers)",
        gated_mlp=("input_linear", "output_linear"),
        intermediate="shared_intermediate_size",
        logits_divisor="logits_scaling",
    ),
    "olmo2": Family("OLMo 2 1B to 32B", norm=Norm(wide=True)),
    "olmo3": Family("OLMo 3 7B and 32B", norm=Norm(wide=True)),
    "ministral": Family("Ministral, with sliding and full layers"),
    "ministral3": Family("Ministral 3 3B, 8B, 14B (text of)"),
}
"""By config.json's model_type."""

WRAPPERS = {
    "gemma3": "Gemma 3 4B, 12B, 27B",
    "mistral3": "Mistral Small 3.1 and later, Ministral 3",
    "qwen3_5": "Qwen3.5 0.8B to 27B (dense)",
}
"""Multimodal models whose language model is of one of the FAMILIES, by config.json's model_type."""

INSTEAD = {"chatglm": "zai-org/glm-4-9b-chat-hf (model_type glm) or zai-org/GLM-4-9B-0414 (glm4)"}
"""Models that only code of their own repository can build, by model_type, and like ones that need none."""


def read_config(folder: Path) -> Any:
    """The second part of read_model."""
    return read_model(folder)[1]


def read_model(folder: Path) -> tuple[Family, Any]:
    """The family of a model folder, and transformers' configuration of its language model.

    Raises:
        ModelError: there is none, it cannot be read, its family is not in FAMILIES, or the family refuses it.
    """
    source = gguf.from_pretrained_arguments(folder, better="config.json")
    if not source and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: model.source must be a Hugging Face model folder")
    check_written(folder)
    if reason := gguf.refusal(folder):
        raise ModelError(f"{folder} {reason}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **source)
    except Exception as error:  # transformers has no errors of its own for a file that makes no sense
        file = source.get("gguf_file", "config.json")
        raise ModelError(f"{folder}/{file} cannot be read: {first_line(error)}") from error
    wrapped = config.model_type in WRAPPERS
    if wrapped:
        config = language_model_config(folder, config)
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES.keys() | WRAPPERS.keys()))
        raise ModelError(f"{folder} is a {config.model_type!r} model; supported are {known}")
    family = replace(FAMILIES[config.model_type], wrapped=wrapped)
    if reason := absurd_sizes(config) or family.refusal(config):
        raise ModelError(f"{folder} {reason}")
    if (config.pad_token_id or 0) >= config.vocab_size:
        config.pad_token_id = None  # a row of the embedding that is not there; nothing here is padded with it
    for name, value in list(vars(config).items()):
        if name.endswith(("dropout", "pdrop")) and value:
            log.warning("%s/config.json asks for %s %s: not applied", folder, name, value)
            setattr(config, name, 0.0)
    return family, config


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder. Raises ModelError."""
    try:
        of_gguf = gguf.from_pretrained_arguments(folder, better="tokenizer.json")
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **of_gguf
        )
    except Exception as error:  # tokenizers raises plain Exceptions
        if folder.is_dir() and not has_tokenizer([file.name for file in folder.iterdir()]):
            raise ModelError(f"{folder} {NO_TOKENIZER}") from error
        raise ModelError(f"{folder} has no tokenizer that can be read: {first_line(error)}") from error


def check_written(folder: Path) -> None:
    """Raise ModelError for a config.json that transformers should not even be given.

    That is one of a model that only Python files of its repository can build, which are never run; one that is no
    JSON object; and one with more labels or layers than any model has: transformers would make a name for each.
    """
    path = folder / "config.json"
    try:
        written = read_json(path)
    except FileNotFoundError:
        return  # a GGUF file has none
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(written, dict):
        raise ModelError(f"{path} cannot be read: it is not a JSON object")
    for part in (written, *(value for value in written.values() if isinstance(value, dict))):
        labels = part.get("num_labels", 0)
        if not isinstance(labels, int) or labels > MOST_LABELS:
            raise ModelError(f"{path} has a num_labels that is no number of labels: {str(labels)[:40]}")
        for name, value in part.items():
            if name.endswith(("layers", "n_layer")) and isinstance(value, int) and value > LARGEST[LAYERS]:
                raise ModelError(f"{path} has {name} {str(value)[:40]}; expected are up to {LARGEST[LAYERS]}")
    kind, code = written.get("model_type"), written.get("auto_map")
    if code and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        named = f", such as {INSTEAD[kind]}" if isinstance(kind, str) and kind in INSTEAD else ""
        raise ModelError(
            f"{folder} is a {str(kind)[:80]!r} model, which only code of its own repository can build (auto_map in "
            f"config.json), and that is never run: take a model that needs none{named}"
        )


def language_model_config(folder: Path, config: Any) -> Any:
    """The configuration of a multimodal model's language model, with what the whole model says of it.

    Whether the head is the embedding is told by whether a head is stored: published configurations say it in either
    part, and not always rightly.
    """
    text = config.text_config
    # A plan may be made of config.json alone.
    stored = tensor_names(folder) if has_weights(folder) else ()
    heads = {name for name in stored if name.endswith("lm_head.weight")}
    text.tie_word_embeddings = bool(config.tie_word_embeddings) and not heads
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    return text
