"""Small models as llama.cpp can have them: what it has fixed of a family."""

from typing import Any

_GEMMA = {
    "num_hidden_layers": 6,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    "query_pre_attn_scalar": 32,
}
_QWEN3_5 = {"linear_key_head_dim": 32}
FIXED: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "gemma2": {"query_pre_attn_scalar": 32},
    "glm": {"head_dim": 16},
    "ministral": {"sliding_window": 512},
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": {"tie_word_embeddings": False},
    "olmo3": {
        "tie_word_embeddings": False,
        "num_hidden_layers": 4,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"],
    },
    "qwen3_5": _QWEN3_5,
    "qwen3_5_text": _QWEN3_5,
}
"""By config.json's model_type; beside `SMALL_OF` of small_models."""
TARGETS: dict[str, str] = {
    **dict.fromkeys(("gemma3", "mistral3"), r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"),
    "qwen3_5": r".*language_model.*(_proj|_proj_(qkv|z|a|b))",
    "qwen3_moe": r".*self_attn.*_proj",
}
"""For PEFT, where "all-linear" would take layers of a vision tower, or a router."""


def a_config(kind: str = "llama", **values: Any) -> Any:
    """A configuration of a small model, of which nothing is built."""
    from transformers import AutoConfig

    known = {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": True,
    }  # fmt: skip
    return AutoConfig.for_model(kind, **{**known, **values})
