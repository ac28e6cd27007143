"""What llama.cpp calls the model families and their tensors, and in which order it keeps the numbers of these."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gguf
import torch
from torch import Tensor

from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.families import EXPERTS, LANGUAGE_MODEL

ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings that llama.cpp computes as transformers does."""


@dataclass(frozen=True)
class GgufFamily:
    """What llama.cpp calls a model family, and how it keeps its numbers."""

    architecture: str
    interleaved: bool
    """Rotary pairs are neighbors there, and half a head apart in transformers."""
    norm_offset: float = 0.0
    """What is added to the weights of norms there; transformers adds it while it computes."""
    activation: str = "silu"
    """Of the MLP."""
    full_every: int | None = None
    """Of so many layers the last has full attention, the others a window. None: there, no layer has a window."""
    refuse: Callable[[Any], str] = lambda _: ""
    """What a configuration has that llama.cpp computes in one way only, which is another; empty: nothing."""


def _every(n: int, others: str, config: Any) -> list[str]:
    """The layer_types of a model of which every nth layer has full attention."""
    layers = range(config.num_hidden_layers)
    return ["full_attention" if i % n == n - 1 else others for i in layers]


def _smollm3(config: Any) -> str:
    rotated = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    return "" if list(config.no_rope_layers) == rotated else "other no_rope_layers than every fourth"


def _olmo(config: Any) -> str:
    windows = rope_of_windows(config)
    if windows is not None and windows["rope_theta"] != rope_of(config)["rope_theta"]:
        return "another rope_theta in layers with a window"
    return "tied embeddings" if config.tie_word_embeddings else ""


LAYERS_OF_GEMMA3_27B = 62
"""By which llama.cpp knows that its scores are divided by another number."""


def _gemma(config: Any) -> str:
    of_27b = config.model_type == "gemma3_text" and config.num_hidden_layers == LAYERS_OF_GEMMA3_27B
    scale = config.hidden_size // config.num_attention_heads if of_27b else config.head_dim
    return "" if config.query_pre_attn_scalar == scale else "another query_pre_attn_scalar than head_dim"


def _gemma3(config: Any) -> str:
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        return "bounded scores or logits (attn_logit_softcapping, final_logit_softcapping)"
    return _gemma(config)


def _glm(config: Any) -> str:
    as_wide = config.head_dim * config.num_attention_heads == config.hidden_size
    return "" if as_wide else "heads that are not as wide as hidden_size together"


def _qwen3_moe(config: Any) -> str:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "layers without experts"
    return "" if config.norm_topk_prob else "a norm_topk_prob of false"


def _qwen3_5(config: Any) -> str:
    if config.linear_key_head_dim != config.linear_value_head_dim:
        return "another linear_value_head_dim than linear_key_head_dim"
    if config.layer_types != _every(full_attention_interval(config), "linear_attention", config):
        return "full layers that do not come in equal distances (layer_types)"
    return ""


def full_attention_interval(config: Any) -> int:
    """Of how many layers of Qwen3.5 one has full attention."""
    kinds = list(config.layer_types)
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1


def rope_of(config: Any) -> Mapping[str, Any]:
    """The parameters of a model's rotary embeddings; of its full layers, where the others have their own."""
    rope: Mapping[str, Any] = config.rope_parameters
    full: Mapping[str, Any] | None = rope.get("full_attention")
    return rope if full is None else full


def rope_of_windows(config: Any) -> Mapping[str, Any] | None:
    """Those of layers with a window, where they have their own."""
    found: Mapping[str, Any] | None = config.rope_parameters.get("sliding_attention")
    return found


_GEMMA2 = GgufFamily(
    "gemma2", interleaved=False, norm_offset=1.0, activation="gelu_pytorch_tanh", full_every=2, refuse=_gemma
)
_OLMO2 = GgufFamily("olmo2", interleaved=False, refuse=_olmo)
GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, architecture="gemma3", full_every=6, refuse=_gemma3),
    "glm": GgufFamily("chatglm", interleaved=False, refuse=_glm),
    "glm4": GgufFamily("glm4", interleaved=False),
    "granite": GgufFamily("granite", interleaved=True),
    "granitemoehybrid": GgufFamily("granite", interleaved=True),
    "llama": GgufFamily("llama", interleaved=True),
    "ministral": GgufFamily("llama", interleaved=True),
    "ministral3": GgufFamily("mistral3", interleaved=True),
    "mistral": GgufFamily("llama", interleaved=True),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, full_every=4),
    "phi3": GgufFamily("phi3", interleaved=False),
    "qwen2": GgufFamily("qwen2", interleaved=False),
    "qwen3": GgufFamily("qwen3", interleaved=False),
    "qwen3_5_text": GgufFamily("qwen35", interleaved=False, norm_offset=1.0, refuse=_qwen3_5),
    "qwen3_moe": GgufFamily("qwen3moe", interleaved=False, refuse=_qwen3_moe),
    "smollm3": GgufFamily("smollm3", interleaved=True, refuse=_smollm3),
}
"""By config.json's model_type."""

