"""Files of a model's folder that are damaged, or made to harm: loaded, or refused by one sentence."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from hypothesis import strategies as st
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig

from hostile import HUGE, INPUTS, attack, damaged_bytes, damaged_json, json_text, nested, survive
from qlora_contract.run_config import Adapter
from qlora_trainer.data.chat_template import TemplateSettings
from qlora_trainer.data.readers import Row
from qlora_trainer.data.records import interpret
from qlora_trainer.data.tokenization import Tokenization, TokenizationOptions
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.families import read_tokenizer
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.shape import model_shape
from qlora_trainer.modeling.weight_files import fingerprint
from qlora_trainer.quantization.schemes import AsStored
from qlora_trainer.training.inputs import stop_ids
from small_models import SMALL_OF

pytestmark = pytest.mark.process

TINY = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
KINDS = ("llama", "qwen2", "qwen3", "qwen3_moe", "gpt_oss", "qwen3_5_text", "gemma2", "phi3", "granite")
WEIGHTS = {
    "model.embed_tokens.weight": (40, 16),
    "model.norm.weight": (16,),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.post_attention_layernorm.weight": (16,),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.k_proj.weight": (8, 16),
    "model.layers.0.self_attn.v_proj.weight": (8, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.mlp.gate_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (16, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 16),
}
"""Of a llama of these sizes."""
QUANTIZED = (
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "gptq", "bits": 4, "group_size": 8},
    {"quant_method": "awq", "bits": 4, "group_size": 8},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"quant_method": "mxfp4"},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}}},
)  # fmt: skip


def config_of(kind: str) -> dict[str, Any]:
    """config.json of a tiny model."""
    extra = {k: v for k, v in SMALL_OF.get(kind, {}).items() if k != "layer_types"}
    config = AutoConfig.for_model(
        kind, **{**TINY, **extra, "pad_token_id": None, "eos_token_id": 1, "bos_token_id": 0}
    )
    return {**config.to_diff_dict(), "model_type": kind}


CONFIGS = [config_of(kind) for kind in KINDS]
SAFETENSORS = save({name: torch.full(size, 0.5) for name, size in WEIGHTS.items()})
HEADER = json.loads(SAFETENSORS[8 : 8 + struct.unpack("<Q", SAFETENSORS[:8])[0]])


def with_header(header: Any) -> bytes:
    """The file with another header."""
    text = json_text(header).encode()
    return len(text).to_bytes(8, "little") + text + SAFETENSORS[8 + struct.unpack("<Q", SAFETENSORS[:8])[0] :]


def a_tokenizer() -> dict[str, Any]:
    """tokenizer.json of bytes and a few pairs of them."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc"]
    core = Tokenizer(
        models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[("a", "b"), ("ab", "c")])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    value: dict[str, Any] = json.loads(core.to_str())
    return value


TOKENIZER = a_tokenizer()
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 64,
    "chat_template": "{% for m in messages %}{{ m.role }}{{ m.content }}{{ eos_token }}{% endfor %}",
    "added_tokens_decoder": {"259": {"content": "</s>", "special": True, "lstrip": False}},
}  # fmt: skip


