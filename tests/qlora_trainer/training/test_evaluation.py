"""The loss on held-out samples, against transformers' own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.data.dataset import Samples
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.quantization.schemes import AsStored
from qlora_trainer.training.context import RankContext, StopRequested
from qlora_trainer.training.evaluation import evaluate
from qlora_trainer.training.objective import SupervisedFineTuning

pytestmark = pytest.mark.process

LENGTHS = (5, 17, 32, 2, 9, 23, 12)
OBJECTIVE = SupervisedFineTuning()


@pytest.fixture(scope="module")
def folder(small_model: Callable[..., Path]) -> Path:
    """A small Llama."""
    return small_model("llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> BaseModel:
    """The model as the trainer loads it, training."""
    loaded = load_model(folder, AsStored(), torch.float32)
    loaded.graph.train()
    return loaded


@pytest.fixture(scope="module")
def samples() -> Samples:
    """Samples of several lengths, about half of whose tokens are supervised, the last always."""
    random = np.random.default_rng(0)
    ids = random.integers(1, 4000, sum(LENGTHS)).astype(np.int32)
    mask = random.integers(0, 2, sum(LENGTHS)).astype(np.uint8)
    offsets = np.cumsum([0, *LENGTHS], dtype=np.int64)
    mask[offsets[:-1]] = 0
    mask[offsets[1:] - 1] = 1
    return Samples(ids, mask, offsets)


@pytest.fixture
def context(a_context: Callable[..., RankContext]) -> RankContext:
    """The only rank of a job whose bins hold up to 32 tokens."""
    return a_context(training={"epochs": 1, "globalBatchTokens": 64, "maxSequenceLength": 32})


@pytest.fixture(scope="module")
def expected(folder: Path, samples: Samples) -> float:
    """Mean cross-entropy per supervised token by stock transformers, one sample at a time."""
    stock = AutoModelForCausalLM.from_pretrained(folder)
    loss, count = 0.0, 0
    for number in range(len(samples)):
        ids, mask = samples.sample(number)
        with torch.no_grad():
            logits = stock(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double()
        targets = np.flatnonzero(mask)
        nll = -logits.log_softmax(-1)[targets - 1, ids[targets]]
        loss, count = loss + float(nll.sum()), count + len(targets)
    return loss / count


@pytest.mark.parametrize("micro_batch_tokens", [1, 32, 64, 10_000])
def test_it_is_transformers_loss_however_samples_are_batched(
    context: RankContext, model: BaseModel, samples: Samples, expected: float, micro_batch_tokens: int
) -> None:
    """Packed and batched in any way, the mean is that of samples run one by one."""
    found = evaluate(context, OBJECTIVE, model, samples, micro_batch_tokens)

    assert found == pytest.approx(expected, rel=1e-5)


def test_without_samples_there_is_no_loss(context: RankContext, model: BaseModel) -> None:
    """A job without evaluation data has no eval loss, rather than one of 0."""
    assert evaluate(context, OBJECTIVE, model, None, 64) is None


def test_it_touches_nothing_that_training_depends_on(
    context: RankContext, model: BaseModel, samples: Samples
) -> None:
    """The random generator stands where it stood, and the model is training again."""
    before = torch.get_rng_state()
    evaluate(context, OBJECTIVE, model, samples, 64)

    assert torch.equal(torch.get_rng_state(), before)
    assert model.graph.training


def test_a_request_to_stop_ends_it(context: RankContext, model: BaseModel, samples: Samples) -> None:
    """Asked to stop, it makes up no number, and the model is training again."""
    context.stop.set()

    with pytest.raises(StopRequested):
        evaluate(context, OBJECTIVE, model, samples, 64)
    assert model.graph.training
