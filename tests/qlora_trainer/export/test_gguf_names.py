"""GGUF's names of families and tensors, and its order of rows and columns."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gguf_models import a_config
from qlora_trainer.errors import ModelError
from qlora_trainer.export.gguf_names import GGUF_FAMILIES, GGUF_REFUSED, GgufNames, family_of
from qlora_trainer.modeling.families import FAMILIES
from small_models import SMALL_OF

pytestmark = pytest.mark.process

GRANITE = {**SMALL_OF["granitemoehybrid"], "num_hidden_layers": 2}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 512,
    "attention_factor": 1.2079441541679836,
}  # fmt: skip


def test_every_family_is_exported_or_refused_by_name() -> None:
    """With a reason that users read."""
    assert GGUF_FAMILIES.keys() | GGUF_REFUSED.keys() == FAMILIES.keys()
    assert not GGUF_FAMILIES.keys() & GGUF_REFUSED.keys()


def test_rows_of_queries_and_keys_are_reordered_and_back() -> None:
    """llama.cpp rotates neighbors, transformers numbers half a head apart; of other layers, nothing moves."""
    names = GgufNames(a_config())
    rows = torch.arange(512.0)[:, None].expand(512, 3)

    for path, count in (
        ("model.layers.0.self_attn.q_proj.weight", 512),
        ("model.layers.0.self_attn.k_proj.weight", 128),
    ):
        (moved,) = names.to_gguf(path, rows[:count])
        assert moved[:4, 0].tolist() == [0, 32, 1, 33]
        assert torch.equal(names.from_gguf(path, [moved]), rows[:count])
    assert torch.equal(names.to_gguf("model.layers.0.self_attn.v_proj.weight", rows)[0], rows)
    assert torch.equal(
        GgufNames(a_config("qwen2")).to_gguf("model.layers.0.self_attn.q_proj.weight", rows)[0], rows
    )


QWEN3_5 = {
    **SMALL_OF["qwen3_5_text"], "num_hidden_layers": 2, "linear_key_head_dim": 2, "linear_value_head_dim": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "shape", "first_rows"),
    [
        # Two heads of keys, four of values, of two numbers each; two heads of values share one of keys.
        ("linear_attn.in_proj_qkv.weight", (16, 3), [*range(8), 8, 9, 12, 13, 10, 11, 14, 15]),
        ("linear_attn.conv1d.weight", (16, 1, 3), [*range(8), 8, 9, 12, 13, 10, 11, 14, 15]),
        ("linear_attn.in_proj_z.weight", (8, 3), [0, 1, 4, 5, 2, 3, 6, 7]),
        ("linear_attn.in_proj_b.weight", (4, 3), [0, 2, 1, 3]),
        ("linear_attn.dt_bias", (4,), [0, 2, 1, 3]),
        ("self_attn.q_proj.weight", (8, 3), list(range(8))),
    ],
)
def test_the_values_of_a_delta_network_take_turns(
    path: str, shape: tuple[int, ...], first_rows: list[int]
) -> None:
    """There, the heads that share a head of keys are as far apart as there are heads of keys."""
    names, full = GgufNames(a_config("qwen3_5_text", **QWEN3_5)), f"model.layers.0.{path}"
    tensor = torch.arange(float(shape[0])).view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()

    (moved,) = names.to_gguf(full, tensor)

    assert moved.reshape(shape[0], -1)[:, 0].tolist() == first_rows
    assert names.shapes(full, shape) == [tuple(moved.shape)]
    assert torch.equal(names.from_gguf(full, [moved], shape), tensor)


def test_what_a_delta_network_gives_out_is_reordered_by_columns() -> None:
    """They multiply its values."""
    names, path = GgufNames(a_config("qwen3_5_text", **QWEN3_5)), "model.layers.0.linear_attn.out_proj.weight"
    columns = torch.arange(8.0).expand(3, 8)

    (moved,) = names.to_gguf(path, columns)

    assert moved[0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert torch.equal(names.from_gguf(path, [moved]), columns)


def test_decays_are_stored_computed_and_norms_with_their_offset() -> None:
    """llama.cpp multiplies with -exp(A_log), and with 1 + weight; the norm behind a delta network is whole."""
    names = GgufNames(a_config("qwen3_5_text", **QWEN3_5))
    numbers = torch.tensor([0.5, 1.0, 1.5, 2.0])

    (decays,) = names.to_gguf("model.layers.0.linear_attn.A_log", numbers)
    (norm,) = names.to_gguf("model.layers.0.input_layernorm.weight", numbers)
    (whole,) = names.to_gguf("model.layers.0.linear_attn.norm.weight", numbers)

    torch.testing.assert_close(decays, -numbers[[0, 2, 1, 3]].exp())
    torch.testing.assert_close(names.from_gguf("model.layers.0.linear_attn.A_log", [decays]), numbers)
    assert torch.equal(norm, numbers + 1)
    assert torch.equal(names.from_gguf("model.layers.0.input_layernorm.weight", [norm]), numbers)
    assert torch.equal(whole, numbers)


def test_a_layer_that_is_two_there_is_taken_apart() -> None:
    """Granite 4 has gate and up in one."""
    names = GgufNames(a_config("granitemoehybrid", **GRANITE))
    path = "model.layers.0.shared_mlp.input_linear.weight"
    rows = torch.arange(6.0)[:, None]

    gate, up = names.to_gguf(path, rows)

    assert names.names(path) == ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")
    assert gate[:, 0].tolist() == [0, 1, 2]
    assert up[:, 0].tolist() == [3, 4, 5]
    assert names.shapes(path, (6, 1)) == [(3, 1), (3, 1)]
    assert torch.equal(names.from_gguf(path, [gate, up]), rows)


def test_the_experts_of_a_layer_are_in_one_tensor() -> None:
    """Each knows its place."""
    names = GgufNames(a_config("qwen3_moe", norm_topk_prob=True))
    path = "model.layers.1.mlp.experts.7.down_proj.weight"

    assert names.names(path) == ("blk.1.ffn_down_exps.weight",)
    assert names.expert(path) == 7
    assert names.expert("model.layers.1.mlp.gate.weight") is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
        ("model.layers.0.self_attn.q_proj.bias", "blk.0.attn_q.bias"),
        ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight"),
    ],
)
def test_names_are_those_of_llama_cpp(path: str, name: str) -> None:
    """From gguf's own table."""
    assert GgufNames(a_config("qwen3")).names(path) == (name,)