@pytest.fixture
def folder(place: Path) -> Path:
    """A model's folder that is right."""
    (place / "config.json").write_text(json.dumps(CONFIGS[0]))
    (place / "model.safetensors").write_bytes(SAFETENSORS)
    (place / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (place / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (place / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return place


def load(folder: Path) -> None:
    """What a rank reads of a model's weights, and what `qlora plan` reads."""
    model_shape(folder, Adapter())
    fingerprint(folder)
    stop_ids(folder)
    load_model(folder, AsStored(), torch.float32)


def tokenize(folder: Path) -> None:
    """What a rank does with a tokenizer."""
    tokenizer = read_tokenizer(folder)
    pairs = [("abc", "ab c"), ("x", "y")]
    rows = [
        Row(
            "a line",
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]},
        )
        for asked, answer in pairs
    ]
    options = TokenizationOptions(template=TemplateSettings(stop_ids=stop_ids(folder)))
    tokenization = Tokenization(tokenizer, 16, options)
    for sample in tokenization.outcomes(record for record in interpret(rows) if hasattr(record, "content")):
        assert sample
    assert tokenization.template.digest()


def test_what_is_damaged_below_is_right(folder: Path) -> None:
    """The folder that is damaged can be loaded, and every configuration is of a family."""
    load(folder)
    tokenize(folder)
    for config in CONFIGS[1:]:
        (folder / "config.json").write_text(json.dumps(config))
        assert model_shape(folder, Adapter()).layers == 1


@INPUTS
def test_a_damaged_configuration_is_refused(folder: Path, inputs: int) -> None:
    """Whatever config.json says of sizes, kinds, rotations and quantization."""
    quantized = [{**CONFIGS[0], "quantization_config": settings} for settings in QUANTIZED]
    configs = st.one_of([damaged_json(config) for config in [*CONFIGS, *quantized]])

    def read(config: Any) -> None:
        (folder / "config.json").write_text(json_text(config))
        load(folder)

    attack(inputs, configs, read)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2**31},
        {"num_hidden_layers": 100_000},
        {"hidden_size": HUGE},
        {"vocab_size": HUGE},
        {"vocab_size": -1},
        {"intermediate_size": 2**40},
        {"num_attention_heads": 0},
        {"num_attention_heads": 10**9},
        {"head_dim": 2**50},
        {"num_key_value_heads": 3},
        {"max_position_embeddings": HUGE},
        {"max_position_embeddings": "many"},
        {"hidden_act": "nope"},
        {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0] * 10, "short_factor": []}},
        {"rope_parameters": [1]},
        {"layer_types": ["x"] * 100_000},
        {"eos_token_id": [1] * 100_000},
        {"model_type": ["llama"]},
        {"quantization_config": []},
        {"architectures": [[]]},
        {"id2label": {str(n): n for n in range(50_000)}},
        {"num_labels": 2**40},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_configuration_that_was_made_to_harm_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    """Or it is loaded, where what it says changes nothing."""
    (folder / "config.json").write_text(json.dumps({**CONFIGS[0], **changes}))

    error = survive(load, folder)

    assert error is None or isinstance(error, ModelError)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
def test_layers_without_end_are_refused_before_each_gets_a_kind(folder: Path, config: dict[str, Any]) -> None:
    """Where a configuration does not say of which kind each layer is, transformers makes the list."""
    endless = {name: value for name, value in config.items() if name != "layer_types"}
    (folder / "config.json").write_text(json.dumps({**endless, "num_hidden_layers": 2**31 - 1}))

    assert isinstance(survive(load, folder), ModelError)


@INPUTS
def test_damaged_weights_are_refused(folder: Path, inputs: int) -> None:
    """Headers that lie about types, shapes and places, and files that are cut."""
    headers = damaged_json(HEADER).map(with_header)

    def read(data: bytes) -> None:
        (folder / "model.safetensors").write_bytes(data)
        load(folder)

    attack(inputs, st.one_of(headers, damaged_bytes([SAFETENSORS], head=900)), read)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(HUGE.to_bytes(8, "little") + b"{}", id="a header of 2^60 bytes"),
        pytest.param((2**64 - 1).to_bytes(8, "little"), id="a header of 2^64 bytes"),
        pytest.param(
            with_header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}), id="4 TiB"
        ),
        pytest.param(
            with_header({"x": {"dtype": "F32", "shape": [0] * 9999, "data_offsets": [0, 0]}}), id="dimensions"
        ),
        pytest.param((200_000).to_bytes(8, "little") + nested().encode(), id="a header nested deep"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", id="a pointer of Git LFS"),
    ],
)
def test_weights_that_were_made_to_harm_are_refused(folder: Path, data: bytes) -> None:
    """By the file's name, without the memory that they claim."""
    (folder / "model.safetensors").write_bytes(data)

    error = survive(load, folder)

    assert isinstance(error, ModelError)
    assert "model.safetensors" in str(error)


INDEX = {
    "metadata": {"total_size": 9},
    "weight_map": dict.fromkeys(WEIGHTS, "model-00001-of-00001.safetensors"),
}


