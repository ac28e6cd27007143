"""The metrics of a job whose decision is saved."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from qlora_operator.api.status import QLoRAJobStatus
from qlora_operator.controller import job_metrics
from qlora_operator.controller.metrics import Metrics

KEY = ("team", "job")
NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def attempt(number: int = 0, reason: str | None = None) -> dict[str, Any]:
    """A status with an attempt."""
    return {"attempt": number, "attempts": [{"attempt": number, "reason": reason}]}


def cost(**fields: Any) -> dict[str, Any]:
    """A status with what the job has cost."""
    return {"cost": fields}


def counted(before: dict[str, Any] | None, after: dict[str, Any]) -> dict[tuple[str, ...], float]:
    """What counters stand at after the change, by their name and labels; those that stand at 0 left out."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, "1")
    status = None if before is None else QLoRAJobStatus.model_validate(before)
    job_metrics.record(metrics, KEY, status, QLoRAJobStatus.model_validate(after), NOW)
    counters = (
        metrics.jobs_finished,
        metrics.attempts_started,
        metrics.restarts,
        metrics.core_hours,
        metrics.cost,
        metrics.queue_seconds,
        metrics.lost_steps,
        metrics.energy,
        metrics.exports,
    )
    samples = [sample for counter in counters for sample in next(iter(counter.collect())).samples]
    return {
        (
            sample.name.removeprefix("qlora_operator_").removeprefix("qlora_"),
            *sample.labels.values(),
        ): sample.value
        for sample in samples
        if sample.name.endswith("_total") and sample.value
    }


RUNNING, ENDED = attempt(), attempt(0, "Killed")
PAID = {**ENDED, "restarts": {"user": 1, "infrastructure": 0}}
MOVED = {**attempt(0, "Drained"), "restarts": {"user": 0, "infrastructure": 1}}


@pytest.mark.parametrize(
    ("before", "after", "labels"),
    [
        pytest.param(None, {"phase": "Pending"}, [], id="new"),
        pytest.param(
            {"adapter": {"exports": ["merged"]}},
            {"adapter": {"exports": ["merged", "gguf-q8_0"]}},
            [("team", "gguf-q8_0")],
            id="exported",
        ),
        pytest.param(None, attempt(), [()], id="its first attempt"),
        pytest.param(ENDED, attempt(1), [()], id="another attempt"),
        pytest.param(RUNNING, RUNNING, [], id="nothing new"),
        pytest.param(RUNNING, PAID, [("Killed", "user")], id="the user pays"),
        pytest.param(RUNNING, MOVED, [("Drained", "infrastructure")], id="the infrastructure pays"),
        pytest.param(RUNNING, attempt(0, "SteppedDown"), [("SteppedDown", "none")], id="nobody pays"),
        pytest.param(RUNNING, attempt(0, "Trained"), [], id="done is no restart"),
        pytest.param(ENDED, PAID, [], id="it had ended before"),
        pytest.param(RUNNING, {**RUNNING, "phase": "Failed"}, [("team", "Failed")], id="the job's end"),
        pytest.param(
            {**RUNNING, "phase": "Failed"}, {**RUNNING, "phase": "Failed"}, [], id="it was over before"
        ),
    ],
)
def test_what_happened_is_counted_once(before: Any, after: dict[str, Any], labels: list[Any]) -> None:
    """An attempt that starts, one that ends early, and the job's end, each when its status is saved."""
    found = counted(before, after)

    assert [names[1:] for names in found] == labels
    assert set(found.values()) <= {1.0}


COSTS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], dict[tuple[str, ...], float]]] = {
    "the first attempt": (
        None,
        cost(coreHours=2.5, queueSeconds=30, lostSteps=4, energyKwh=0.5, money=1.0, currency="EUR"),
        {
            ("core_hours_total", "team"): 2.5,
            ("cost_total", "team", "EUR"): 1.0,
            ("queue_seconds_total", "team"): 30,
            ("lost_steps_total", "team"): 4,
            ("energy_kwh_total", "team"): 0.5,
        },
    ),
    "what another adds": (cost(coreHours=2.5), cost(coreHours=4.0), {("core_hours_total", "team"): 1.5}),
    "nothing": (cost(coreHours=2.5, money=1.0), cost(coreHours=2.5, money=1.0), {}),
    "a lower price than before": (cost(money=2.0), cost(money=1.0), {}),
    "no price": (None, cost(coreHours=1.0), {("core_hours_total", "team"): 1.0}),
    "a price in no currency": (None, cost(money=1.0), {("cost_total", "team", ""): 1.0}),
}


@pytest.mark.parametrize(("before", "after", "expected"), COSTS.values(), ids=COSTS)
def test_what_an_attempt_cost_is_counted_once(
    before: Any, after: dict[str, Any], expected: dict[tuple[str, ...], float]
) -> None:
    """By namespace: it is the difference of two saved statuses."""
    assert counted(before, after) == expected


@pytest.mark.parametrize(
    ("phase", "waits"),
    [
        pytest.param("Pending", True, id="for nodes"),
        pytest.param("Queued", True, id="for its queue"),
        pytest.param("Restarting", True, id="for the next attempt"),
        pytest.param("Running", False, id="it runs"),
        pytest.param("Suspended", False, id="it is to wait"),
        pytest.param("Failed", False, id="it is over"),
    ],
)
def test_a_job_waits_since_its_ranks_are_wanted_and_not_all_up(phase: str, waits: bool) -> None:
    """As pendingDeadlineSeconds counts."""
    since = "2026-01-31T11:00:00Z"
    stopped = {"type": "Running", "status": "False", "reason": "Killed", "message": ""}
    status = {"phase": phase, "conditions": [{**stopped, "lastTransitionTime": since}]}
    metrics = Metrics(CollectorRegistry(), "1")
    job_metrics.record(metrics, KEY, None, QLoRAJobStatus.model_validate(status), NOW)
    name = "qlora_jobs_waiting_since_timestamp_seconds"
    found = metrics.registry.get_sample_value(name, {"namespace": "team", "phase": phase})

    assert found == ((NOW - timedelta(hours=1)).timestamp() if waits else None)
