"""Prompt and prefix tuning against peft: ours runs packed rows, theirs every sample alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import builders
from model_folders import stock_model
from qlora_contract.job_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_contract.run_config import Adapter
from qlora_trainer.artifacts import checkpoint
from qlora_trainer.artifacts.adapter import model_card, reload_adapter, write_adapter
from qlora_trainer.artifacts.checkpoint import LoopState
from qlora_trainer.data.collate import collate
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import ModelError
from qlora_trainer.export.adapter_weights import read_adapter
from qlora_trainer.inference.generation import generate
from qlora_trainer.modeling.adapter_methods import adapters_disabled, method_for
from qlora_trainer.modeling.adapter_parameters import AdapterParameters
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.families import FAMILIES, WRAPPERS
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


LINEAR = ("qwen3_5_text", "qwen3_5")
"""Families in which some layers have no keys and values."""
CASES = [
    (family, kind)
    for family in sorted({*FAMILIES, *WRAPPERS})
    for kind in (("prompt",) if family in LINEAR else ("prompt", "prefix"))
]


@pytest.mark.parametrize(("family", "kind"), [*CASES, ("llama", "projected"), ("glm", "projected")])
def test_loss_gradients_and_logits_are_peft_s(family: str, kind: str, small_model: Make) -> None:
    """Packed rows give the loss, the gradients and the logits of samples that peft runs alone."""
    folder, samples = small_model(family, **LIVELY), random_samples()
    model, parameters = ours(folder, kind)
    stock = theirs(folder, kind, parameters)

    assert step(model, samples, PACKED) == pytest.approx(
        their_step(stock, samples), rel=0, abs=LOSS_TOLERANCE
    )
    assert_same_gradients(parameters, stock)
    for number, logits in enumerate(our_logits(model, samples)):
        with torch.no_grad():
            expected = their_logits(stock, samples, number)
        assert float((logits - expected).abs().max()) <= LOGITS_TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["prefix", "projected"])
@pytest.mark.parametrize("family", LINEAR)
def test_a_prefix_needs_keys_and_values_in_every_layer(family: str, kind: str, small_model: Make) -> None:
    """Layers of linear attention have none: refused before weights are read, and by whatever attaches it."""
    folder = small_model(family, **LIVELY)
    refused = "prefix-tuning, but 1 of the model's 2 layers have linear attention.*take lora or prompt-tuning"

    with pytest.raises(ModelError, match=refused):
        model_shape(folder, adapter_of(kind))
    with pytest.raises(ModelError, match=refused):
        ours(folder, kind)


@pytest.mark.parametrize("scheme", [Nf4(double=True), Int8()], ids=["nf4", "int8"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_quantized_bases_give_what_peft_gives_on_their_weights(
    kind: str, scheme: Any, small_model: Make
) -> None:
    """On a quantized base, loss and gradients are those of peft on the weights that it stands for."""
    folder, samples = small_model("glm4", **LIVELY), random_samples()
    model, parameters = ours(folder, kind, scheme)
    stock = theirs(folder, kind, parameters, model)

    assert step(model, samples, PACKED) == pytest.approx(
        their_step(stock, samples), rel=0, abs=LOSS_TOLERANCE
    )
    assert_same_gradients(parameters, stock)


@pytest.mark.parametrize(("family", "kind"), [("llama", "prefix"), *(("glm", kind) for kind in ADAPTERS)])
def test_twenty_steps_are_peft_s(family: str, kind: str, small_model: Make) -> None:
    """Trained for 20 steps of AdamW, the losses of packed rows stay those of peft's unpacked training."""
    folder, samples = small_model(family, **LIVELY), random_samples()
    model, parameters = ours(folder, kind)
    stock = theirs(folder, kind, parameters)
    mine = AdapterAdamW(parameters, lr=1e-2, weight_decay=0.0, ratio=1.0)
    other = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(20):
        parameters.gradient.zero_()
        other.zero_grad()
        losses.append((step(model, samples, PACKED), their_step(stock, samples)))
        mine.step()
        other.step()

    for found, expected in losses:
        assert found == pytest.approx(expected, rel=1e-4)
    assert losses[-1][0] < losses[0][0]


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packing_ranks_and_checkpointing_change_nothing(
    kind: str, dtype: torch.dtype, small_model: Make
) -> None:
    """The gradient is the same packed or not, recomputed or not, and as the sum of two ranks' shares.

    In bf16 a row has padding, and with prompt tuning another than the batch.
    """
    folder, samples = small_model("glm", **LIVELY), random_samples()
    objective, gradients = SupervisedFineTuning(), []
    for recompute, bins, pad in ((False, UNPACKED, 1), (False, PACKED, 64), (True, PACKED, 64)):
        model = load_model(folder, Unquantized(), dtype)
        model.graph.train()
        if recompute:
            model.enable_gradient_checkpointing()
        parameters = method_for(adapter_of(kind)).attach(model, seed=3, dropout=None)
        shares = []
        for numbers in bins:
            parameters.gradient.zero_()
            objective.loss(model, collate(samples, numbers, pad)).total.backward()
            shares.append(parameters.gradient.clone())
        gradients.append(sum(shares))
    unpacked, packed, recomputed = gradients

    assert torch.equal(packed, recomputed)
    tolerance = GRADIENT_TOLERANCE if dtype == torch.float32 else 3e-2
    assert float((packed - unpacked).norm() / unpacked.norm()) < tolerance


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_packed_sample_sees_nothing_of_its_neighbors(kind: str, small_model: Make) -> None:
    """Other neighbors change no bit of a sample's output behind the same virtual tokens."""
    model, _ = ours(small_model("glm", **LIVELY), kind)
    samples = random_samples()
    others = Samples(
        np.where(np.arange(len(samples.ids)) < 13, samples.ids, 7), samples.mask, samples.offsets
    )

    assert torch.equal(our_logits(model, samples)[0], our_logits(model, others)[0])
    assert not torch.equal(our_logits(model, samples)[2], our_logits(model, others)[2])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_switched_off_the_model_is_its_base(kind: str, small_model: Make) -> None:
    """Within adapters_disabled the loss is the base's bit for bit."""
    folder, samples = small_model("llama", **LIVELY), random_samples()
    base = our_logits(load_model(folder, Unquantized(), torch.float32), samples)
    model, _ = ours(folder, kind)
    with adapters_disabled(model):
        disabled = our_logits(model, samples)

    assert all(torch.equal(a, b) for a, b in zip(base, disabled, strict=True))
    assert not torch.equal(our_logits(model, samples)[0], base[0])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_finished_adapter_is_peft_s(kind: str, small_model: Make, tmp_path: Path) -> None:
    """Stock peft loads the written files and computes our logits; so does a model of ours that loads them again."""
    from peft import PeftModel

    folder, samples = small_model("glm4", **LIVELY), random_samples()
    model, _ = ours(folder, kind)
    expected = our_logits(model, samples)
    run = builders.a_run(version=2, adapter=ADAPTERS[kind])
    _, parameters = ours(folder, kind)
    written = write_adapter(JobFolder(tmp_path, run), parameters, str(folder))
    stock = PeftModel.from_pretrained(stock_model(folder), written).eval()
    other, own = ours(folder, kind)
    own.flat.data.zero_()
    reload_adapter(written, own)

    for number, (logits, again) in enumerate(zip(expected, our_logits(other, samples), strict=True)):
        with torch.no_grad():
            found = their_logits(stock, samples, number)
        assert float((logits - found).abs().max()) <= LOGITS_TOLERANCE * float(found.abs().max())
        assert torch.allclose(logits, again, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_resumed_training_repeats_an_undisturbed_one(kind: str, small_model: Make, tmp_path: Path) -> None:
    """After a checkpoint is loaded, parameters and moments go on bit for bit; peft's files in it are the adapter."""
    folder, samples = small_model("llama", **LIVELY), random_samples()
    job = JobFolder(tmp_path, builders.a_run(version=2, adapter=ADAPTERS[kind]))
    job.acquire()

    def trained(steps: int, resumed: Path | None = None) -> tuple[AdapterParameters, torch.optim.Optimizer]:
        model, parameters = ours(folder, kind)
        optimizer = AdapterAdamW(parameters, lr=1e-2, weight_decay=0.0, ratio=1.0)
        if resumed is not None:
            checkpoint.load(resumed, parameters, optimizer)
        for _ in range(steps):
            parameters.gradient.zero_()
            step(model, samples, PACKED)
            optimizer.step()
        return parameters, optimizer

    parameters, optimizer = trained(2)
    saved = checkpoint.save(job, parameters, optimizer, LoopState(step=2), keep=1)
    published = write_adapter(job, parameters, None)

    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (saved / name).read_bytes() == (published / name).read_bytes()
    assert torch.equal(trained(2, saved)[0].flat, trained(4)[0].flat)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["glm", "gemma3_text"])
