"""What the tests of the model share: one thread, small models to damage, samples and their loss."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_trainer.data.collate import collate
from qlora_trainer.data.dataset import Samples
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.loss import summed_cross_entropy

VOCABULARY = 300
LENGTHS = [11, 4, 17, 2, 9]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run on one thread, so that bits can be compared; bitsandbytes' double quantization depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def copied(small_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """make(...) as small_model with few words, but a copy that a test may damage."""

    def make(*args: Any, **config: Any) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(small_model(*args, **{"vocab_size": VOCABULARY, **config}), folder)
        return folder

    return make


@pytest.fixture(scope="session")
def samples() -> Samples:
    """Samples of several lengths in few words; about half of their tokens are learnt, the last always."""
    random = np.random.default_rng(3)
    offsets = np.cumsum([0, *LENGTHS])
    ids = random.integers(0, VOCABULARY, offsets[-1]).astype(np.int32)
    mask = (random.random(offsets[-1]) < 0.5).astype(np.uint8)
    mask[offsets[1:] - 1] = 1
    mask[offsets[:-1]] = 0
    return Samples(ids, mask, offsets)


@pytest.fixture(scope="session")
def loss_of(samples: Samples) -> Callable[..., Tensor]:
    """loss_of(model, numbers=all) -> the summed cross-entropy of these samples in one row."""

    def loss(model: BaseModel, numbers: Sequence[int] = range(len(LENGTHS))) -> Tensor:
        batch = collate(samples, numbers)
        rows = model.hidden_states(batch)[batch.logit_positions]
        return summed_cross_entropy(rows, model.head, batch.targets, model.softcap)

    return loss
