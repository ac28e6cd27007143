"""The seam between the loop and what it minimizes: supervised fine-tuning, and another objective in its place."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from qlora_trainer.data.collate import Batch, collate
from qlora_trainer.data.dataset import Samples
from qlora_trainer.modeling.adapter_methods import adapters_disabled
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.training.context import RankContext
from qlora_trainer.training.evaluation import evaluate
from qlora_trainer.training.loop import one_step
from qlora_trainer.training.objective import BatchLoss, Objective, SupervisedFineTuning
from qlora_trainer.training.setup import TrainState, agree_on_inputs, build

pytestmark = pytest.mark.process


class GainOverBase:
    """A double: cross-entropy less that of the frozen base, as preference objectives compare with a reference.

    It takes two passes, counts samples instead of tokens, and reports the reference as a metric.
    """

    metrics: tuple[str, ...] = ("reference",)

    def counts(self, samples: Samples) -> NDArray[np.int64]:
        """(samples,): one each."""
        return np.ones(len(samples), np.int64)

    def loss(self, model: BaseModel, batch: Batch) -> BatchLoss:
        """The gain, summed."""
        tuning = SupervisedFineTuning()
        with torch.no_grad(), adapters_disabled(model):
            reference = float(tuning.loss(model, batch).total)
        total = tuning.loss(model, batch).total
        return BatchLoss(total - reference, {"reference": reference})


Built = Callable[..., TrainState]


@pytest.fixture
def built() -> Built:
    """make(context, objective) -> the state before the first step."""

    def make(context: RankContext, objective: Objective) -> TrainState:
        state, _ = build(context, objective, agree_on_inputs(context))
        return state

    return make


@pytest.mark.parametrize("pad_multiple", [1, 64])
def test_fine_tuning_sums_the_cross_entropy_of_supervised_tokens(
    ready: Callable[..., RankContext], built: Built, pad_multiple: int
) -> None:
    """It is that of logits computed in full; neither prompts nor padding count."""
    objective = SupervisedFineTuning()
    state = built(ready(), objective)
    batch = collate(state.data.train, [0, 1, 2], pad_multiple)
    with torch.no_grad():
        logits = state.model.hidden_states(batch) @ state.model.head.float().t()
        expected = F.cross_entropy(logits[batch.logit_positions], batch.targets, reduction="sum")

        assert float(objective.loss(state.model, batch).total) == pytest.approx(float(expected), rel=1e-6)
    assert objective.counts(state.data.train)[[0, 1, 2]].sum() == len(batch.targets)


def test_a_step_minimizes_whatever_the_objective_says(
    ready: Callable[..., RankContext], built: Built
) -> None:
    """A constant reference leaves the gradient's direction alone; the mean is over what the objective counts."""
    context = ready(training={"maxGradNorm": 1e6})
    states = [built(context, objective) for objective in (SupervisedFineTuning(), GainOverBase())]
    tuned, gained = (one_step(context, state)[0] for state in states)
    samples = [sample for bin_ in states[0].schedule.step(0).bins for sample in bin_]

    assert gained.loss == pytest.approx(0.0, abs=1e-12), "at the start the adapter changes nothing"
    assert gained.more["reference"] * len(samples) == pytest.approx(tuned.loss * tuned.supervised_tokens)
    assert gained.grad_norm * len(samples) == pytest.approx(
        tuned.grad_norm * tuned.supervised_tokens, rel=1e-5
    )
    assert gained.line()["reference"] == gained.more["reference"]
    assert (gained.tokens, gained.supervised_tokens) == (tuned.tokens, tuned.supervised_tokens)


def test_evaluation_measures_whatever_the_objective_says(
    ready: Callable[..., RankContext], built: Built
) -> None:
    """After steps that learn something, the gain over the base is the fall of the loss per sample."""
    context, objective = ready(training={"maxSteps": 6}), GainOverBase()
    state: Any = built(context, objective)
    for _ in range(4):
        one_step(context, state)
    samples = state.data.evaluation
    micro = state.memory.micro_batch_tokens
    tuned = evaluate(context, SupervisedFineTuning(), state.model, samples, micro)
    with adapters_disabled(state.model):
        base = evaluate(context, SupervisedFineTuning(), state.model, samples, micro)
    gain = evaluate(context, objective, state.model, samples, micro)
    assert tuned is not None
    assert base is not None

    assert gain == pytest.approx((tuned - base) * samples.supervised_counts().sum() / len(samples), rel=1e-6)
    assert gain < 0
