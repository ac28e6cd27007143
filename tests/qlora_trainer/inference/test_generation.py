"""What the trainer's own model generates, against transformers and peft."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import builders
from kernel_tiers import running
from parity_cases import LONGROPE
from qlora_contract.run_config import RunConfig
from qlora_trainer.artifacts.adapter import write_adapter
from qlora_trainer.inference.generation import Sampling, _read_prompt, _row, choose, generate, stream
from qlora_trainer.modeling.adapter_methods import adapters_disabled, method_for
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.families import FAMILIES
from qlora_trainer.modeling.key_value_cache import CachedSequence
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.lora import attach_adapters
from qlora_trainer.quantization.kernels import reference
from qlora_trainer.quantization.schemes import Nf4, Unquantized
from qlora_trainer.storage.job_folder import JobFolder

pytestmark = pytest.mark.process

Make = Callable[..., Path]
LIVELY = {"vocab_size": 300, "initializer_range": 0.12}
"""Few words; weights large enough that answers differ from one another."""
PROMPTS = [[5, 17, 251, 9], [44], [7, 7, 120, 33, 90, 2, 61, 18, 200, 11, 3], [250, 1, 36]]
TOKENS = 24


def with_adapter(folder: Path, run: RunConfig, scheme: Any = None) -> tuple[BaseModel, Any]:
    """A model with a random adapter that changes what it says, and the adapter's parameters."""
    model = load_model(folder, scheme or Unquantized(), torch.float32)
    parameters = method_for(run.adapter).attach(model, seed=0, dropout=None)
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.named.values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise / math.sqrt(parameter.shape[1]))
    return model, parameters


@pytest.fixture
def run() -> RunConfig:
    """A job whose adapter is on every linear layer."""
    return builders.a_run(adapter={"rank": 4, "alpha": 8.0, "targetModules": ["all-linear"]})


def stock_answer(model: Any, prompt: Sequence[int], stop: Sequence[int]) -> list[int]:
    """transformers' greedy answer without the token that ended it."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
        eos_token_id=list(stop) or None, pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return output[:-1] if output[-1] in stop else output


WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
}
"""Configurations in which a token soon no longer sees the whole prompt."""
MODELS = (
    {kind: (kind, {}) for kind in sorted(FAMILIES)}
    | {f"{kind} with a sliding window": (kind, config) for kind, config in WINDOWED.items()}
    | {"phi3 that grows out of its short factors": ("phi3", LONGROPE)}
)


@pytest.mark.parametrize(("kind", "config"), MODELS.values(), ids=MODELS.keys())
def test_generates_the_tokens_of_transformers_and_peft(
    kind: str, config: dict[str, Any], small_model: Make, run: RunConfig, tmp_path: Path
) -> None:
    """Base and adapter give the same greedy tokens as the stock libraries do with the published files."""
    from peft import PeftModel

    folder = small_model(kind, **LIVELY, **config)
    ours, parameters = with_adapter(folder, run)
    with adapters_disabled(ours):
        base = generate(ours, PROMPTS, max_new_tokens=TOKENS, stop_tokens=())
    adapted = generate(ours, PROMPTS, max_new_tokens=TOKENS, stop_tokens=())
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    expected_base = [stock_answer(theirs, prompt, []) for prompt in PROMPTS]
    theirs = PeftModel.from_pretrained(theirs, write_adapter(JobFolder(tmp_path, run), parameters, None))

    assert base == expected_base
    assert adapted == [stock_answer(theirs, prompt, []) for prompt in PROMPTS]
    assert adapted != base
    # Tied embeddings that are scaled up, as in Gemma, repeat what stands there.
    assert all(len(set(answer)) > (0 if kind.startswith("gemma") else 3) for answer in adapted)


def test_an_answer_does_not_depend_on_the_prompts_beside_it(small_model: Make, run: RunConfig) -> None:
    """Prompts of different lengths give together what each gives alone, sampled ones too, on quantized weights."""
    model, _ = with_adapter(small_model("qwen2", **LIVELY), run, Nf4(double=True))
    together = generate(model, PROMPTS, max_new_tokens=TOKENS, stop_tokens=())
    alone = [generate(model, [prompt], max_new_tokens=TOKENS, stop_tokens=())[0] for prompt in PROMPTS]
    sampled = Sampling(temperature=0.8, top_p=0.9, seed=4)

    assert together == alone
    assert (
        generate(model, PROMPTS[:1], max_new_tokens=TOKENS, stop_tokens=(), sampling=sampled)[0]
        == generate(model, PROMPTS, max_new_tokens=TOKENS, stop_tokens=(), sampling=sampled)[0]
    )


def test_an_answer_ends_at_a_stop_token_without_it(small_model: Make, run: RunConfig) -> None:
    """Each answer ends where it first says a stop token, as transformers' does; others go on."""
    folder = small_model("llama", **LIVELY)
    model, _ = with_adapter(folder, run)
    whole = generate(model, PROMPTS, max_new_tokens=TOKENS, stop_tokens=())
    stop = whole[0][6]
    expected = [answer[: answer.index(stop)] if stop in answer else answer for answer in whole]

    assert generate(model, PROMPTS, max_new_tokens=TOKENS, stop_tokens={stop}) == expected
    assert len(expected[0]) < TOKENS
    assert any(len(answer) == TOKENS for answer in expected)
    assert generate(model, PROMPTS[:1], max_new_tokens=0, stop_tokens=()) == [[]]


