"""The small models that are compared with transformers, peft and bitsandbytes; docs/models.md lists them."""

from typing import Any

from small_models import SMALL_OF

WIDE = {"intermediate_size": 128, "initializer_range": 0.12}
"""All widths multiples of 64 (bitsandbytes' AVX-512 dequantise needs it); weights large enough for lively attention."""
SLIDING = {"sliding_window": 8}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LONGROPE = {
    "original_max_position_embeddings": 20,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 20,
        "partial_rotary_factor": 1.0, "short_factor": [1.5] * 8, "long_factor": [4.0] * 8,
    },
}  # fmt: skip
"""Some samples are longer than the short factors reach."""
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MIXTURES = ("qwen3_moe", "gpt_oss")
PARITY_CASES: dict[str, tuple[str, str, str, list[str], dict[str, Any]]] = {
    "llama, double": ("llama", "nf4, double", "float32", ["all-linear"], {}),
    "llama, single": ("llama", "nf4", "float32", ["all-linear"], {}),
    "llama, unquantised": ("llama", "none", "float32", ["all-linear"], {}),
    "llama, stored in bf16": ("llama", "nf4, double", "bfloat16", ["all-linear"], {}),
    "llama, untied": ("llama", "nf4, double", "float32", ["all-linear"], {"tie_word_embeddings": False}),
    "llama, untied, bf16": ("llama", "nf4", "bfloat16", ["all-linear"], {"tie_word_embeddings": False}),
    "llama, scaled rope": ("llama", "none", "float32", ["all-linear"], {"rope_parameters": LLAMA3}),
    "llama, biases": ("llama", "nf4", "float32", ["all-linear"], {"attention_bias": True, "mlp_bias": True}),
    "llama, q and v": ("llama", "nf4, double", "float32", ["q_proj", "v_proj"], {}),
    "llama, one whole path": ("llama", "nf4, double", "float32", ["model.layers.1.mlp.up_proj"], {}),
    "llama, path and name": ("llama", "nf4", "float32", ["model.layers.0.self_attn.o_proj", "down_proj"], {}),
    "qwen2": ("qwen2", "nf4, double", "float32", ["all-linear"], {}),
    "qwen2, sliding": (
        "qwen2", "nf4", "float32", ["all-linear"],
        {**SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", "nf4, double", "float32", ["all-linear"], {"head_dim": 32}),
    "mistral": ("mistral", "nf4, double", "float32", ["all-linear"], {"sliding_window": None}),
    "mistral, sliding": ("mistral", "nf4, double", "float32", ["all-linear"], SLIDING),
    **{
        f"{kind}, {'tied' if tied else 'untied'}": (
            kind, scheme, "float32", ["all-linear"], {"tie_word_embeddings": tied},
        )
        for kind in sorted(SMALL_OF.keys() - {"qwen3"})
        # bitsandbytes leaves experts as they are, which ours quantizes, too.
        for tied, scheme in ((True, "none" if kind in MIXTURES else "nf4, double"), (False, "none"))
    },
    "qwen3_moe, a dense layer": (
        "qwen3_moe", "none", "float32", ["all-linear"], {"mlp_only_layers": [0], "norm_topk_prob": False},
    ),
    "gemma2, stored in bf16": ("gemma2", "nf4", "bfloat16", ["all-linear"], {}),
    "gemma3_text, stored in bf16": ("gemma3_text", "nf4", "bfloat16", ["all-linear"], {}),
    "gemma3, one whole path": (
        "gemma3", "none", "float32", ["model.language_model.layers.1.self_attn.q_proj", "down_proj"], {},
    ),
    "phi3, longrope": ("phi3", "none", "float32", ["qkv_proj", "down_proj"], LONGROPE),
    "phi3, partly rotated": (
        "phi3", "none", "float32", ["all-linear"],
        {**SLIDING, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "granitemoehybrid, without positions": (
        "granitemoehybrid", "none", "float32", ["all-linear"], {"position_embedding_type": None},
    ),
    "gemma3_text, linear": ("gemma3_text", "none", "float32", ["q_proj"], {"rope_parameters": TWO_ROPES}),
}  # fmt: skip
"""Name -> model_type, base weights, stored type, targetModules, and what config.json says besides SMALL_OF."""
