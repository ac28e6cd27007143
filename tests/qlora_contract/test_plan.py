"""What the planner tells of a machine."""

from typing import Any

import pytest

from builders import OMIT, a_run
from qlora_contract.plan import Machine, Steps, batch_tokens, few_steps, ranks_without_work


@pytest.mark.parametrize(
    ("cpus", "quota", "usable"),
    [
        pytest.param(4, None, 4, id="no quota"),
        pytest.param(4, 2.9, 2, id="a quota counts whole CPUs"),
        pytest.param(4, 0.5, 1, id="at least one"),
        pytest.param(2, 8.0, 2, id="a quota above the CPUs"),
    ],
)
def test_as_many_cpus_can_be_used_as_can_be_at_work_at_once(
    cpus: int, quota: float | None, usable: int
) -> None:
    """The quota bounds the CPUs."""
    machine = Machine(tiers=[], lacking={}, cpus=list(range(cpus)), quota=quota)

    assert machine.usable_cpus == usable


RAISE = "raise training.globalBatchTokens to 16,384, or have fewer ranks"


@pytest.mark.parametrize(
    ("bins", "steps", "ranks", "remedy"),
    [
        pytest.param(800, 100, 8, None, id="one for each"),
        pytest.param(28, 4, 8, None, id="a last step that is short"),
        pytest.param(800, 100, 16, RAISE, id="half of them"),
        pytest.param(5, 1, 8, "have fewer ranks", id="no more data"),
        pytest.param(1, 1, 1, None, id="alone"),
    ],
)
def test_ranks_that_have_nothing_to_do_are_told(
    bins: float, steps: int, ranks: int, remedy: str | None
) -> None:
    """With what gives them something to do."""
    training = a_run().training
    told = ranks_without_work(bins, steps, ranks, training)

    assert (training.global_batch_tokens, training.max_sequence_length) == (8192, 1024)
    assert (told is None) == (remedy is None)
    if told is not None and remedy is not None:
        assert told.startswith(
            f"a step has {bins / steps:.1f} bins of maxSequenceLength 1,024 for {ranks} ranks, "
        )
        assert told.endswith(f"the others wait: {remedy}")


@pytest.mark.parametrize(
    ("training", "total", "tokens", "expected"),
    [
        pytest.param({"epochs": 3}, 20, 50_000, [], id="enough"),
        pytest.param({"maxSteps": 3}, 3, 50_000, [], id="as it was asked for"),
        pytest.param(
            {"epochs": 3},
            3,
            2_400,
            [("3 step(s) are too few to learn much: lower training.globalBatchTokens, now 8,192, to 1,024, or raise "
             "training.epochs to 20")],
            id="few data",
        ),
        pytest.param(
            {"epochs": 3, "maxSequenceLength": 256},
            3,
            2_400,
            [("3 step(s) are too few to learn much: lower training.globalBatchTokens, now 8,192, to 256, or raise "
             "training.epochs to 20")],
            id="short samples",
        ),
        pytest.param(
            {"epochs": 3, "globalBatchTokens": 1024},
            8,
            2_400,
            ["8 step(s) are too few to learn much: raise training.epochs to 8"],
            id="a batch that cannot be smaller",
        ),
    ],
)  # fmt: skip
def test_too_few_steps_are_said_with_what_makes_more(
    training: dict[str, Any], total: int, tokens: int, expected: list[str]
) -> None:
    """A job of three steps would end with nothing learned, and without a word about why."""
    settings = a_run(training={"epochs": OMIT, "maxSequenceLength": 1024} | training).training
    steps = Steps(per_epoch=1, total=total, epochs=3.0, tokens_per_step=1.0, fill=1.0)

    assert few_steps(steps, tokens, settings) == expected


@pytest.mark.parametrize(
    ("tokens", "sample", "expected"),
    [(0, 256, 256), (20 * 256, 256, 256), (20 * 512, 256, 512), (20 * 1000, 300, 600), (10**9, 1024, 8192)],
)
def test_a_batch_of_few_data_makes_enough_steps(tokens: int, sample: int, expected: int) -> None:
    """As large as it can be: never smaller than a sample, never larger than the default."""
    assert batch_tokens(tokens, sample) == expected