def test_bf16_prompts_are_padded_without_a_trace(small_model: Make, run: RunConfig) -> None:
    """In bf16 a prompt's row is filled up; the answer continues the prompt, as one pass over both shows."""
    model = load_model(small_model("llama", **LIVELY), Unquantized(), torch.bfloat16)
    attach_adapters(model.linears, rank=2, alpha=2.0, dropout=None, seed=0)
    answer = generate(model, PROMPTS[2:3], max_new_tokens=6, stop_tokens=())[0]
    again = [
        generate(model, [[*PROMPTS[2], *answer[:count]]], max_new_tokens=1, stop_tokens=())[0]
        for count in range(6)
    ]

    assert [token for tokens in again for token in tokens] == answer


def test_tokens_come_as_they_are_made_and_training_goes_on_afterwards(
    small_model: Make, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is left early gives the model back in training mode, and gradients still flow."""
    monkeypatch.setattr(reference, "_scratch", {})  # memory that a first pass keeps for all later ones
    with running("reference"):
        model, parameters = with_adapter(small_model("llama", **LIVELY), run, Nf4(double=False))
        model.graph.train()
        model.enable_gradient_checkpointing()
        tokens = stream(model, PROMPTS[:2], max_new_tokens=TOKENS, stop_tokens=())
        first = [next(tokens) for _ in range(3)]
        gradients_outside = torch.is_grad_enabled()
        tokens.close()  # type: ignore[attr-defined]
        whole = generate(model, PROMPTS[:2], max_new_tokens=TOKENS, stop_tokens=())
        row = _row(torch.tensor(PROMPTS[0]), torch.arange(4), [4], 0)
        model.hidden_states(row).sum().backward()

    assert first == [(0, whole[0][0]), (1, whole[1][0]), (0, whole[0][1])]
    assert gradients_outside
    assert model.graph.training
    assert bool(parameters.gradient.any())


def test_a_prompt_may_continue_a_cached_one(small_model: Make, run: RunConfig) -> None:
    """Several tokens after cached ones see these and each other as in one pass over all."""
    for config in ({}, {"sliding_window": 4}):
        model, _ = with_adapter(small_model("mistral", **LIVELY, **config), run)
        prompt = PROMPTS[2]
        with torch.no_grad():
            whole = _read_prompt(model, prompt, CachedSequence(20))
            parts = CachedSequence(20)
            _read_prompt(model, prompt[:6], parts)
            rest = _row(torch.tensor(prompt[6:]), torch.arange(6, 11), [5], 0)
            states = model.hidden_states(rest, [parts])

        torch.testing.assert_close(states[-1] @ model.head.t(), whole, rtol=1e-4, atol=1e-4)


def test_an_empty_prompt_is_refused(small_model: Make, run: RunConfig) -> None:
    """There is nothing that it could be continued from."""
    model, _ = with_adapter(small_model("llama", **LIVELY), run)

    with pytest.raises(ValueError, match="an empty prompt cannot be continued"):
        generate(model, [[1], []], max_new_tokens=2, stop_tokens=())


def frequencies(logits: Tensor, sampling: Sampling) -> list[float]:
    """How often each token is chosen."""
    generator = torch.Generator().manual_seed(0)
    draws = [choose(logits, sampling, generator) for _ in range(2000)]
    return [draws.count(token) / len(draws) for token in range(len(logits))]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.0, 0.0, 1.0, 0.0]),
        (Sampling(temperature=1.0), [0.1, 0.2, 0.4, 0.3]),
        (Sampling(temperature=0.5), [1 / 30, 4 / 30, 16 / 30, 9 / 30]),
        (Sampling(temperature=1.0, top_p=0.6), [0.0, 0.0, 4 / 7, 3 / 7]),
        (Sampling(temperature=1.0, top_p=0.01), [0.0, 0.0, 1.0, 0.0]),
    ],
    ids=["greedy", "sampled", "sharper", "two are enough", "one is enough"],
)
def test_tokens_are_drawn_by_temperature_and_top_p(sampling: Sampling, expected: list[float]) -> None:
    """Of four tokens with probabilities 0.1, 0.2, 0.4 and 0.3."""
    logits = torch.tensor([0.1, 0.2, 0.4, 0.3]).log()

    assert frequencies(logits, sampling) == pytest.approx(expected, abs=0.04)
