"""What small random models of each architecture are made with."""

from typing import Any

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 32,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GRANITE = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.5,
}  # fmt: skip
_QWEN3_5 = {
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}  # fmt: skip
_GEMMA3 = {**_WINDOW, "head_dim": 32, "query_pre_attn_scalar": 24}
SMALL_OF: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
    },
    "gpt_oss": {
        **_WINDOW, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0.7,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        },
    },
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5": {
        "model_type": "qwen3_5_text", **_QWEN3_5,
        "vision_config": {
            "hidden_size": 64, "intermediate_size": 64, "depth": 1, "num_heads": 1, "patch_size": 4,
            "out_hidden_size": 64, "num_position_embeddings": 16,
        },
    },
    "gemma2": {
        **_WINDOW, "head_dim": 32, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": _GEMMA3,
    "gemma3": {**_GEMMA3, "vision_config": _VISION},
    "phi3": {},
    "glm": {"head_dim": 32, "attention_bias": True},
    "glm4": {"head_dim": 32, "attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": _GRANITE,
    "granitemoehybrid": {
        **_GRANITE, "shared_intermediate_size": 128, "num_local_experts": 0, "num_experts_per_tok": 0,
        "layer_types": ["full_attention", "full_attention"], "position_embedding_type": "rope", "mamba_n_heads": 8,
    },
    "olmo2": {},
    "olmo3": _WINDOW,
    "ministral": {**_WINDOW, "head_dim": 32},
    "ministral3": {"head_dim": 32, "rope_parameters": _YARN},
    "mistral3": {"model_type": "ministral3", "head_dim": 32, "rope_parameters": _YARN, "vision_config": _VISION},
}  # fmt: skip
"""What else a small model of a kind is made with, so that everything special to its kind is at work."""
