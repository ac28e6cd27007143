"""What many tests share: the demo's real model and data, and small models of each architecture."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from small_models import SMALL, SMALL_OF

pytest_plugins = ["tiers", "testcluster.fixtures", "testcluster.node_fixtures"]

ROOT = Path(__file__).parent.parent
DEMO = ROOT / ".cache" / "demo"


@pytest.fixture(scope="session", autouse=True)
def own_cpu_locks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Jobs of tests that run side by side may have the same CPUs: one test's job does not refuse another's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CPU_LOCKS", str(tmp_path_factory.mktemp("cpu-locks")))
        yield


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    return _made(DEMO / "model", "config.json")


@pytest.fixture(scope="session")
def demo_data() -> Path:
    """The folder of train.jsonl and eval.jsonl."""
    return _made(DEMO / "data", "train.jsonl")


def _made(folder: Path, mark: str) -> Path:
    if not (folder / mark).is_file():
        pytest.fail(f"{folder} is not there: run `make demo-data` (make test does)")
    return folder


@pytest.fixture(scope="session")
def small_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(kind, dtype="float32", **config) -> a folder with a random model of that architecture.

    `kind` is a model_type; the tokenizer is the demo model's; equal calls give the same folder. Of a multimodal model
    `config` is its language model's.
    """
    made: dict[str, Path] = {}

    def make(kind: str = "llama", dtype: str = "float32", **config: Any) -> Path:
        key = json.dumps([kind, dtype, config], sort_keys=True)
        if key not in made:
            made[key] = _write_small_model(tmp_path_factory.mktemp(kind), demo_model, kind, dtype, config)
        return made[key]

    return make


def _write_small_model(folder: Path, tokenizer: Path, kind: str, dtype: str, config: dict[str, Any]) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    source = json.loads((tokenizer / "config.json").read_text())
    kept = {
        key: source[key]
        for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        if key in source
    }
    values: dict[str, Any] = {
        **SMALL, **kept, "tie_word_embeddings": True, **SMALL_OF.get(kind, {}), **config
    }  # fmt: skip
    torch.manual_seed(0)
    if "vision_config" in values:
        tied, vision = values["tie_word_embeddings"], values.pop("vision_config")
        values = {"text_config": values, "vision_config": vision, "tie_word_embeddings": tied}
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(kind, **values), dtype=getattr(torch, dtype)
        )
    else:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **values), dtype=getattr(torch, dtype)
        )
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)
    return folder
