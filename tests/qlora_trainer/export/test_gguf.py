"""GGUF's names, order and types."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from exported import PROMPT, TOKENS, base_as_gguf, by_peft, exported, prompt_ids
from gguf_models import FIXED, TARGETS, a_config
from llama_server import LlamaServer
from qlora_contract.run_config import GgufType, OutputFormat
from qlora_trainer.errors import ModelError
from qlora_trainer.export.gguf import (
    context_length,
    quantized,
    rope_factors,
    tensor_type,
)
from qlora_trainer.export.gguf_names import GGUF_FAMILIES
from qlora_trainer.modeling.families import WRAPPERS

pytestmark = pytest.mark.process


def test_the_page_of_exports_names_formats_and_types() -> None:
    """docs/export.md says what the code does."""
    page = " ".join((Path(__file__).parents[3] / "docs" / "export.md").read_text().split())

    for name in (*get_args(OutputFormat), *get_args(GgufType)):
        assert f"| `{name}` |" in page


@pytest.mark.parametrize(
    ("form", "name", "shape", "kind"),
    [
        ("f16", "blk.0.ffn_up.weight", (8, 512), Type.F16),
        ("f16", "blk.0.attn_norm.weight", (512,), Type.F32),
        ("q8_0", "token_embd.weight", (8, 512), Type.Q8_0),
        ("q8_0", "blk.0.ffn_up.weight", (8, 24), Type.F16),
        ("q4_k_m", "token_embd.weight", (8, 512), Type.Q6_K),
        ("q4_k_m", "blk.0.ffn_down.weight", (8, 512), Type.Q6_K),
        ("q4_k_m", "blk.1.ffn_down.weight", (8, 512), Type.Q4_K),
        ("q4_k_m", "blk.3.attn_v.weight", (8, 512), Type.Q6_K),
        ("q4_k_m", "blk.7.attn_v.weight", (8, 512), Type.Q6_K),
        ("q4_k_m", "blk.0.attn_q.weight", (8, 512), Type.Q4_K),
        ("q4_k_m", "blk.0.attn_q.weight", (8, 576), Type.Q5_0),
        ("q4_k_m", "token_embd.weight", (8, 576), Type.Q8_0),
        ("q4_k_m", "blk.0.attn_qkv.weight", (8, 512), Type.Q5_K),
    ],
)
def test_types_are_llama_cpps_mixture(form: Any, name: str, shape: tuple[int, ...], kind: Type) -> None:
    """More bits for the head and some layers; rows that blocks do not divide get smaller blocks."""
    assert tensor_type(form, name, shape, a_config()) == kind


def test_a_head_of_its_own_and_a_tied_embedding_are_told_apart() -> None:
    """The embedding alone may lose bits."""
    config = a_config(tie_word_embeddings=False)

    assert tensor_type("q4_k_m", "output.weight", (8, 512), config) == Type.Q6_K
    assert tensor_type("q4_k_m", "token_embd.weight", (8, 512), config) == Type.Q4_K


@pytest.mark.parametrize("value", [float("nan"), 70_000.0])
def test_numbers_that_a_type_cannot_hold_are_refused(value: float) -> None:
    """fp16 ends at 65,504."""
    with pytest.raises(ModelError, match=r"output\.weight holds numbers of up to"):
        quantized("output.weight", torch.tensor([[value]]), Type.F16)


def test_the_context_ends_where_a_window_begins_to_matter() -> None:
    """llama.cpp has no window for these families: beyond it would be another model."""
    values = {"max_position_embeddings": 1000}

    assert context_length(a_config("mistral", sliding_window=100, **values)) == 100
    assert context_length(a_config("mistral", sliding_window=None, **values)) == 1000
    assert context_length(a_config("qwen2", use_sliding_window=False, **values)) == 1000


def test_llama3_stretches_waves_as_transformers_does(small_model: Callable[..., Path]) -> None:
    """The factors are the ratio of transformers' own frequencies without and with the scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = a_config(rope_parameters=rope)
    plain = 1.0 / (500_000.0 ** (torch.arange(0, 64, 2) / 64))

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))

    found = rope_factors(config)
    assert found is not None
    torch.testing.assert_close(plain / found, scaled)
    assert rope_factors(a_config()) is None


