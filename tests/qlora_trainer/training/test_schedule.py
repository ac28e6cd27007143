"""The learning rate of each step."""

import itertools

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from qlora_trainer.training.schedule import Schedule, learning_rate

pytestmark = pytest.mark.process

SCHEDULES: list[Schedule] = ["linear", "cosine", "constant"]


def _of_transformers(schedule: Schedule, total: int, warmup: int, peak: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    if schedule == "linear":
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
    elif schedule == "cosine":
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    else:
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("total", "ratio", "warmup"),
    [(1, 0.0, 0), (1, 0.03, 1), (100, 0.0, 0), (100, 0.03, 3), (37, 0.1, 4), (20, 1.0, 20)],
)
def test_every_step_after_the_warm_up_has_the_rate_of_transformers(
    schedule: Schedule, total: int, ratio: float, warmup: int
) -> None:
    """After the warm-up every step's rate is that of transformers' schedule of the same name."""
    rates = [learning_rate(step, total, 2e-4, schedule, ratio) for step in range(total)]

    assert rates[warmup:] == pytest.approx(
        _of_transformers(schedule, total, warmup, 2e-4)[warmup:], abs=1e-12
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_rises_in_even_steps_to_its_peak(schedule: Schedule) -> None:
    """The warm-up's steps are even, the first of them from 0, and the peak comes right after them."""
    rates = [learning_rate(step, 50, 1e-3, schedule, 0.1) for step in range(50)]

    assert rates[:6] == pytest.approx([1e-3 * n / 6 for n in range(1, 7)])
    assert max(rates) == 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2])
def test_every_step_of_a_short_job_learns(schedule: Schedule, total: int) -> None:
    """However short the job, and however long its warm-up, no step has a rate of 0."""
    for ratio in (0.0, 0.03, 0.5, 1.0):
        assert all(learning_rate(step, total, 1e-3, schedule, ratio) > 0 for step in range(total))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_falls_to_zero_after_its_peak(schedule: Schedule) -> None:
    """After the peak it falls at every step, to 0 at the end."""
    rates = [learning_rate(step, 50, 1e-3, schedule, 0.0) for step in range(51)]

    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(0.0, abs=1e-15)