def test_answers_are_those_of_peft(family: str, kind: str, small_model: Make) -> None:
    """Greedy answers, grown token by token behind a cache, are what peft's whole passes say, beside other prompts."""
    folder = small_model(family, **LIVELY)
    model, parameters = ours(folder, kind)
    stock = theirs(folder, kind, parameters).eval()
    prompts = [[5, 17, 251, 9], [44], [7, 7, 120, 33, 90, 2, 61, 18]]
    found = generate(model, prompts, max_new_tokens=6, stop_tokens=())

    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(stock(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == answer


def test_a_prompt_starts_as_peft_draws_it_or_as_a_text(small_model: Make) -> None:
    """Random prompts are normal with deviation 1; a text's tokens are repeated or cut off to the number asked for."""
    model = load_model(small_model("gemma3_text", **LIVELY), Unquantized(), torch.float32)
    fields = {"method": "prompt-tuning", "numVirtualTokens": 64}
    drawn = method_for(Adapter(**fields)).attach(model, seed=0, dropout=None)
    text = Adapter(**fields, promptInit="text", promptInitText="Say what it is.")
    started = method_for(text).attach(model, seed=0, dropout=None, encode=lambda _: [4, 9, 2])
    graph: Any = model.graph

    assert float(drawn.flat.detach().std()) == pytest.approx(1.0, rel=0.05)
    expected = graph.get_input_embeddings()(torch.tensor([4, 9, 2] * 22)[:64])
    assert torch.equal(started.named["prompt_encoder.embedding.weight"], expected)
    with pytest.raises(ModelError, match="no tokens"):
        method_for(text).attach(model, seed=0, dropout=None, encode=lambda _: [])


@pytest.mark.parametrize("family", ["glm", "gemma3_text"])
@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_virtual_tokens_of_a_text_are_read_as_that_text(
    family: str, method: str, dtype: torch.dtype, small_model: Make
) -> None:
    """Untrained, they give a sample the logits that it has behind the text's tokens, whatever the method."""
    folder, text, own = small_model(family, **LIVELY), [4, 9, 2, 77], [5, 17, 251]
    model = load_model(folder, Unquantized(), dtype)
    ids = np.array([*text, *own], np.int32)
    mask = np.zeros(len(ids), np.uint8)
    behind = collate(Samples(ids, mask, np.array([0, len(ids)])), [0], 1 if dtype == torch.float32 else 64)
    with torch.no_grad():
        expected = model.logits(model.hidden_states(behind)[len(text) : len(ids)])
    fields = {"numVirtualTokens": 4, "promptInit": "text", "promptInitText": "Say what it is."}
    method_for(Adapter(method=method, **fields)).attach(model, seed=0, dropout=None, encode=lambda _: text)
    alone = collate(Samples(ids[4:], mask[4:], np.array([0, 3])), [0], 1 if dtype == torch.float32 else 64)
    with torch.no_grad():
        found = model.logits(model.hidden_states(alone)[:3])

    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_start_depends_on_the_seed_alone(kind: str, small_model: Make) -> None:
    """Every rank starts with the same numbers; another seed gives others; MLPs are drawn within +-1/sqrt(in)."""
    model = load_model(small_model("llama", **LIVELY), Unquantized(), torch.float32)
    first, again, other = (
        method_for(adapter_of(kind)).attach(model, seed=seed, dropout=None) for seed in (0, 0, 1)
    )

    assert torch.equal(first.flat, again.flat)
    assert not torch.equal(first.flat, other.flat)
    for name, parameter in first.named.items():
        if ".transform." in name:
            width = first.named[f"{name.rpartition('.')[0]}.weight"].shape[1]
            assert 0.8 < float(parameter.detach().abs().max()) * math.sqrt(width) <= 1.0, name


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["glm", "gemma3"])
def test_the_plan_counts_what_is_trained(family: str, kind: str, small_model: Make) -> None:
    """The shape that is read from config.json alone knows how many numbers the adapter has."""
    folder = small_model(family, **LIVELY)
    _, parameters = ours(folder, kind)

    shape = model_shape(folder, adapter_of(kind))

    assert shape.adapter_weights == sum(p.numel() for p in parameters.named.values())
    made = 0 if kind == "prompt" else TOKENS * 2 * shape.layers * shape.kv_heads * shape.head_size
    assert shape.made_weights == made


@pytest.mark.parametrize("kind", ADAPTERS)
def test_no_export_takes_virtual_tokens_for_weights(kind: str, small_model: Make, tmp_path: Path) -> None:
    """An export names the adapter's kind; the card names its method, and how it is loaded."""
    folder = small_model("llama", **LIVELY)
    run = builders.a_run(version=2, adapter=ADAPTERS[kind])
    written = write_adapter(JobFolder(tmp_path, run), ours(folder, kind)[1], str(folder))
    report = {
        "provenance": {"base_model": None}, "base_eval_loss": 3.0, "base_eval_loss_quantized": 3.1, "eval_loss": 2.0,
        "compute_dtype": "bf16", "steps": 9, "tokens": 99,
    }  # fmt: skip

    with pytest.raises(
        ModelError, match=r"kind (PROMPT|PREFIX)_TUNING: only LoRA's become part of the weights"
    ):
        read_adapter(written)
    card = model_card(run, report)
    assert f"A {run.adapter.method} adapter for" in card
    assert f"{TOKENS} virtual tokens" in card
    assert "PeftModel.from_pretrained" in card
