"""Running base models: packed samples, recomputed layers, evaluation in between."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from builders import run_fields
from qlora_contract.run_config import Adapter, RunConfig
from qlora_trainer.data import packing
from qlora_trainer.data.collate import collate
from qlora_trainer.data.dataset import Samples
from qlora_trainer.modeling.adapter_parameters import AdapterParameters
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.lora import attach_adapters
from qlora_trainer.modeling.lora_linear import Dropout
from qlora_trainer.quantization.schemes import Nf4, Scheme, Unquantized
from qlora_trainer.telemetry.progress import Progress, starting_report
from qlora_trainer.training.context import ReducedScalars
from qlora_trainer.training.evaluation import evaluate
from qlora_trainer.training.objective import SupervisedFineTuning

pytestmark = pytest.mark.process

Make = Callable[..., Path]
Loss = Callable[..., Tensor]
LIVELY = {"vocab_size": 300, "initializer_range": 0.12}
"""Few words; weights large enough for lively attention."""
EVERY = [0, 1, 2, 3, 4]
"""The numbers of all samples."""
DOUBLE = Nf4(double=True)


def adapted(
    folder: Path, scheme: Scheme = DOUBLE, dropout: Dropout | None = None
) -> tuple[BaseModel, AdapterParameters]:
    """A model that trains, with a random adapter whose B is not zero."""
    model = load_model(folder, scheme, torch.float32)
    model.graph.train()
    parameters = attach_adapters(model.linears, rank=3, alpha=7.0, dropout=dropout, seed=0)
    noise = torch.randn(parameters.flat.shape, generator=torch.Generator().manual_seed(1))
    parameters.flat.data.add_(noise, alpha=0.1)
    return model, parameters


def gradient(
    model: BaseModel, parameters: AdapterParameters, groups: list[list[int]], loss_of: Loss
) -> tuple[float, Tensor]:
    """Summed loss and flat gradient over these rows of samples."""
    parameters.gradient.zero_()
    loss = 0.0
    for numbers in groups:
        summed = loss_of(model, numbers)
        summed.backward()
        loss += float(summed.detach())
    return loss, parameters.gradient.clone()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param("llama", {}, id="llama"),
        pytest.param("qwen2", {}, id="qwen2"),
        pytest.param("qwen3", {}, id="qwen3"),
        pytest.param("mistral", {"sliding_window": 5}, id="mistral, sliding"),
    ],
)
def test_packed_equals_unpacked(kind: str, config: dict[str, Any], small_model: Make, loss_of: Loss) -> None:
    """Samples in one row give the loss and gradients of the same samples run alone, or packed in another way."""
    model, parameters = adapted(small_model(kind, **LIVELY, **config))
    loss, expected = gradient(model, parameters, [[n] for n in EVERY], loss_of)

    for groups in ([EVERY], [EVERY[::-1]], [[3, 0], [2], [1, 4]]):
        packed_loss, packed = gradient(model, parameters, groups, loss_of)
        assert packed_loss == pytest.approx(loss, rel=1e-6)
        assert float((packed - expected).norm() / expected.norm()) < 1e-5


def test_each_sample_is_the_same_in_a_row(small_model: Make, samples: Samples) -> None:
    """The hidden states of every sample in a packed row are those of the sample alone."""
    model, _ = adapted(small_model("llama", **LIVELY))
    model.graph.eval()

    def hidden(numbers: list[int]) -> Tensor:
        with torch.no_grad():
            return model.hidden_states(collate(samples, numbers))

    for number, part in zip(EVERY, torch.split(hidden(EVERY), samples.lengths().tolist()), strict=True):
        torch.testing.assert_close(part, hidden([number]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probability", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_recomputing_layers_changes_nothing(
    probability: float, small_model: Make, samples: Samples, loss_of: Loss
) -> None:
    """Full checkpointing gives the same loss and gradients bit for bit, dropout's masks included."""
    results = []
    for recompute in (False, True):
        dropout = Dropout(probability, 0) if probability else None
        model, parameters = adapted(small_model("llama", **LIVELY), dropout=dropout)
        if dropout is not None:
            dropout.at(0, [(0, int(samples.lengths().sum()))])
        if recompute:
            model.enable_gradient_checkpointing()
        results.append(gradient(model, parameters, [EVERY], loss_of))

    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_recomputing_keeps_less(small_model: Make, loss_of: Loss) -> None:
    """Full checkpointing really drops what a layer would keep for the backward pass."""
    kept = []
    for recompute in (False, True):
        model, _ = adapted(small_model("llama", **LIVELY))
        if recompute:
            model.enable_gradient_checkpointing()
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model)
        kept.append(sum(sizes))

    assert kept[1] < kept[0] / 4


