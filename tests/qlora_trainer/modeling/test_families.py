"""Which models are refused by their config.json, and what a family says of its graph."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from gguf_models import FIXED
from model_folders import by_transformers, configure, stock_model
from qlora_contract.run_config import Adapter
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import ModelError
from qlora_trainer.export.gguf_names import GGUF_FAMILIES, GgufNames
from qlora_trainer.modeling import families
from qlora_trainer.modeling.expert_adapters import A
from qlora_trainer.modeling.families import FAMILIES, WRAPPERS, Family, read_config, read_model
from qlora_trainer.modeling.layers import ClampedGatedMlp, FusedGatedMlp, GatedMlp, RmsNorm
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.lora import attach_adapters
from qlora_trainer.modeling.lora_linear import LoraLinear
from qlora_trainer.modeling.shape import adapter_shapes
from qlora_trainer.quantization.schemes import Unquantized
from small_models import SMALL, SMALL_OF

pytestmark = pytest.mark.process

Make = Callable[..., Path]
Loss = Callable[..., Tensor]
LIVELY = {"vocab_size": 300, "initializer_range": 0.12}
"""Few words; weights large enough for lively attention."""


CONFIGURATIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "has no config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "other architecture": (lambda f: configure(f, model_type="gpt2"), "'gpt2' model; supported are gemma2, gemma3,"),
    "another mixture of experts": (lambda f: configure(f, model_type="mixtral"), "'mixtral' model; supported are"),
    "a router that chooses more experts than there are": (
        lambda f: configure(f, model_type="gpt_oss", num_local_experts=4, num_experts_per_tok=5),
        "chooses 5 of 4 experts for each token",
    ),
    "unknown architecture": (lambda f: configure(f, model_type="nonesuch"), "config.json cannot be read"),
    "wrong type": (lambda f: configure(f, hidden_size="wide"), "config.json cannot be read.*hidden_size"),
    "quantized": (
        lambda f: configure(f, quantization_config={"quant_method": "quanto"}), "is quantized by 'quanto'",
    ),
    "dynamic rope": (
        lambda f: configure(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'",
    ),
    "dynamic rope of one kind of layers": (
        lambda f: configure(
            f, model_type="gemma3_text",
            rope_parameters={
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        "'dynamic'",
    ),
    "longrope of one kind of layers": (
        lambda f: configure(
            f, model_type="gemma3_text",
            rope_parameters={
                "full_attention": {
                    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 64,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        "'longrope' rotary embeddings in layers of some kind",
    ),
    **{
        f"longrope, {name}": (
            lambda f, values=values: configure(
                f, rope_parameters={
                    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 64, **values,
                },
            ),
            message,
        )
        for name, values, message in (
            ("factors that are fewer", {"long_factor": [2.0] * 7}, "as many numbers above 0 in long_factor"),
            ("a factor of 0", {"long_factor": [2.0] * 7 + [0]}, "as many numbers above 0 in long_factor"),
            ("no factors", {"long_factor": None}, "as many numbers above 0 in long_factor|cannot be read"),
            ("no length", {"original_max_position_embeddings": 0}, "original_max_position_embeddings of 0; expected"),
        )
    },
    "an embedding model": (
        lambda f: configure(f, model_type="gemma3_text", use_bidirectional_attention=True),
        r"tokens behind each token, too \(use_bidirectional_attention\)",
    ),
    "Mamba layers": (
        lambda f: configure(f, model_type="granitemoehybrid", layer_types=["linear_attention", "full_attention"]),
        "layers of 'linear_attention'",
    ),
    "experts": (
        lambda f: configure(
            f, model_type="granitemoehybrid", layer_types=["full_attention"] * 2, num_local_experts=4,
        ),
        r"mixture of experts \(num_local_experts is 4\)",
    ),
    "code of its own, with a native relative": (
        lambda f: configure(f, model_type="chatglm", auto_map={"AutoConfig": "configuration_chatglm.ChatGLMConfig"}),
        r"'chatglm' model, which only code of its own.*\(auto_map in config.json\).*zai-org/glm-4-9b-chat-hf",
    ),
    "code of its own": (
        lambda f: configure(f, model_type="homemade", auto_map={"AutoConfig": "configuration_homemade.Config"}),
        "'homemade' model, which only code of its own.*take a model that needs none$",
    ),
    "a multimodal model of another language model": (
        lambda f: configure(f, model_type="gemma3", text_config={"model_type": "gpt2"}, vision_config={}),
        "'gpt2' model",
    ),
    "a multimodal model in an unknown form": (
        lambda f: configure(
            f, model_type="mistral3", text_config={"model_type": "mistral"},
            quantization_config={"quant_method": "quip"},
        ),
        "is quantized by .quip., which is not read",
    ),
    "old dynamic rope": (
        lambda f: configure(f, rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}), "'dynamic'",
    ),
    **{
        f"linear attention, {name}": (
            lambda f, values=values: configure(f, model_type="qwen3_5_text", **values), message,
        )
        for name, values, message in (
            ("another activation", {"hidden_act": "gelu"}, "the activation 'gelu' in its linear attention"),
            (
                "heads that do not divide", {"linear_num_value_heads": 3, "linear_num_key_heads": 2},
                r"3 heads of values \(linear_num_value_heads\), which is no multiple of its 2 heads of keys",
            ),
            ("no gate", {"attn_output_gate": False}, "attention without a gate"),
            ("no heads", {"linear_num_key_heads": 0}, "linear_num_key_heads is 0; expected is a whole number"),
            ("far too many", {"linear_conv_kernel_dim": 10**6}, "linear_conv_kernel_dim is 1000000; expected"),
            ("windows beside it", {"layer_types": ["linear_attention", "sliding_attention"]}, "'sliding_attention'"),
        )
    },
    "a mixture of experts with linear attention": (
        lambda f: configure(f, model_type="qwen3_5_moe_text"), "'qwen3_5_moe_text' model; supported are",
    ),
    "attention of another kind": (
        lambda f: configure(f, layer_types=["full_attention", "linear_attention"]), "layers of 'linear_attention'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_refuses_what_it_cannot_train_exactly(
    damage: Callable[[Path], Any], message: str, copied: Make
) -> None:
    """config.json is refused, with the reason, before any weight is read."""
    folder = copied("llama")
    damage(folder)

    with pytest.raises(ModelError, match=message):
        read_config(folder)


# --- the graphs


NORMS = {
    "llama": 5, "mistral": 5, "qwen2": 5, "qwen3": 9, "gemma2": 9, "gemma3_text": 13, "gemma3": 13, "phi3": 5, "glm": 5,
    "glm4": 9, "smollm3": 5, "granite": 5, "granitemoehybrid": 5, "olmo2": 9, "olmo3": 9, "ministral": 5,
    "ministral3": 5, "mistral3": 5, "qwen3_moe": 9, "gpt_oss": 5, "qwen3_5_text": 7, "qwen3_5": 7,
}  # fmt: skip
"""Of two decoder layers and behind them; some have norms of queries and keys, or behind attention and MLP, too."""
LINEARS = {
    "phi3": 8, "glm": 12, "glm4": 12, "granitemoehybrid": 12, "qwen3_moe": 2 * (4 + 4 * 3),
    "gpt_oss": 2 * (4 + 4 * 2), "qwen3_5_text": 8 + 7, "qwen3_5": 8 + 7,
}  # fmt: skip
"""Of two decoder layers, where each has not seven."""
MLPS = {"qwen3_moe": 4, "gpt_oss": 4}
"""Of a decoder layer, where there is more than one."""


def test_every_family_is_tested() -> None:
    """A family of the table is one of those below."""
    assert NORMS.keys() == FAMILIES.keys() | WRAPPERS.keys()


@pytest.mark.parametrize(("kind", "norms"), NORMS.items(), ids=NORMS)
def test_every_layer_of_a_family_s_graph_is_ours(kind: str, norms: int, small_model: Make) -> None:
    """All norms, gated MLPs and linear layers of two decoder layers are replaced by the ones that keep less."""
    model = load_model(small_model(kind, **LIVELY), Unquantized(), torch.float32)
    modules = list(model.graph.modules())

    assert sum(isinstance(module, RmsNorm) for module in modules) == norms
    assert sum(
        isinstance(module, GatedMlp | FusedGatedMlp | ClampedGatedMlp) for module in modules
    ) == 2 * MLPS.get(kind, 1)
    assert sum(isinstance(module, LoraLinear) for module in modules) == LINEARS.get(kind, 14)
    assert not any(isinstance(module, torch.nn.Linear | torch.nn.Embedding) for module in modules)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_multimodal_model_s_layers_are_named_as_in_the_class_its_users_load(
    kind: str, small_model: Make
) -> None:
    """Every adapted layer is one of the stock class's language model, and none of its vision tower."""
    folder = small_model(kind, **LIVELY)
    model = load_model(folder, Unquantized(), torch.float32)

    linears = {
        name for name, part in stock_model(folder).named_modules() if isinstance(part, torch.nn.Linear)
    }
    assert set(model.linears) == {name for name in linears if name.startswith("model.language_model.")}
    assert all(layer.name == name for name, layer in model.linears.items())


