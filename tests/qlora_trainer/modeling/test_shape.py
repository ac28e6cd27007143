"""The numbers read from config.json against the model that is really loaded."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_folders import configure
from qlora_contract.memory import Dtype, ModelShape, activation_bytes
from qlora_contract.run_config import Adapter, AdapterMethodName
from qlora_trainer.data.collate import collate, pad_multiple
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.adapter_methods import method_for
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.families import FAMILIES, LANGUAGE_MODEL, WRAPPERS, read_config
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.lora_linear import LoraLinear
from qlora_trainer.modeling.shape import model_shape, positions
from qlora_trainer.quantization.schemes import Unquantized
from small_models import SMALL_OF

pytestmark = pytest.mark.process

Make = Callable[..., Path]
WORDS = {"vocab_size": 300}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        pytest.param(None, 512, id="plain"),
        pytest.param(
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048, id="yarn"
        ),
        pytest.param(
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512, id="raised"
        ),
        pytest.param({"rope_type": "linear", "factor": 2.0}, 1024, id="linear"),
        pytest.param(
            {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 8.0},
            512,
            id="longrope",
        ),
        pytest.param(
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_type": "default"},
            },
            512,
            id="by kind",
        ),
    ],
)
def test_scaled_positions_reach_further(rope: dict[str, Any] | None, expected: int) -> None:
    """Whether the factor is in max_position_embeddings already, or comes on top of it."""
    assert positions(SimpleNamespace(max_position_embeddings=512, rope_parameters=rope)) == expected


def test_a_model_without_a_limit_has_none() -> None:
    """Nothing is refused for what is not known."""
    assert positions(SimpleNamespace()) is None


@pytest.mark.parametrize(
    ("written", "rope"),
    [([512], {}), (float("nan"), {}), (512, {"original_max_position_embeddings": [32], "factor": 8.0}),
     (512, {"factor": "8"}), (512, {"factor": float("inf")})],
    ids=str,
)  # fmt: skip
def test_positions_that_are_no_numbers_are_the_model_s_fault(written: Any, rope: dict[str, Any]) -> None:
    """A stranger's file may have anything there."""
    with pytest.raises(ModelError, match="must be"):
        positions(SimpleNamespace(max_position_embeddings=written, rope_parameters=rope))


@pytest.mark.parametrize("values", [{"num_attention_heads": 0}, {"hidden_act": "nope"}])
def test_a_configuration_that_makes_no_sense_is_the_model_s_fault(
    copied: Make, values: dict[str, Any]
) -> None:
    """However transformers fails on it; retrying would not help."""
    with pytest.raises(ModelError, match=r"config\.json"):
        model_shape(configure(copied("llama"), **values), Adapter())


@pytest.mark.parametrize("values", [{"pad_token_id": 10**6}, {"attention_dropout": 0.1}], ids=str)
def test_what_training_does_not_use_does_no_harm(copied: Make, values: dict[str, Any]) -> None:
    """Nothing is padded with the embedding's row, and attention drops nothing."""
    folder = configure(copied("llama"), **values)
    config = read_config(folder)
    model_shape(folder, Adapter())
    load_model(folder, Unquantized(), torch.float32)

    assert config.pad_token_id is None or config.pad_token_id < config.vocab_size
    assert config.attention_dropout == 0.0


@pytest.mark.parametrize(
    "targets", [["all-linear"], ["o_proj"], ["{decoder}.layers.1.self_attn.o_proj"]], ids=str
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() | WRAPPERS.keys()))
def test_counts_are_those_of_the_loaded_model(
    kind: str, tied: bool, targets: list[str], small_model: Make
) -> None:
    """Weights of linears, of the largest, and of the adapter are what loading and attaching really make."""
    folder = small_model(kind, **WORDS, tie_word_embeddings=tied)
    decoder = LANGUAGE_MODEL if kind in WRAPPERS else "model"
    adapter = Adapter(rank=5, target_modules=[target.format(decoder=decoder) for target in targets])
    shape = model_shape(folder, adapter)
    model = load_model(folder, Unquantized(), torch.float32)
    sizes = [math.prod(layer.shape) for layer in model.graph.modules() if isinstance(layer, LoraLinear)]
    parameters = method_for(adapter).attach(model, seed=0, dropout=None)

    assert shape.linear_weights == sum(sizes)
    assert shape.largest_linear == max(sizes)
    assert shape.adapter_weights == sum(p.numel() for p in parameters.named.values())
    assert shape.tied == tied
    assert (shape.vocabulary, shape.hidden) == tuple(model.head.shape)


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        pytest.param("llama", {}, (4, 2, 16), id="hidden size over heads"),
        pytest.param("llama", {"head_dim": 32}, (4, 2, 32), id="head size given"),
        pytest.param("qwen3", {"head_dim": 24}, (4, 2, 24), id="qwen3"),
        pytest.param("gemma2", {"head_dim": 64}, (4, 2, 64), id="gemma2"),
        pytest.param("olmo2", {"num_key_value_heads": 4}, (4, 4, 16), id="olmo2"),
        pytest.param("llama", {"num_key_value_heads": 4}, (4, 4, 16), id="one key head a head"),
    ],
)
def test_heads(kind: str, config: dict[str, Any], expected: tuple[int, int, int], small_model: Make) -> None:
    """Heads, key heads and their size are those of the projections."""
    folder = small_model(kind, **WORDS, **config)
    shape = model_shape(folder, Adapter())
    weights = load_file(folder / "model.safetensors")

    assert (shape.heads, shape.kv_heads, shape.head_size) == expected
    assert len(weights["model.layers.0.self_attn.q_proj.weight"]) == shape.heads * shape.head_size
    assert len(weights["model.layers.0.self_attn.k_proj.weight"]) == shape.kv_heads * shape.head_size
    assert len(weights["model.layers.0.mlp.up_proj.weight"]) == shape.intermediate


