"""The loss on held-out samples, against transformers' own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]
from transformers import AutoModelForCausalLM

from qlora_contract.progress import ProgressReport
from qlora_contract.run import RunConfig
from qlora_trainer.data import Samples
from qlora_trainer.distributed import Group, World
from qlora_trainer.evaluate import evaluate
from qlora_trainer.memory_watch import MemoryWatch
from qlora_trainer.model import BaseModel, load_model
from qlora_trainer.progress import Progress
from qlora_trainer.session import Session, Stopping
from qlora_trainer.storage import JobFolder

RUN = RunConfig.model_validate(
    {
        "job": {"name": "smollm2", "uid": "u-1", "attempt": 0},
        "workspace": "pvc://data/work",
        "model": {"source": "pvc://data/model"},
        "dataset": {"source": "pvc://data/train.jsonl"},
        "training": {"epochs": 1, "globalBatchTokens": 64, "maxSequenceLength": 32},
        "layout": {"memoryPerRank": 2**30},
        "isa": "avx2",
    }
)
LENGTHS = (5, 17, 32, 2, 9, 23, 12)
STARTING = ProgressReport(
    job_uid="u-1", attempt=0, stage="Starting", step=0, total_steps=0, epoch=0.0, updated_time="2026-01-01T00:00:00Z"
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(small_model: Callable[..., Path]) -> Path:
    """A small Llama."""
    return small_model("llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> BaseModel:
    """The model as the trainer loads it, training."""
    loaded = load_model(folder, "as-stored", torch.float32)
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
def session(tmp_path: Path) -> Session:
    """The only rank of a job."""
    world = World(rank=0, size=1, local_rank=0, master_addr="127.0.0.1", master_port=1)
    group = Group(world, HashStore())
    return Session(RUN, world, group, {}, JobFolder(tmp_path, RUN), Progress(STARTING), MemoryWatch(), "avx2")


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
    session: Session, model: BaseModel, samples: Samples, expected: float, micro_batch_tokens: int
) -> None:
    """Packed and batched in any way, the mean is that of samples run one by one."""
    assert evaluate(session, model, samples, micro_batch_tokens) == pytest.approx(expected, rel=1e-5)


def test_it_touches_nothing_that_training_depends_on(
    session: Session, model: BaseModel, samples: Samples
) -> None:
    """The random generator stands where it stood, and the model is training again."""
    before = torch.get_rng_state()
    evaluate(session, model, samples, 64)

    assert torch.equal(torch.get_rng_state(), before)
    assert model.graph.training


def test_a_stop_ends_it(session: Session, model: BaseModel, samples: Samples) -> None:
    """Asked to stop, no number is made up, and the model is training again."""
    session.stop.set()

    with pytest.raises(Stopping):
        evaluate(session, model, samples, 64)
    assert model.graph.training