def test_another_activation_keeps_transformers_mlp(
    small_model: Make, samples: Samples, loss_of: Loss
) -> None:
    """Where hidden_act is not silu, the MLP's formula is another one, and stays transformers' own."""
    folder = small_model("llama", **LIVELY, hidden_act="gelu")
    model = load_model(folder, Unquantized(), torch.float32)

    assert not any(isinstance(module, GatedMlp) for module in model.graph.modules())
    assert float(loss_of(model)) == pytest.approx(by_transformers(folder, samples), rel=1e-6)


def test_a_new_family_is_one_entry(
    monkeypatch: pytest.MonkeyPatch, small_model: Make, samples: Samples, loss_of: Loss
) -> None:
    """A family that was refused so far is loaded and trained once it is in the table."""
    folder = small_model("seed_oss", **LIVELY, head_dim=16)
    with pytest.raises(ModelError, match=r"is a 'seed_oss' model; supported are gemma2"):
        read_config(folder)
    monkeypatch.setitem(families.FAMILIES, "seed_oss", Family("Seed-OSS"))
    model = load_model(folder, Unquantized(), torch.float32)
    model.graph.train()
    parameters = attach_adapters(model.linears, rank=3, alpha=6.0, dropout=None, seed=0)
    packed = loss_of(model)
    packed.backward()

    assert float(packed.detach()) == pytest.approx(by_transformers(folder, samples), rel=1e-6)
    assert bool(parameters.gradient.any())