KEPT = {
    kind: (kind, "full_attention")
    for kind in sorted(FAMILIES.keys() - {"ministral", "ministral3", "mistral", "smollm3", "qwen2"})
} | {"qwen3_5_text, linear": ("qwen3_5_text", "linear_attention")}
"""Kinds of models, and of their layers where these have kinds."""
BESIDE = {"rank": 1}
PROMPT = {"method": "prompt-tuning", "num_virtual_tokens": 1}
KEPT_BY = {name: (*case, BESIDE) for name, case in KEPT.items()} | {
    f"{name}, behind a prompt": (*case, PROMPT) for name, case in KEPT.items() if case[0] == "qwen3_5_text"
}


@pytest.mark.parametrize(("kind", "attention", "settings"), KEPT_BY.values(), ids=KEPT_BY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_layer_keeps_is_what_the_estimate_says(
    kind: str,
    attention: str,
    settings: dict[str, Any],
    dtype: torch.dtype,
    small_model: Make,
    samples: Samples,
) -> None:
    """What autograd keeps of a token, layer for layer, is never more than estimated, and at least two thirds.

    In bf16 the estimate is of plain torch's attention, which keeps fp32; the kernel library's keeps bf16.
    """
    found, adapter = [], Adapter(**settings)
    for layers in (2, 4):
        kinds = {"layer_types": [attention] * layers} if "layer_types" in SMALL_OF.get(kind, {}) else {}
        folder = small_model(kind, **WORDS, num_hidden_layers=layers, **kinds)
        model = load_model(folder, Unquantized(), dtype)
        model.graph.train()
        method_for(adapter).attach(model, seed=0, dropout=None)
        found.append(kept_bytes(model, samples))
    tokens = len(samples.ids)
    if settings == PROMPT:  # one more for each sample, in a row with a padding of its own
        tokens = -(-(tokens + len(samples)) // pad_multiple(dtype)) * pad_multiple(dtype)
    wide: Dtype = "fp32" if dtype == torch.float32 else "bf16"
    estimated = activation_bytes(model_shape(folder, adapter), tokens, wide, "none")

    assert 0.66 * estimated / 2 <= found[1] - found[0] <= estimated / 2


@pytest.mark.parametrize(("kind", "width"), [("qwen3_moe", 64), ("gpt_oss", 96)])
def test_weights_of_experts_that_a_token_does_not_go_through_are_idle(
    kind: str, width: int, small_model: Make
) -> None:
    """Two of four experts, of three matrices each; the MLP is as wide as the two that it goes through."""
    shape = model_shape(small_model(kind, **WORDS), Adapter())

    assert shape.idle_weights == 2 * (2 * 3 * 64 * width)
    assert shape.intermediate == 2 * width
    assert model_shape(small_model("llama", **WORDS), Adapter()).idle_weights == 0


def test_layers_of_two_kinds_keep_what_they_keep_on_average(small_model: Make) -> None:
    """Of a model with both, each kind counts by its share; attention's work is that of its own layers alone."""
    kept = {}
    for name, kinds in {
        "full": ["full_attention"] * 4,
        "linear": ["linear_attention"] * 4,
        "mixed": [*["linear_attention"] * 3, "full_attention"],
    }.items():
        folder = small_model("qwen3_5_text", **WORDS, num_hidden_layers=4, layer_types=kinds)
        kept[name] = model_shape(folder, Adapter())

    full, linear, mixed = (kept[name] for name in ("full", "linear", "mixed"))
    assert 4 * mixed.further_kept == 3 * linear.further_kept + full.further_kept
    assert [shape.recurrent_layers for shape in (full, linear, mixed)] == [0, 4, 3]
    assert (full.recurrent_width, full.recurrent_flops) == (0, 0)
    assert (mixed.recurrent_width, mixed.recurrent_heads) == (2 * 32, 2)  # two heads of values share a key
    assert mixed.recurrent_flops > 4 * 6 * 16 * 32


@pytest.mark.parametrize("kind", ["llama", "qwen3", "glm"])
@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_what_a_layer_keeps_behind_virtual_tokens_is_what_the_estimate_says(
    kind: str, method: AdapterMethodName, small_model: Make, samples: Samples
) -> None:
    """No linear layer keeps its inputs; of tokens of a prefix attention alone keeps something."""
    adapter = Adapter(method=method, num_virtual_tokens=16)
    found = []
    for layers in (2, 4):
        folder = small_model(kind, **WORDS, num_hidden_layers=layers)
        model = load_model(folder, Unquantized(), torch.float32)
        model.graph.train()
        method_for(adapter).attach(model, seed=0, dropout=None)
        found.append(kept_bytes(model, samples))
    virtual = 16 * len(samples)
    estimated = activation_bytes(
        model_shape(folder, adapter),
        len(samples.ids) + virtual,
        "fp32",
        "none",
        prefixed=virtual if method == "prefix-tuning" else 0,
    )

    assert found[1] - found[0] == pytest.approx(estimated / 2, rel=0.07)  # norms of so narrow layers count


def kept_bytes(model: BaseModel, samples: Samples) -> int:
    """Storage that autograd keeps after a forward pass of all samples, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.graph.parameters(), *model.graph.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        states = model.hidden_states(collate(samples, range(len(samples))))
    assert states.requires_grad  # and with it, what was noted lives until here
    return sum(kept.values())


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_stored_bytes(dtype: str, expected: int, small_model: Make) -> None:
    """Bytes per weight are those of the checkpoint's matrices."""
    assert model_shape(small_model("llama", dtype, **WORDS), Adapter()).stored_bytes == expected


@pytest.mark.model
def test_demo_model(demo_model: Path) -> None:
    """SmolLM2-135M has the numbers of its model card."""
    assert model_shape(demo_model, Adapter(rank=16)) == ModelShape(
        hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_size=64, vocabulary=49152,
        positions=8192, tied=True, stored_bytes=2, linear_weights=106_168_320, largest_linear=884_736,
        adapter_weights=4_884_480,
    )  # fmt: skip


def test_unknown_target(small_model: Make) -> None:
    """A target that names no layer is refused before any weight is read."""
    with pytest.raises(ModelError, match="no linear layer is called 'nonesuch'"):
        model_shape(small_model("llama", **WORDS), Adapter(target_modules=["nonesuch"]))


def no_safetensors(folder: Path) -> None:
    """Leave config.json alone."""
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    """Cut the weights off."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def pointer(folder: Path) -> None:
    """Leave what git-lfs leaves in place of a large file."""
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )


def long_name(folder: Path) -> None:
    """Have the weights in a file whose name no file can have."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "x" * 5_000}}))


def quantized(folder: Path) -> None:
    """Say that the weights are quantized."""
    file = folder / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}})
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(no_safetensors, "neither model.safetensors nor", id="no weights"),
        pytest.param(truncated, "model.safetensors is not a complete safetensors file", id="truncated"),
        pytest.param(pointer, "is a pointer of git-lfs, not the file: run `git lfs pull` in", id="pointer"),
        pytest.param(
            long_name, "lacks x{200,}[.]{3}, which model.safetensors.index.json names", id="long name"
        ),
        pytest.param(quantized, "is stored in GPTQ of None bits", id="quantized"),
        pytest.param(shutil.rmtree, "has no config.json", id="no folder"),
    ],
)
def test_refuses(damage: Callable[[Path], Any], message: str, small_model: Make, tmp_path: Path) -> None:
    """A model that cannot be trained is a ModelError already when it is measured."""
    folder = tmp_path / "model"
    shutil.copytree(small_model("llama", **WORDS), folder)
    damage(folder)

    with pytest.raises(ModelError, match=message):
        model_shape(folder, Adapter())


def test_weights_are_not_read(small_model: Make, tmp_path: Path) -> None:
    """Only headers are read: tensors that are not finite do not matter yet."""
    folder = tmp_path / "model"
    shutil.copytree(small_model("llama", **WORDS), folder)
    expected = model_shape(folder, Adapter())
    tensors = {n: torch.full_like(t, math.nan) for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    assert model_shape(folder, Adapter()) == expected