ASK = Path(__file__).parents[3] / "demo" / "ask_llama.py"


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(1800)
def test_llama_cpp_says_what_transformers_and_peft_say(
    demo_model: Path, an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Twenty greedy tokens of its server are equal for f16, and for a base in GGUF with the adapter's file."""
    adapter = an_adapter(demo_model)
    out = exported(demo_model, adapter, tmp_path / "out", "gguf-f16", "gguf-lora")
    prompt = prompt_ids(demo_model)
    expected, without = by_peft(demo_model, adapter)

    def by_llama_cpp(file: Path, **more: Any) -> list[int]:
        server = LlamaServer(file, **more)
        assert server.tokens(PROMPT) == prompt
        return server.greedy(prompt, TOKENS)

    assert without != expected
    assert by_llama_cpp(out / "gguf-f16" / "demo-f16.gguf") == expected
    base, lora = base_as_gguf(demo_model, tmp_path / "base.gguf"), out / "gguf-lora" / "demo-lora.gguf"
    assert by_llama_cpp(base, lora=lora) == expected
    assert by_llama_cpp(base) == without


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [*sorted(GGUF_FAMILIES), *sorted(WRAPPERS)])
def test_llama_cpp_computes_each_family_as_transformers_does(
    kind: str,
    small_model: Callable[..., Path],
    an_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """A small random model with everything special to its kind: twenty greedy tokens of f16 are equal."""
    folder = small_model(kind, dtype="float16", **FIXED.get(kind, {}))
    adapter = an_adapter(folder, targets=TARGETS.get(kind, "all-linear"))
    out = exported(folder, adapter, tmp_path / "out", "gguf-f16")
    prompt = prompt_ids(folder)
    expected, _ = by_peft(folder, adapter)

    server = LlamaServer(out / "gguf-f16" / "demo-f16.gguf")

    assert server.greedy(prompt, TOKENS) == expected


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(1800)
def test_llama_cpp_answers_from_q4_k_m(
    demo_model: Path,
    an_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """By the chat template in the file, as `make demo-llama` asks."""
    out = exported(demo_model, an_adapter(demo_model, scale=0.1), tmp_path / "out", "gguf-q4_k_m")

    done = subprocess.run(
        [sys.executable, ASK, str(out / "gguf-q4_k_m" / "demo-q4_k_m.gguf"), "Hello"],
        capture_output=True,
        text=True,
        check=True,
    )

    question, _, answer = done.stdout.partition("\nllama.cpp ")
    assert question.split() == ["question", "Hello"]
    assert answer.strip()


OPENVINO_FAMILIES = ("llama", "qwen2", "qwen3")
"""Whose GGUF files OpenVINO GenAI reads."""
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""Else it computes in bf16, and keeps keys and values in 8 bits."""


@pytest.fixture
def genai() -> Any:
    """The package openvino-genai."""
    return pytest.importorskip("openvino_genai", reason="needs openvino-genai")


def by_openvino(genai: Any, file: Path, prompt: list[int], **more: Any) -> list[int]:
    """The next TOKENS tokens."""
    import numpy as np
    import openvino

    settings = genai.GenerationConfig()
    settings.max_new_tokens, settings.do_sample, settings.ignore_eos = TOKENS, False, True
    pipeline = genai.LLMPipeline(str(file), "CPU", **EXACT, **more)
    ids = np.array([prompt], dtype=np.int64)
    inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    return list(pipeline.generate(inputs, settings).tokens[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", OPENVINO_FAMILIES)
def test_openvino_says_what_transformers_and_peft_say(
    kind: str, genai: Any, small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Twenty greedy tokens of f16 are those of transformers and peft."""
    model = small_model(kind, dtype="float16")
    adapter = an_adapter(model)
    out = exported(model, adapter, tmp_path / "out", "gguf-f16")
    expected, without = by_peft(model, adapter)

    assert without != expected
    assert by_openvino(genai, out / "gguf-f16" / "demo-f16.gguf", prompt_ids(model)) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_openvino_passes_over_an_adapter_beside_a_base_in_gguf(
    genai: Any, small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """It prints that no tensor was used, and answers as the base: docs/serving.md says to merge. Should it change, so
    should that page."""
    model = small_model("llama", dtype="float16")
    adapter = an_adapter(model)
    base = base_as_gguf(model, tmp_path / "base.gguf")
    expected, without = by_peft(model, adapter)
    loaded = genai.Adapter(str(adapter / "adapter_model.safetensors"))

    assert expected != without
    assert by_openvino(genai, base, prompt_ids(model), adapters=genai.AdapterConfig(loaded, 2.0)) == without
