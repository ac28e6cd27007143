"""What the planner tells of a machine."""

import pytest

from qlora_contract.plan import Machine


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
