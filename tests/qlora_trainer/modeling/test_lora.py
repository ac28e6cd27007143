"""Which layers get adapters, how these start, and what PEFT is told of them."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import a_run
from qlora_contract.run_config import Adapter
from qlora_trainer.artifacts.adapter import write_adapter
from qlora_trainer.data.collate import collate
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.adapter_parameters import AdapterParameters, flat_parameters
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.lora import Lora, attach_adapters, target_layers
from qlora_trainer.modeling.lora_linear import LoraLinear
from qlora_trainer.quantization.frozen_weight import UnquantizedWeight
from qlora_trainer.quantization.schemes import Unquantized
from qlora_trainer.storage.job_folder import JobFolder

pytestmark = pytest.mark.process

Make = Callable[..., Path]
IN, OUT, RANK = 64, 10, 3


def network(names: list[str]) -> dict[str, LoraLinear]:
    """Layers of different sizes, one of them not a multiple of the alignment."""
    sizes = {"a": (OUT, IN), "b": (7, 64), "c": (3, 5)}
    return {n: LoraLinear(n, UnquantizedWeight(torch.ones(sizes[n])), None) for n in names}


def attach(names: list[str], seed: int = 0) -> AdapterParameters:
    """Adapters of rank 3 on these layers."""
    return attach_adapters(network(names), rank=RANK, alpha=5.0, dropout=None, seed=seed)


def test_start_does_not_depend_on_the_order_of_layers() -> None:
    """Every layer's A depends on the seed and its name alone."""
    for names in itertools.permutations("abc"):
        parameters = attach(list(names))
        for name, parameter in attach(["a", "b", "c"]).named.items():
            assert torch.equal(parameters.named[name], parameter), name


def test_start_is_that_of_peft() -> None:
    """A is uniform within 1 / sqrt(in) and fills it; B is zero; another seed gives another A."""
    parameters, other = attach(["a"]), attach(["a"], seed=1)
    a, b = parameters.named["a.lora_A.weight"], parameters.named["a.lora_B.weight"]

    assert a.shape == (RANK, IN)
    assert b.shape == (OUT, RANK)
    assert not b.any()
    assert 0.95 / math.sqrt(IN) < float(a.detach().abs().max()) <= 1 / math.sqrt(IN)
    assert not torch.equal(a, other.named["a.lora_A.weight"])


def test_scale_is_alpha_over_rank() -> None:
    """attach_adapters gives every layer the scale alpha / rank."""
    layers = network(["a", "b"])
    attach_adapters(layers, rank=RANK, alpha=5.0, dropout=None, seed=0)

    assert [made.scale for made in layers.values()] == [5.0 / RANK] * 2


# --- what is adapted


def test_adapters_and_gradients_are_views_of_flat_buffers() -> None:
    """What is written to the flat buffers is what layers see, and backward adds into the flat gradient in place."""
    layers = network(["a", "b", "c"])
    parameters = attach_adapters(layers, rank=RANK, alpha=5.0, dropout=None, seed=0)
    parameters.flat.data.fill_(0.5)
    gradient = parameters.gradient
    for made in layers.values():
        for _ in range(2):
            made(torch.ones(1, made.shape[1])).sum().backward()

    assert all(bool((p == 0.5).all()) for p in parameters.named.values())
    assert parameters.gradient is gradient
    total = sum(float(p.grad.sum()) for p in parameters.named.values() if p.grad is not None)
    assert float(gradient.sum()) == pytest.approx(total)
    for made in layers.values():
        assert made.lora_b is not None
        assert made.lora_b.grad is not None
        # dB = s dy^T (x A^T), with dy and x all ones, twice
        expected = 2 * 5.0 / RANK * 0.5 * made.shape[1]
        assert made.lora_b.grad.flatten().tolist() == pytest.approx([expected] * made.lora_b.numel())


