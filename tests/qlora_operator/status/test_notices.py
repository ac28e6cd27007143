"""What a receiver of notifications is told of a job, by its status."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from qlora_contract.units import rfc3339
from qlora_operator.api.status import QLoRAJobStatus
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.status.actions import Decision
from qlora_operator.status.notices import TRIED_FOR, cloud_event, notices, notified, undelivered

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
EARLY, LATE = rfc3339(NOW - timedelta(minutes=30)), rfc3339(NOW - timedelta(minutes=10))


def condition(kind: str, status: str, reason: str, time: str = LATE) -> dict[str, Any]:
    """A condition of a job."""
    return {"type": kind, "status": status, "reason": reason, "message": "", "lastTransitionTime": time}


def status_of(*conditions: dict[str, Any], **fields: Any) -> QLoRAJobStatus:
    """A status with these conditions."""
    return QLoRAJobStatus.model_validate({"conditions": list(conditions), **fields})


UP = [{"attempt": 0, "running": EARLY}, {"attempt": 1, "running": LATE}]
CASES: dict[str, tuple[QLoRAJobStatus, list[str]]] = {
    "a new job": (status_of(), []),
    "an attempt that waits": (status_of(attempts=[{"attempt": 0}]), []),
    "its first attempt is up": (status_of(attempts=UP), [f"started-{EARLY}"]),
    "it was told of one that is not kept any more": (
        status_of(attempts=UP[1:], notified=[f"started-{EARLY}"]),
        [f"started-{EARLY}"],
    ),
    "held": (status_of(condition("Suspended", "True", "Suspended")), [f"suspended-{LATE}"]),
    "let go": (status_of(condition("Suspended", "False", "Resumed")), [f"resumed-{LATE}"]),
    "over while held": (status_of(condition("Suspended", "False", "Finished")), []),
    "complete": (
        status_of(condition("Complete", "True", "Succeeded"), attempts=UP),
        [f"started-{EARLY}", f"succeeded-{LATE}"],
    ),
    "failed": (status_of(condition("Failed", "True", "InvalidData")), [f"failed-{LATE}"]),
}


@pytest.mark.parametrize(("status", "keys"), CASES.values(), ids=CASES)
def test_what_has_happened_stands_in_the_status(status: QLoRAJobStatus, keys: list[str]) -> None:
    """Each with a time that does not change, so that its id does not."""
    assert [notice.key for notice in notices(status)] == keys


@pytest.mark.parametrize(
    ("status", "age", "due"),
    [
        pytest.param({}, timedelta(), True, id="nobody was told"),
        pytest.param({"notified": [f"failed-{LATE}"]}, timedelta(), False, id="told"),
        pytest.param({"notified": [f"failed-{EARLY}"]}, timedelta(), True, id="told of another time"),
        pytest.param({}, TRIED_FOR, False, id="long ago"),
    ],
)
def test_what_is_due(status: dict[str, Any], age: timedelta, *, due: bool) -> None:
    """What was not delivered, for some hours: an operator that is new to a cluster does not tell its history."""
    known = status_of(condition("Failed", "True", "InvalidData"), **status)

    assert bool(undelivered(known, NOW + age)) is due


def test_what_was_delivered_is_kept_as_long_as_it_can_be_asked_for() -> None:
    """A job that is suspended again and again has a short list all the same."""
    status = status_of(
        condition("Suspended", "True", "Suspended"), attempts=UP, notified=[f"suspended-{EARLY}"]
    )

    assert notified(status, []) is None
    assert notified(status, [f"suspended-{LATE}"]) == [f"suspended-{LATE}"]


def test_a_decision_keeps_what_was_delivered(
    running: Callable[..., dict[str, Any]], ask: Callable[..., Decision], make_attempt_job: Any
) -> None:
    """So the operator after this one does not tell it again."""
    before = {**running(), "attempts": [{**running()["attempts"][0], "running": EARLY}]}

    status = ask(before, [make_attempt_job(ready=1)], [], delivered=frozenset({f"started-{EARLY}"})).status

    assert status.notified == [f"started-{EARLY}"]


def test_a_cloud_event(make_job: Callable[..., QLoRAJob]) -> None:
    """In the structured JSON form of CloudEvents 1.0, with what an operator's status says."""
    status = status_of(
        condition("Complete", "True", "Succeeded"),
        phase="Succeeded",
        message="the adapter is in pvc://a/b",
        adapter={"uri": "pvc://a/b", "evalLoss": 1.5},
    )
    job = make_job()

    event = cloud_event(job, status, "u", notices(status)[0])

    namespace = job.metadata.namespace
    assert event == {
        "specversion": "1.0",
        "id": f"u-succeeded-{LATE}",
        "source": f"/apis/qlora.dev/v1alpha1/namespaces/{namespace}/qlorajobs/job",
        "type": "dev.qlora.job.succeeded",
        "subject": "job",
        "time": LATE,
        "datacontenttype": "application/json",
        "data": {
            "namespace": namespace,
            "name": "job",
            "uid": "u",
            "phase": "Succeeded",
            "message": "the adapter is in pvc://a/b",
            "adapter": {"uri": "pvc://a/b", "evalLoss": 1.5},
        },
    }