GGUF_REFUSED: Mapping[str, str] = {
    "gpt_oss": "llama.cpp rounds the range in which its YaRN frequencies change, and the model does not (truncate is "
    "false in its rope_parameters), so that answers would differ",
}
"""Families that are trained and not exported to GGUF -> why."""


def family_of(config: Any) -> GgufFamily:
    """The family of a model, by its configuration. Raises ModelError where no GGUF file would be the model."""
    kind = config.model_type
    family = GGUF_FAMILIES.get(kind)
    if family is None:
        known = ", ".join(sorted(GGUF_FAMILIES))
        why = GGUF_REFUSED.get(kind, f"these can: {known}")
        raise ModelError(f"a {kind!r} model cannot be exported to GGUF; {why}")
    rope = rope_of(config)
    if (rope_type := rope.get("rope_type", "default")) not in ROPE_TYPES:
        raise ModelError(f"a model with {rope_type!r} rotary embeddings cannot be exported to GGUF")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        raise ModelError(
            f"a {kind!r} model with hidden_act {activation!r} cannot be exported to GGUF; only "
            f"{family.activation} can"
        )
    if why := _other_windows(config, family) or family.refuse(config) or _stretched_otherwise(config, rope):
        raise ModelError(f"a {kind!r} model with {why} cannot be exported to GGUF: llama.cpp has it fixed")
    return family


def _other_windows(config: Any, family: GgufFamily) -> str:
    """What layers with a window have that llama.cpp's have otherwise; empty: nothing."""
    windows = rope_of_windows(config)
    if windows is not None and windows.get("rope_type", "default") != "default":
        return "scaled rotary embeddings in layers with a window"
    n = family.full_every
    if n is None or config.layer_types == _every(n, "sliding_attention", config):
        return ""
    return f"other layer_types than {n - 1} sliding and one full in turn"


def _stretched_otherwise(config: Any, rope: Mapping[str, Any]) -> str:
    """What YaRN's parameters have that llama.cpp does not compute; empty: nothing."""
    if rope.get("rope_type") != "yarn":
        return ""
    if rope.get("truncate") is False:
        return "a truncate of false in rope_parameters"
    for name, fixed in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if (rope.get(name) or fixed) != fixed:
            return f"another {name} than {fixed:g} in rope_parameters"
    scaled = 0.1 * math.log(rope["factor"]) + 1
    if config.model_type == "ministral3":
        if rope.get("mscale") != rope.get("mscale_all_dim"):
            return "another mscale than mscale_all_dim in rope_parameters"
        scaled = 1.0
    elif rope.get("mscale") or rope.get("mscale_all_dim"):
        return "an mscale in rope_parameters"
    found = rope.get("attention_factor")
    if found is not None and not math.isclose(found, scaled, rel_tol=1e-6):
        return f"another attention_factor than {scaled:g} in rope_parameters"
    return ""


_PARTS: Mapping[str, tuple[str, ...]] = {"shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj")}
_OTHERWISE: Mapping[str, str] = {
    "shared_mlp.output_linear": "mlp.down_proj",
    "linear_attn.dt_bias": "linear_attn.dt_proj.bias",
}
"""Names of transformers that gguf's table has under others, or in two."""
_OF_EXPERT = re.compile(rf"\.{EXPERTS}\.(\d+)\.")