def linears(small_model: Make) -> dict[str, LoraLinear]:
    """The linear layers of a model of two layers."""
    return load_model(small_model("llama", vocab_size=300), Unquantized(), torch.float32).linears


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        pytest.param(["q_proj"], ["0.self_attn.q_proj", "1.self_attn.q_proj"], id="last part"),
        pytest.param(["model.layers.1.mlp.up_proj"], ["1.mlp.up_proj"], id="whole path"),
        pytest.param(
            ["up_proj", "down_proj"],
            ["0.mlp.up_proj", "0.mlp.down_proj", "1.mlp.up_proj", "1.mlp.down_proj"],
            id="several, in the model's order",
        ),
        pytest.param(
            ["layers.1.mlp.up_proj", "up_proj"],
            ["0.mlp.up_proj", "1.mlp.up_proj"],
            id="overlapping, each once",
        ),
    ],
)
def test_targets(targets: list[str], expected: list[str], small_model: Make) -> None:
    """Targets are last parts or whole paths, as in PEFT."""
    found = target_layers(linears(small_model), targets)

    assert sorted(found) == sorted(f"model.layers.{name}" for name in expected)


def test_all_linear_is_every_linear(small_model: Make) -> None:
    """`all-linear` names all layers, whatever else is named."""
    layers = linears(small_model)

    assert target_layers(layers, ["all-linear"]) == layers
    assert len(layers) == 14


@pytest.mark.parametrize("target", ["proj", "lm_head", "q", "embed_tokens", "layers.7.mlp.up_proj", "Q_PROJ"])
def test_unknown_targets_name_those_that_exist(target: str, small_model: Make) -> None:
    """A target that names no layer is refused with the names there are."""
    with pytest.raises(
        ModelError, match=rf"'{target}'.*down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    ):
        target_layers(linears(small_model), ["q_proj", target])


# --- the method


SHAPES = {"model.layers.0.q_proj": (6, 4), "model.layers.0.up_proj": (5, 3), "model.layers.1.q_proj": (6, 4)}
"""Layers as the method sees them before a model is loaded."""


def test_what_is_counted_is_what_is_attached() -> None:
    """Names, shapes and their number follow from the layers' shapes: A (rank, in) and B (out, rank) of each."""
    method = Lora(Adapter(rank=2, target_modules=["q_proj"]))

    assert method.parameter_shapes(SHAPES, None) == {
        "model.layers.0.q_proj.lora_A.weight": (2, 4),
        "model.layers.0.q_proj.lora_B.weight": (6, 2),
        "model.layers.1.q_proj.lora_A.weight": (2, 4),
        "model.layers.1.q_proj.lora_B.weight": (6, 2),
    }
    assert method.parameter_count(SHAPES, None) == 2 * 2 * (4 + 6)


@pytest.mark.parametrize(
    "targets", [["all-linear"], ["q_proj", "down_proj"], ["model.layers.1.mlp.up_proj"]], ids=str
)
def test_attaching_makes_the_parameters_that_were_counted(targets: list[str], small_model: Make) -> None:
    """What a model gets has the very names and shapes that were told from its layers' shapes, in the same order."""
    method = Lora(Adapter(rank=5, alpha=7.0, target_modules=targets))
    model = load_model(small_model("llama", vocab_size=300), Unquantized(), torch.float32)
    parameters = method.attach(model, seed=3, dropout=None)
    expected = attach_adapters(target_layers(model.linears, targets), rank=5, alpha=7.0, dropout=None, seed=3)

    shapes = method.parameter_shapes({name: layer.shape for name, layer in model.linears.items()}, None)
    assert {name: tuple(p.shape) for name, p in parameters.named.items()} == shapes
    assert list(parameters.named) == list(shapes)
    assert torch.equal(parameters.flat, expected.flat)


def test_a_missing_target_is_refused_before_anything_is_loaded() -> None:
    """Counting refuses what attaching would refuse."""
    with pytest.raises(
        ModelError, match=r"no linear layer is called 'k_proj'; this model has: q_proj, up_proj"
    ):
        Lora(Adapter(target_modules=["k_proj"])).parameter_count(SHAPES, None)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        pytest.param(["all-linear"], ["q_proj", "up_proj"], id="all, by their names"),
        pytest.param(["up_proj", "q_proj"], ["q_proj", "up_proj"], id="as asked for, sorted"),
    ],
)
def test_peft_is_told_what_rebuilds_the_adapter(targets: list[str], expected: list[str]) -> None:
    """LoRA's part of adapter_config.json: rank, alpha, dropout, and the layers by name."""
    method = Lora(Adapter(rank=2, alpha=6.0, dropout=0.25, target_modules=targets))
    parameters = flat_parameters(method.parameter_shapes(SHAPES, None))

    assert method.peft_config(parameters) == {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6.0,
        "lora_dropout": 0.25,
        "target_modules": expected,
        "bias": "none",
    }


