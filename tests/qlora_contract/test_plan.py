"""What the planner tells of a machine."""

import pytest

from builders import a_run
from qlora_contract.plan import Machine, ranks_without_work


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
