"""What a job has cost, by its status."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from qlora_contract.cost import Price
from qlora_contract.units import rfc3339
from qlora_operator.api.status import Attempt, Cost
from qlora_operator.api.v1alpha1 import Topology
from qlora_operator.status.cost import with_attempt, with_lost_steps

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
TOPOLOGY = Topology(pods=2, ranks_per_pod=3, cpus_per_rank=4, memory_per_rank="1Gi")


def ago(seconds: int) -> str:
    """A time before the attempt's end."""
    return rfc3339(NOW - timedelta(seconds=seconds))


def spent(
    known: Cost | None = None,
    topology: Topology = TOPOLOGY,
    price: Price | None = None,
    **attempt: Any,
) -> dict[str, Any]:
    """The cost after an attempt that waited for a minute and ran for an hour."""
    fields = {"attempt": 1, "start": ago(3660), "running": ago(3600), "reason": "Killed", **attempt}
    return with_attempt(known, Attempt(**fields), topology, price, NOW).model_dump(exclude_none=True)


def test_the_cpus_of_all_ranks_count_while_all_are_up() -> None:
    """24 CPUs for an hour; the minute before is the queue's."""
    assert spent() == {"core_hours": 24.0, "queue_seconds": 60, "lost_steps": 0}


def test_what_an_attempt_cost_is_added() -> None:
    """To that of the attempts before; their energy, which only the trainer tells, stays."""
    before = Cost(core_hours=1.0, queue_seconds=5, lost_steps=2, energy_kwh=0.5)

    assert spent(before) == {"core_hours": 25.0, "queue_seconds": 65, "lost_steps": 2, "energy_kwh": 0.5}


def test_a_pod_of_as_many_ranks_as_fit_has_what_it_asks_for() -> None:
    """With ranksPerPod auto cpusPerRank is the pod's."""
    topology = Topology(pods=2, ranks_per_pod="auto", cpus_per_rank=4, memory_per_rank="1Gi")

    assert spent(topology=topology)["core_hours"] == 8.0


@pytest.mark.parametrize(
    ("reason", "core_hours", "queue_seconds"),
    [
        pytest.param("Released", 0.0, 3660, id="it never ran"),
        pytest.param("Succeeded", 24.4, 0, id="it was done before anybody looked"),
    ],
)
def test_an_attempt_whose_ranks_were_never_seen_up(
    reason: str, core_hours: float, queue_seconds: int
) -> None:
    """Waited all the time, unless it was done."""
    cost = spent(running=None, reason=reason)

    assert (cost["core_hours"], cost["queue_seconds"]) == (core_hours, queue_seconds)


def test_an_export_costs_the_cpus_of_its_one_rank() -> None:
    """The nodes of the other ranks are free by then."""
    topology = Topology(pods=3, ranks_per_pod=2, cpus_per_rank=4, memory_per_rank="1Gi")

    assert spent(topology=topology, stage="export")["core_hours"] == 4.0


@pytest.mark.parametrize("stage", ["fetch", "publish"])
def test_transfers_cost_nothing(stage: str) -> None:
    """They hold one CPU that mostly waits; what was spent before stays."""
    assert spent(stage=stage) == {}
    assert spent(Cost(core_hours=1.0), stage=stage) == {"core_hours": 1.0}


@pytest.mark.parametrize(
    ("steps", "resumed", "lost"),
    [
        pytest.param([17], 10, 7, id="since the checkpoint"),
        pytest.param([17], 0, 17, id="all of them"),
        pytest.param([17], 17, 0, id="it left with a checkpoint"),
        pytest.param([17], 18, 0, id="it did more than was seen"),
        pytest.param([17, None], 10, 7, id="one in between made no steps"),
        pytest.param([17, 10], 10, 0, id="they were counted when the one in between began"),
        pytest.param([], 0, 0, id="the first attempt"),
        pytest.param([None], 0, 0, id="nothing was seen"),
        pytest.param([17], -1, 17, id="rank 0 says what cannot be"),
    ],
)
def test_steps_that_are_made_again_are_lost(steps: list[int | None], resumed: int, lost: int) -> None:
    """Known only when the next attempt says where it goes on: one that was stopped leaves a checkpoint behind that
    nobody may have seen."""
    attempts = [Attempt(attempt=number, step=step) for number, step in enumerate([*steps, None])]
    before = Cost(core_hours=1.0, lost_steps=2)

    assert with_lost_steps(before, attempts, resumed) == Cost(core_hours=1.0, lost_steps=2 + lost)
    assert with_lost_steps(None, attempts, resumed) == (Cost(lost_steps=lost) if lost else None)


@pytest.mark.parametrize(
    ("price", "money"),
    [
        pytest.param(None, {}, id="none"),
        pytest.param(
            Price(amount=0.5, currency="EUR"), {"money": 12.5, "currency": "EUR"}, id="with currency"
        ),
        pytest.param(Price(amount=0.5), {"money": 12.5}, id="without"),
    ],
)
def test_a_price_makes_money_of_it(price: Price | None, money: dict[str, Any]) -> None:
    """The price that holds now, for all core-hours; without one there is no sum, not an old one."""
    before = Cost(core_hours=1.0, money=7.0, currency="CHF")
    cost = spent(before, price=price)

    assert {name: cost[name] for name in ("money", "currency") if name in cost} == money


def test_clocks_that_go_back_make_nothing_negative() -> None:
    """The operator's clock was set, or another operator has another one."""
    cost = spent(start=ago(-50), running=ago(-100))

    assert (cost["core_hours"], cost["queue_seconds"]) == (0.0, 50)