def test_a_module_that_is_named_twice_is_adapted_once() -> None:
    """And is named once to PEFT."""
    once, twice = (Lora(Adapter(target_modules=targets)) for targets in (["q_proj"], ["q_proj", "q_proj"]))
    parameters = flat_parameters(twice.parameter_shapes(SHAPES, None))

    assert twice.parameter_shapes(SHAPES, None) == once.parameter_shapes(SHAPES, None)
    assert twice.peft_config(parameters)["target_modules"] == ["q_proj"]


# --- rsLoRA, and ranks and alphas of layers


@pytest.mark.parametrize(
    "settings",
    [
        {"rslora": True},
        {"rank_pattern": {"down_proj": 9, "model.layers.1.self_attn.q_proj": 2}},
        {"alpha_pattern": {"mlp.up_proj": 1.5}, "rank_pattern": {"up_proj": 3}, "rslora": True},
    ],
    ids=str,
)
def test_variants_are_those_of_stock_peft(
    settings: dict[str, Any], small_model: Make, samples: Samples, loss_of: Callable[..., Any], tmp_path: Path
) -> None:
    """The adapter that is exported gives stock peft our loss and our gradients of every matrix."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = small_model("llama", vocab_size=300, initializer_range=0.12)
    adapter = {"rank": 5, "alpha": 7.0} | settings
    model = load_model(folder, Unquantized(), torch.float32)
    parameters = Lora(Adapter.model_validate(adapter)).attach(model, seed=0, dropout=None)
    parameters.flat.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    ours = loss_of(model)
    ours.backward()
    job = JobFolder(tmp_path, a_run(adapter=Adapter.model_validate(adapter).model_dump(by_alias=True)))
    job.acquire()
    staged = write_adapter(job, parameters, None)

    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), staged, is_trainable=True)
    theirs = torch.zeros(())
    for number in range(len(samples)):
        batch = collate(samples, [number])
        logits = stock(input_ids=batch.ids[None]).logits[0]
        theirs = theirs - logits.log_softmax(-1)[batch.logit_positions, batch.targets].sum()
    theirs.backward()
    gradients = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}

    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert len(gradients) == len(parameters.named)
    for name, parameter in parameters.named.items():
        found = gradients[f"base_model.model.{name.removesuffix('.weight')}.default.weight"]
        torch.testing.assert_close(parameter.grad, found, rtol=1e-3, atol=1e-5, msg=name)


def test_patterns_count_what_they_train() -> None:
    """A layer with a rank of its own has that many rows in what is told before anything is loaded."""
    shapes = Lora(Adapter(rank=2, rank_pattern={"up_proj": 3})).parameter_shapes(SHAPES, None)

    assert {shape[0] for name, shape in shapes.items() if name.endswith("up_proj.lora_A.weight")} == {3}
    assert {shape[0] for name, shape in shapes.items() if name.endswith("q_proj.lora_A.weight")} == {2}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            {"k_proj": 3},
            "adapter.rankPattern: no adapted layer is called 'k_proj'; adapted are q_proj, up_proj",
        ),
        ({"q_proj": 3, "model.layers.1.q_proj": 4}, "both name model.layers.1.q_proj; one of them must go"),
    ],
    ids=["no layer", "twice"],
)
def test_patterns_that_mean_nothing_are_refused(pattern: dict[str, int], message: str) -> None:
    """Maps have no order in Kubernetes, so that the first of two could not win, as it does in PEFT."""
    with pytest.raises(ModelError, match=message):
        Lora(Adapter(rank_pattern=pattern)).parameter_count(SHAPES, None)