def test_a_family_refuses_what_its_entry_says(monkeypatch: pytest.MonkeyPatch, small_model: Make) -> None:
    """A reason of an entry is read after the folder's name."""
    folder = small_model("llama", **LIVELY)
    refusing = Family(
        "Llama", refusals=(lambda config: f"has {config.num_hidden_layers} layers" if config else None,)
    )
    monkeypatch.setitem(families.FAMILIES, "llama", refusing)

    with pytest.raises(ModelError, match=f"^{folder} has 2 layers$"):
        read_config(folder)


@pytest.mark.parametrize("kind", ["gemma3_text", "phi3"])
def test_dropout_of_the_base_is_not_applied(kind: str, copied: Make) -> None:
    """What a frozen base would drop while it is trained is left in, wherever config.json asks for it."""
    names = {"attention_dropout": 0.1} if kind == "gemma3_text" else {"resid_pdrop": 0.1, "embd_pdrop": 0.2}
    config = read_config(configure(copied(kind), **names))

    assert [getattr(config, name) for name in names] == [0.0] * len(names)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_multimodal_model_s_head_is_the_stored_one(
    kind: str, says: bool, stored: bool, copied: Make
) -> None:
    """Whatever the whole model's configuration says, a stored head is used; without one it must be the embedding."""
    folder = copied(kind, tie_word_embeddings=not stored)
    configure(folder, tie_word_embeddings=says)

    assert read_model(folder)[1].tie_word_embeddings == (says and not stored)


