"""The metrics of a job whose decision is saved."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from qlora_operator.api.status import QLoRAJobStatus
from qlora_operator.controller import job_metrics
from qlora_operator.controller.metrics import Metrics

KEY = ("team", "job")


def attempt(number: int = 0, reason: str | None = None) -> dict[str, Any]:
    """A status with an attempt."""
    return {"attempt": number, "attempts": [{"attempt": number, "reason": reason}]}


def counted(before: dict[str, Any] | None, after: dict[str, Any]) -> dict[tuple[str, ...], float]:
    """What counters stand at after the change, by their name and labels; those that stand at 0 left out."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, "1")
    status = None if before is None else QLoRAJobStatus.model_validate(before)
    job_metrics.record(metrics, KEY, status, QLoRAJobStatus.model_validate(after))
    counters = (metrics.jobs_finished, metrics.attempts_started, metrics.restarts)
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