def test_a_tensor_without_a_name_is_refused() -> None:
    """It would be lost."""
    with pytest.raises(ModelError, match=r"GGUF has no name for model\.layers\.0\.extra\.weight"):
        GgufNames(a_config()).names("model.layers.0.extra.weight")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        pytest.param(SimpleNamespace(model_type="other"), "a 'other' model cannot be exported", id="family"),
        pytest.param(
            SimpleNamespace(model_type="llama", rope_parameters={"rope_type": "dynamic"}),
            "'dynamic' rotary",
            id="rope",
        ),
        pytest.param(a_config("smollm3", no_rope_layers=[1, 0] * 4), "other no_rope_layers", id="smollm3"),
        pytest.param(
            a_config("gemma2", query_pre_attn_scalar=24), "another query_pre_attn_scalar", id="gemma2"
        ),
        pytest.param(
            a_config("gemma2", head_dim=32, query_pre_attn_scalar=32, layer_types=["full_attention"] * 8),
            "other layer_types",
            id="gemma2 without windows",
        ),
        pytest.param(a_config("olmo2"), "tied embeddings", id="olmo2"),
        pytest.param(a_config("glm", head_dim=32), "heads that are not as wide as hidden_size", id="glm"),
        pytest.param(a_config("gpt_oss"), "cannot be exported to GGUF; llama.cpp rounds", id="gpt_oss"),
        pytest.param(a_config("qwen3_moe", norm_topk_prob=False), "a norm_topk_prob of false", id="norm"),
        pytest.param(
            a_config("qwen3_moe", norm_topk_prob=True, mlp_only_layers=[0]),
            "layers without experts",
            id="mlp",
        ),
        pytest.param(
            a_config("qwen3_5_text", **{**QWEN3_5, "linear_value_head_dim": 4}),
            "another linear_value_head_dim",
            id="heads of a delta network",
        ),
        pytest.param(
            a_config("qwen3_5_text", **{**QWEN3_5, "layer_types": ["full_attention", "linear_attention"]}),
            "full layers that do not come in equal distances",
            id="layers of a delta network",
        ),
        pytest.param(
            a_config("gemma3_text", head_dim=32, query_pre_attn_scalar=32, final_logit_softcapping=3.0),
            "bounded scores or logits",
            id="gemma3",
        ),
        *(
            pytest.param(
                a_config(rope_parameters={**YARN, **changed}),
                f"{said} .*in rope_parameters",
                id=f"yarn, {said}",
            )
            for changed, said in (
                ({"truncate": False}, "a truncate of false"),
                ({"beta_fast": 16.0}, "another beta_fast than 32"),
                ({"mscale": 0.7}, "an mscale"),
                ({"attention_factor": 1.0}, "another attention_factor than 1.20794"),
            )
        ),
        pytest.param(
            SimpleNamespace(model_type="llama", rope_parameters={}, hidden_act="gelu"),
            "hidden_act 'gelu'",
            id="act",
        ),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(config: Any, said: str) -> None:
    """With a sentence."""
    with pytest.raises(ModelError, match=said):
        family_of(config)
