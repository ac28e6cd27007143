"""What OpenVINO GenAI makes of a job's files: by its own reader of GGUF files, and its own loader of adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exported import TOKENS, base_as_gguf, by_peft, exported, prompt_ids

pytestmark = [pytest.mark.process, pytest.mark.timeout(600)]

FAMILIES = ("llama", "qwen2", "qwen3")
"""Whose GGUF files it reads."""
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""Else it computes in bf16, and keeps keys and values in 8 bits."""


@pytest.fixture
def genai() -> Any:
    """The package openvino-genai."""
    return pytest.importorskip("openvino_genai", reason="needs openvino-genai")


def greedy(genai: Any, file: Path, prompt: list[int], **more: Any) -> list[int]:
    """The next TOKENS tokens."""
    import numpy as np
    import openvino

    settings = genai.GenerationConfig()
    settings.max_new_tokens, settings.do_sample, settings.ignore_eos = TOKENS, False, True
    pipeline = genai.LLMPipeline(str(file), "CPU", **EXACT, **more)
    ids = np.array([prompt], dtype=np.int64)
    inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    return list(pipeline.generate(inputs, settings).tokens[0])


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_reads_gguf_files(
    kind: str, genai: Any, small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Twenty greedy tokens of f16 are those of transformers and peft."""
    model = small_model(kind, dtype="float16")
    adapter = an_adapter(model)
    out = exported(model, adapter, tmp_path / "out", "gguf-f16")
    expected, without = by_peft(model, adapter)

    assert without != expected
    assert greedy(genai, out / "gguf-f16" / "demo-f16.gguf", prompt_ids(model)) == expected


def test_it_passes_over_an_adapter_beside_a_base_in_gguf(
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
    assert greedy(genai, base, prompt_ids(model), adapters=genai.AdapterConfig(loaded, 2.0)) == without
