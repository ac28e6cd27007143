"""Prompt and prefix tuning against peft: ours runs packed rows, theirs every sample alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import builders
from model_folders import stock_model
from qlora_contract.run_config import Adapter
from qlora_trainer.artifacts import checkpoint
from qlora_trainer.artifacts.adapter import reload_adapter, write_adapter
from qlora_trainer.artifacts.checkpoint import LoopState
from qlora_trainer.data.collate import collate
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import ModelError
from qlora_trainer.inference.generation import generate
from qlora_trainer.modeling.adapter_methods import adapters_disabled, method_for
from qlora_trainer.modeling.adapter_parameters import AdapterParameters
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.shape import model_shape
from qlora_trainer.quantization.schemes import Int8, Nf4, Unquantized
from qlora_trainer.storage.job_folder import JobFolder
from qlora_trainer.training.objective import SupervisedFineTuning
from qlora_trainer.training.optimizer import AdapterAdamW

pytestmark = pytest.mark.process

Make = Callable[..., Path]
TOKENS = 5
LIVELY = {"vocab_size": 300, "initializer_range": 0.12}
ADAPTERS: dict[str, dict[str, Any]] = {
    "prompt": {"method": "prompt-tuning", "numVirtualTokens": TOKENS},
    "prefix": {"method": "prefix-tuning", "numVirtualTokens": TOKENS},
    "projected": {
        "method": "prefix-tuning", "numVirtualTokens": TOKENS, "prefixProjection": True, "encoderHiddenSize": 24,
    },
}  # fmt: skip
LENGTHS = [13, 2, 17, 9]
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
LOGITS_TOLERANCE = 1e-5


def adapter_of(kind: str) -> Adapter:
    """The settings of one of ADAPTERS."""
    return builders.a_run(version=2, adapter=ADAPTERS[kind]).adapter


def random_samples() -> Samples:
    """Samples whose supervised tokens are some in the middle, and the last."""
    random = np.random.default_rng(5)
    offsets = np.cumsum([0, *LENGTHS])
    ids = random.integers(0, 300, offsets[-1]).astype(np.int32)
    mask = (random.random(offsets[-1]) < 0.5).astype(np.uint8)
    mask[offsets[1:] - 1] = 1
    mask[offsets[:-1]] = 0
    return Samples(ids, mask, offsets)


def ours(folder: Path, kind: str, scheme: Any = None) -> tuple[BaseModel, AdapterParameters]:
    """A model that trains, with virtual tokens of moderate size."""
    model = load_model(folder, scheme or Unquantized(), torch.float32)
    model.graph.train()
    parameters = method_for(adapter_of(kind)).attach(model, seed=3, dropout=None)
    return model, parameters


def step(model: BaseModel, samples: Samples, bins: list[list[int]]) -> float:
    """The mean loss; its gradient is added to the parameters'."""
    objective, total = SupervisedFineTuning(), 0.0
    count = int(objective.counts(samples).sum())
    for numbers in bins:
        loss = objective.loss(model, collate(samples, numbers)).total
        (loss / count).backward()
        total += float(loss.detach())
    return total / count


def peft_config(kind: str) -> Any:
    """peft's own settings, as a user of peft writes them."""
    from peft import PrefixTuningConfig, PromptTuningConfig

    if kind == "prompt":
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    more = {"prefix_projection": True, "encoder_hidden_size": 24} if kind == "projected" else {}
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **more)


def theirs(folder: Path, kind: str, parameters: AdapterParameters, model: BaseModel | None = None) -> Any:
    """peft's model with the same virtual tokens; with `model`, on that model's quantized weights."""
    from peft import get_peft_model

    base = stock_model(folder)
    if model is not None:
        for name, layer in model.linears.items():
            base.get_submodule(name).weight.data.copy_(layer.weight.dequantize(torch.float32))
    found = get_peft_model(base, peft_config(kind)).train()
    encoder = found.prompt_encoder["default"]
    state = {n.removeprefix("prompt_encoder."): p.data.clone() for n, p in parameters.named.items()}
    encoder.load_state_dict(state)
    return found


def their_logits(model: Any, samples: Samples, number: int) -> Tensor:
    """Logits of a sample's own tokens, run alone."""
    ids = torch.from_numpy(samples.sample(number)[0].astype(np.int64))
    logits: Tensor = model(input_ids=ids[None]).logits[0, -len(ids) :]
    return logits


def their_step(model: Any, samples: Samples) -> float:
    """As `step`."""
    total, count = 0.0, int(samples.supervised_counts().sum())
    for number in range(len(samples)):
        ids, mask = (torch.from_numpy(x.astype(np.int64)) for x in samples.sample(number))
        labels = torch.where(mask.bool(), ids, -100)
        logits = their_logits(model, samples, number)
        loss = F.cross_entropy(logits[:-1].double(), labels[1:], reduction="sum", ignore_index=-100)
        (loss / count).backward()
        total += float(loss.detach())
    return total / count


def our_logits(model: BaseModel, samples: Samples) -> list[Tensor]:
    """Logits of each sample, all of them packed in one row."""
    batch = collate(samples, list(range(len(samples))))
    with torch.no_grad():
        return list(torch.split(model.logits(model.hidden_states(batch)), batch.lengths))


def assert_same_gradients(parameters: AdapterParameters, model: Any) -> None:
    """Each tensor's, within tolerance."""
    found = dict(model.prompt_encoder["default"].named_parameters())
    for name, parameter in parameters.named.items():
        expected = found[name.removeprefix("prompt_encoder.")].grad
        size = float(expected.norm())
        assert size > 0, name
        assert float((parameter.grad - expected).norm()) / size <= GRADIENT_TOLERANCE, name


PACKED, UNPACKED = [[0, 1, 2], [3]], [[0], [1], [2], [3]]
FAMILIES = [
    "llama", "glm", "glm4", "gemma2", "gemma3", "qwen3", "phi3", "smollm3", "granite", "olmo2", "ministral",
    "ministral3", "mistral3", "qwen3_moe", "mistral", "qwen2", "gemma3_text", "granitemoehybrid", "olmo3",
]  # fmt: skip


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradients_and_logits_are_peft_s(family: str, kind: str, small_model: Make) -> None:
    """Packed rows give the loss, the gradients and the logits of samples that peft runs alone."""
    folder, samples = small_model(family, **LIVELY), random_samples()
    model, parameters = ours(folder, kind)
    stock = theirs(folder, kind, parameters)

    assert step(model, samples, PACKED) == pytest.approx(their_step(stock, samples), rel=0, abs=LOSS_TOLERANCE)
    assert_same_gradients(parameters, stock)
    for number, logits in enumerate(our_logits(model, samples)):
        with torch.no_grad():
            expected = their_logits(stock, samples, number)
        assert float((logits - expected).abs().max()) <= LOGITS_TOLERANCE * float(expected.abs().max())