@INPUTS
def test_a_damaged_index_is_refused(folder: Path, inputs: int) -> None:
    """An index that names what is not there, what lies elsewhere, or nothing."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")

    def read(index: bytes) -> None:
        (folder / "model.safetensors.index.json").write_bytes(index)
        load(folder)

    read(json.dumps(INDEX).encode())
    changed = damaged_json(INDEX).map(lambda value: json_text(value).encode())
    attack(inputs, st.one_of(changed, damaged_bytes([json.dumps(INDEX).encode()])), read)
    survive(read, nested().encode())


@INPUTS
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_refused(folder: Path, name: str, inputs: int) -> None:
    """Tokens without ids, ids without tokens, merges of nothing, templates that are no text."""
    value = json.loads((folder / name).read_text())

    def read(data: bytes) -> None:
        (folder / name).write_bytes(data)
        tokenize(folder)

    changed = damaged_json(value).map(lambda each: json_text(each).encode())
    attack(inputs, st.one_of(changed, damaged_bytes([json.dumps(value).encode()])), read)


def changed(**changes: Any) -> dict[str, Any]:
    """tokenizer.json with another model."""
    return {**TOKENIZER, "model": {**TOKENIZER["model"], **changes}}


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(json.dumps(changed(vocab={"a": 2**32 - 1, "<s>": 1})), id="an id of 32 bits"),
        pytest.param(json.dumps(changed(vocab={"a": HUGE})), id="an id of 60 bits"),
        pytest.param(json.dumps(changed(vocab={"x" * 10_000_000: 5})), id="a token of 10 MB"),
        pytest.param(json.dumps(changed(merges=[["a"] * 9999])), id="a merge of many"),
        pytest.param(json.dumps({**TOKENIZER, "added_tokens": [
            {"id": 2**32 - 1, "content": "z", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}]}), id="an added token of a high id"),
        pytest.param(json.dumps({**TOKENIZER, "padding": {
            "strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "a"}}), id="padding to 2^40 tokens"),
        pytest.param(json.dumps({**TOKENIZER, "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "(a|a)*(a|a)*$"}, "behavior": "Isolated", "invert": False}}),
            id="a slow pattern"),
        pytest.param(json.dumps({**TOKENIZER, "normalizer": {
            "type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000}}), id="a normalizer that grows"),
        pytest.param(nested(), id="nested deep"),
        pytest.param("[]", id="a list"),
        pytest.param("", id="nothing"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_was_made_to_harm_is_refused(folder: Path, tokenizer: str) -> None:
    """Or it makes tokens, without the memory that it asks for."""
    (folder / "tokenizer.json").write_text(tokenizer)

    survive(tokenize, folder)


def a_gguf(file: Path) -> bytes:
    """A GGUF file of the tiny llama."""
    writer = GGUFWriter(file, "llama")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, 16),
        (writer.add_feed_forward_length, 16), (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, 40), (writer.add_rope_dimension_count, 8),
    ):  # fmt: skip
        add(value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{n}" for n in range(40)])
    writer.add_token_scores([0.0] * 40)
    writer.add_token_types([1] * 40)
    names = {
        "token_embd.weight": (40, 16), "output_norm.weight": (16,), "blk.0.attn_norm.weight": (16,),
        "blk.0.ffn_norm.weight": (16,), "blk.0.attn_q.weight": (16, 16), "blk.0.attn_k.weight": (8, 16),
        "blk.0.attn_v.weight": (8, 16), "blk.0.attn_output.weight": (16, 16), "blk.0.ffn_gate.weight": (16, 16),
        "blk.0.ffn_up.weight": (16, 16), "blk.0.ffn_down.weight": (16, 16),
    }  # fmt: skip
    for name, size in names.items():
        writer.add_tensor(name, np.full(size, 0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


@pytest.fixture
def gguf(place: Path) -> tuple[bytes, Callable[[bytes], None]]:
    """A GGUF file that is right; and what reads one."""
    right = a_gguf(place / "right.gguf")
    (place / "right.gguf").unlink()
    count = iter(range(10**9))

    def read(data: bytes) -> None:
        folder = place / str(next(count))  # readers are kept by their path
        folder.mkdir()
        (folder / "model.gguf").write_bytes(data)
        (folder / "config.json").write_text(json.dumps(CONFIGS[0]))
        try:
            load(folder)
        finally:
            shutil.rmtree(folder)

    return right, read


@INPUTS
def test_a_damaged_gguf_file_is_refused(gguf: tuple[bytes, Callable[[bytes], None]], inputs: int) -> None:
    """Counts, lengths, types and places of a GGUF header may be anything."""
    right, read = gguf
    read(right)

    attack(inputs, damaged_bytes([right], head=2200), read)


def test_gguf_headers_that_claim_too_much_are_refused(gguf: tuple[bytes, Callable[[bytes], None]]) -> None:
    """Counts of 2^60 keys, tensors and characters cost neither memory nor time."""
    right, read = gguf
    for at in (8, 16, 24):
        for number in (HUGE, 2**31, 2**63):
            error = survive(read, right[:at] + number.to_bytes(8, "little") + right[at + 8 :])

            assert isinstance(error, ModelError)
