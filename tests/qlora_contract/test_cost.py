"""What a job costs."""

import re
from typing import Any

import pytest

from qlora_contract.cost import AttemptRecord, Cost, Price, cost_of, parse_price


def attempt(number: int = 0, **fields: Any) -> AttemptRecord:
    """An attempt of an hour on four CPUs."""
    known = {"job_uid": "u", "attempt": number, "began": "2026-01-01T00:00:00Z", "seconds": 3600.0, "cpus": 4}
    return AttemptRecord.model_validate({**known, **fields})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("0.04", Price(amount=0.04), id="an amount"),
        pytest.param("0.04 EUR", Price(amount=0.04, currency="EUR"), id="with its currency"),
        pytest.param(" 2 € ", Price(amount=2, currency="€"), id="a sign"),
        pytest.param("0", Price(amount=0), id="nothing"),
        pytest.param(
            "123456789.123456789 x", Price(amount=123456789.123456789, currency="x"), id="many digits"
        ),
        pytest.param("0.000000001", Price(amount=1e-9), id="very little"),
    ],
)
def test_a_price_is_an_amount_and_perhaps_a_currency(text: str, expected: Price) -> None:
    """As users write it, and as it is written for the trainer."""
    assert parse_price(text) == expected
    assert parse_price(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "EUR", "EUR 2", "-1", "1,5", "nan", "inf", "1 a b", "1e3", "1 \x1b[31m"]
)
def test_what_is_no_price_is_refused(text: str) -> None:
    """The sentence quotes it and shows one that is right."""
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is not a price")):
        parse_price(text)


COSTS: dict[str, tuple[list[AttemptRecord], Price | None, dict[str, Any]]] = {
    "nothing, before the first": ([], None, {"attempts": 0, "core_hours": 0, "energy_kwh": None, "money": None}),
    "CPUs times hours, over all attempts": (
        [attempt(), attempt(1, seconds=1800.0, cpus=2)],
        Price(amount=0.5, currency="EUR"),
        {"core_hours": 5.0, "money": 2.5, "currency": "EUR", "seconds": 5400.0, "attempts": 2},
    ),
    "no money without a price": ([attempt()], None, {"money": None, "price_per_core_hour": None, "currency": ""}),
    "what was made again": (
        [attempt(), attempt(1, lost_steps=3, lost_seconds=900.0)],
        None,
        {"lost_steps": 3, "lost_core_hours": 1.0},
    ),
    "time in queues, as far as it is known": (
        [attempt(queue_seconds=5.0), attempt(1), attempt(2, queue_seconds=7.0)],
        None,
        {"queue_seconds": 12.0},
    ),
    "a queue that nobody knows of": ([attempt()], None, {"queue_seconds": None}),
    "energy of all attempts": (
        [attempt(energy_joules=3.6e6), attempt(1, energy_joules=1.8e6)],
        None,
        {"energy_kwh": 1.5},
    ),
    "no energy rather than a part of it": ([attempt(energy_joules=3.6e6), attempt(1)], None, {"energy_kwh": None}),
}  # fmt: skip


@pytest.mark.parametrize(("records", "price", "expected"), COSTS.values(), ids=COSTS)
def test_the_cost_is_the_sum_of_the_attempts(
    records: list[AttemptRecord], price: Price | None, expected: dict[str, Any]
) -> None:
    """Each number by itself; what is not known of every attempt is not known."""
    cost = cost_of(records, price)

    assert isinstance(cost, Cost)
    assert {name: getattr(cost, name) for name in expected} == expected