def test_dropout_does_not_depend_on_the_micro_batch(
    small_model: Make, samples: Samples, loss_of: Loss
) -> None:
    """Bins run together or one by one meet the same masks: loss and gradients agree."""
    dropout = Dropout(0.3, 0)
    model, parameters = adapted(small_model("llama", **LIVELY), dropout=dropout)
    lengths = samples.lengths().tolist()
    results = []
    for groups in ([EVERY], [[0, 1], [2, 3, 4]], [[n] for n in EVERY]):
        parameters.gradient.zero_()
        loss = 0.0
        for numbers in groups:
            dropout.at(4, [(n, lengths[n]) for n in numbers])
            summed = loss_of(model, numbers)
            summed.backward()
            loss += float(summed.detach())
        results.append((loss, parameters.gradient.clone()))

    for loss, flat in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert float((flat - results[0][1]).norm() / flat.norm()) < 1e-5


@pytest.mark.parametrize("scheme", [DOUBLE, Unquantized()], ids=["nf4-double", "none"])
def test_evaluation_leaves_training_alone(
    scheme: Scheme, small_model: Make, samples: Samples, loss_of: Loss
) -> None:
    """An evaluation between two steps changes no gradient, generator or mode, and no bit of the next step."""
    dropout = Dropout(0.3, 0)
    dropout.at(0, [(0, int(samples.lengths().sum()))])
    model, parameters = adapted(small_model("llama", **LIVELY), scheme, dropout)
    before = gradient(model, parameters, [EVERY], loss_of)
    state = torch.get_rng_state()
    context: Any = SimpleNamespace(
        run=SimpleNamespace(training=SimpleNamespace(max_sequence_length=20), adapter=Adapter()),
        world=SimpleNamespace(rank=0, size=1),
        stop=threading.Event(),
        progress=Progress(starting_report(RunConfig.model_validate_json(json.dumps(run_fields())))),
        all_reduce_scalars=lambda sums: ReducedScalars(stop_requested=False, sums=sums, per_rank={}),
    )
    found = evaluate(context, SupervisedFineTuning(), model, samples, 30)

    assert torch.equal(parameters.gradient, before[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.graph.modules())
    after = gradient(model, parameters, [EVERY], loss_of)
    assert after[0] == before[0]
    assert torch.equal(after[1], before[1])
    model.graph.eval()
    supervised = int(samples.supervised_counts().sum())
    assert found == pytest.approx(float(loss_of(model).detach()) / supervised, rel=1e-6)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_evaluation_is_the_same_over_any_number_of_ranks(
    ranks: int, small_model: Make, samples: Samples
) -> None:
    """Ranks' sums, those of ranks without a bin included, add up to the loss of one rank."""
    model, _ = adapted(small_model("llama", **LIVELY))

    def sums(rank: int, size: int) -> tuple[float, float]:
        kept: list[dict[str, float]] = []

        def all_reduce_scalars(mine: dict[str, float]) -> ReducedScalars:
            kept.append(mine)
            return ReducedScalars(stop_requested=False, sums={"loss": 1.0, "count": 1.0}, per_rank={})

        context: Any = SimpleNamespace(
            run=SimpleNamespace(training=SimpleNamespace(max_sequence_length=20), adapter=Adapter()),
            world=SimpleNamespace(rank=rank, size=size),
            stop=threading.Event(),
            progress=Progress(starting_report(RunConfig.model_validate_json(json.dumps(run_fields())))),
            all_reduce_scalars=all_reduce_scalars,
        )
        evaluate(context, SupervisedFineTuning(), model, samples, 30)
        return kept[0]["loss"], kept[0]["count"]

    shares = [sums(rank, ranks) for rank in range(ranks)]
    alone = sums(0, 1)

    assert sum(loss for loss, _ in shares) == pytest.approx(alone[0], rel=1e-6)
    assert sum(count for _, count in shares) == alone[1] == int(samples.supervised_counts().sum())
    bins = packing.pack(samples.lengths(), np.arange(len(samples)), 20, packing=True)
    assert sum(count > 0 for _, count in shares) == min(ranks, len(bins))