class GgufNames:
    """How GGUF calls and orders the tensors of a model.

    Args:
        config: transformers' configuration of the model.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._family = family_of(config)
        architecture = next(
            a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self._family.architecture
        )
        self._map = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def names(self, path: str) -> tuple[str, ...]:
        """GGUF's names of what a tensor of transformers' causal language model becomes, in the order of its rows.

        All experts of a layer are in one tensor, so that their names are the same: see `expert`.

        Raises:
            ModelError: it has none.
        """
        asked = _OF_EXPERT.sub(f".{EXPERTS}.", path.replace(f"{LANGUAGE_MODEL}.", "model.", 1))
        spelled = [asked]
        for layer, others in (*_PARTS.items(), *((old, (new,)) for old, new in _OTHERWISE.items())):
            if f".{layer}" in asked:
                spelled = [asked.replace(layer, other) for other in others]
        found = [self._map.get_name(each, try_suffixes=(".weight", ".bias")) for each in spelled]
        if None in found:
            raise ModelError(f"GGUF has no name for {path} of a {self._config.model_type!r} model")
        return tuple(str(name) for name in found)

    @staticmethod
    def expert(path: str) -> int | None:
        """Which matrix of GGUF's tensor a tensor is; None: it is all of it."""
        match = _OF_EXPERT.search(path)
        return None if match is None else int(match[1])

    def to_gguf(self, path: str, tensor: Tensor) -> list[Tensor]:
        """A tensor of transformers as llama.cpp keeps it, one for each of `names`."""
        return self.split(
            path, self.rows_to_gguf(path, self.columns_to_gguf(path, self._value(path, tensor)))
        )

    def shapes(self, path: str, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shapes of what a tensor of that shape becomes."""
        parts = self.split(path, self._flat(path, torch.empty(tuple(shape), device="meta")))
        return [tuple(part.shape) for part in parts]

    def split(self, path: str, rows: Tensor) -> list[Tensor]:
        """Rows in llama.cpp's order, one tensor for each of `names`."""
        return list(rows.chunk(len(self.names(path))))

    def rows_to_gguf(self, path: str, rows: Tensor) -> Tensor:
        """The rows of a tensor in llama.cpp's order: of a weight, or of an adapter's B."""
        order = self._row_order(path, len(rows))
        return rows if order is None else rows[order]

    def columns_to_gguf(self, path: str, columns: Tensor) -> Tensor:
        """The columns of a tensor in llama.cpp's order: of a weight, or of an adapter's A."""
        order = self._column_order(path)
        return columns if order is None else columns[:, order]

    def from_gguf(self, path: str, parts: Sequence[Tensor], shape: Sequence[int] | None = None) -> Tensor:
        """The inverse of to_gguf. `shape`: of transformers' tensor, where that is another."""
        tensor = self.columns_from_gguf(path, self.rows_from_gguf(path, torch.cat(list(parts))))
        if self._is_offset(path):
            tensor = tensor - self._family.norm_offset
        if path.endswith(".A_log"):
            tensor = (-tensor).log()
        return tensor if shape is None else tensor.reshape(tuple(shape))

    def rows_from_gguf(self, path: str, rows: Tensor) -> Tensor:
        """The inverse of rows_to_gguf."""
        order = self._row_order(path, len(rows))
        return rows if order is None else rows[order.argsort()]

    def columns_from_gguf(self, path: str, columns: Tensor) -> Tensor:
        """The inverse of columns_to_gguf."""
        order = self._column_order(path)
        return columns if order is None else columns[:, order.argsort()]

    def _value(self, path: str, tensor: Tensor) -> Tensor:
        if self._is_offset(path):
            return tensor.float() + self._family.norm_offset
        if path.endswith(".A_log"):
            return -tensor.float().exp()  # the decay itself
        return self._flat(path, tensor)

    @staticmethod
    def _flat(path: str, tensor: Tensor) -> Tensor:
        """A convolution has one input channel for each output channel, and there no dimension for it."""
        return tensor.squeeze(1) if path.endswith("conv1d.weight") else tensor

    def _is_offset(self, path: str) -> bool:
        own = path.endswith(
            "linear_attn.norm.weight"
        )  # Qwen3.5's norm behind a delta network is stored whole
        return self._family.norm_offset != 0 and path.endswith("norm.weight") and not own

    def _row_order(self, path: str, count: int) -> Tensor | None:
        """Which row of transformers each row of llama.cpp's is; None: the same."""
        layer = path.rpartition(".")[0].rpartition(".")[2]
        config = self._config
        if self._family.interleaved and layer in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
            return torch.arange(count).view(heads, 2, -1).transpose(1, 2).reshape(-1)
        if ".linear_attn." not in path:
            return None
        size = config.linear_value_head_dim
        values = config.linear_num_value_heads
        if layer in ("in_proj_qkv", "conv1d"):
            before = count - values * size  # queries and keys
            return torch.cat([torch.arange(before), before + self._value_heads(size)])
        if layer == "in_proj_z":
            return self._value_heads(size)
        if layer in ("in_proj_a", "in_proj_b") or path.endswith((".A_log", ".dt_bias")):
            return self._value_heads(1)
        return None

    def _column_order(self, path: str) -> Tensor | None:
        of_values = path.endswith("linear_attn.out_proj.weight")
        return self._value_heads(self._config.linear_value_head_dim) if of_values else None

    def _value_heads(self, size: int) -> Tensor:
        """The order of a delta network's values there: the heads that share a key's head take turns, here they are
        neighbors. `size`: numbers of a head."""
        keys, values = self._config.linear_num_key_heads, self._config.linear_num_value_heads
        return torch.arange(values * size).view(keys, values // keys, size).transpose(0, 1).reshape(-1)