# --- what servers call the layers

_SPLIT = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_DELTA_NET = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}
VLLM: dict[str, set[str]] = {
    **dict.fromkeys(FAMILIES.keys() | WRAPPERS.keys(), _SPLIT),
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), _SPLIT | _DELTA_NET),
    "granitemoehybrid": {"q_proj", "k_proj", "v_proj", "o_proj", "input_linear", "output_linear"},
}
"""The layers that vLLM's model of a family takes matrices of, by the last part of their names. It refuses an adapter
with any other, and passes over one with the right end whose path leads nowhere."""
VLLM_PREFIXES = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
"""How vLLM's multimodal models rename what an adapter names."""
VLLM_PATH = re.compile(
    r"(language_model\.)?model\.layers\.[0-9]+\.(self_attn|linear_attn|mlp|shared_mlp)\.[a-z_]+"
)
VLLM_REFUSES = {"glm": {"gate_up_proj"}, "glm4": {"gate_up_proj"}}
"""Layers that transformers has in one and vLLM in two: docs/serving.md says what to do."""


def adapted(folder: Path, kind: str, **config: Any) -> list[str]:
    """The layers that an adapter of `all-linear` names in a small model, of which only config.json is there."""
    values = {**SMALL, "vocab_size": 300, "tie_word_embeddings": True, **SMALL_OF.get(kind, {}), **config}
    if "vision_config" in values:
        vision = values.pop("vision_config")
        values = {"text_config": values, "vision_config": vision, "tie_word_embeddings": True}
    AutoConfig.for_model(kind, **values).save_pretrained(folder)
    names = adapter_shapes(folder, Adapter(target_modules=["all-linear"]))
    return [name.removesuffix(f".{A}") for name in names if name.endswith(f".{A}")]


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() | WRAPPERS.keys()))
def test_vllm_finds_every_layer_that_an_adapter_names(kind: str, tmp_path: Path) -> None:
    """Or refuses the adapter, which the user sees; none is passed over."""
    layers = adapted(tmp_path, kind)
    if kind in WRAPPERS:
        layers = [
            next((new + n.removeprefix(old) for old, new in VLLM_PREFIXES.items() if n.startswith(old)), n)
            for n in layers
        ]
    unknown = {name.rpartition(".")[2] for name in layers} - VLLM[kind]

    assert layers
    assert [name for name in layers if not VLLM_PATH.fullmatch(name)] == []
    assert all(name.startswith("language_model.") == (kind in WRAPPERS) for name in layers)
    assert unknown == VLLM_REFUSES.get(kind, set())


@pytest.mark.parametrize("kind", sorted(GGUF_FAMILIES))
def test_llama_cpp_has_a_tensor_for_every_layer_that_an_adapter_names(kind: str, tmp_path: Path) -> None:
    """Of its own, in each layer: it refuses an adapter with a tensor that the base lacks."""
    layers = adapted(tmp_path, kind, **FIXED.get(kind, {}))
    gguf_names = GgufNames(read_config(tmp_path))
    names = [name for layer in layers for name in gguf_names.names(f"{layer}.weight")]
    two = kind == "granitemoehybrid"  # gate and up are one layer in transformers

    assert len(set(names)) == len(layers) + two * sum("input_linear" in layer for layer in layers)
    assert all(re.fullmatch(r"blk\.[0-9]+\.(attn|ffn|ssm)_[a-z_]+\.weight", name) for name in names)
