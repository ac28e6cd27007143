"""What a receiver of notifications is told of a job: CloudEvents, made from its status alone.

So an operator that was killed finds again what it has not delivered, with the same ids, and need not have seen it
happen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from qlora_contract.units import parse_time
from qlora_operator.api.names import API_VERSION, PLURAL, ConditionType, Reason
from qlora_operator.api.status import QLoRAJobStatus
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.status import conditions

TYPE = "dev.qlora.job"
"""What the type of every event begins with."""
TRIED_FOR = timedelta(hours=6)
"""How old a notice may get: older ones are not delivered any more."""


@dataclass(frozen=True)
class Notice:
    """Something that has happened to a job."""

    what: str
    """started, suspended, resumed, succeeded or failed: the end of the event's type."""
    time: str
    """RFC 3339."""

    @property
    def key(self) -> str:
        """What distinguishes it from the job's others; with the job's uid it is the event's id."""
        return f"{self.what}-{self.time}"


def notices(status: QLoRAJobStatus) -> list[Notice]:
    """What has happened to a job, by its status; of what happens again, the last time."""
    found = []
    ups = [attempt.running for attempt in status.attempts if attempt.running is not None]
    # Only the newest attempts are kept, and the first of them is another one by and by.
    told = next(
        (key.removeprefix("started-") for key in status.notified or () if key.startswith("started-")), None
    )
    if told is not None or ups:
        found.append(Notice("started", told or ups[0]))
    held = conditions.find(status.conditions, ConditionType.SUSPENDED)
    if held is not None and held.reason in (Reason.SUSPENDED, Reason.RESUMED):
        what = "suspended" if held.status == "True" else "resumed"
        found.append(Notice(what, held.last_transition_time))
    for kind, what in ((ConditionType.COMPLETE, "succeeded"), (ConditionType.FAILED, "failed")):
        ended = conditions.find(status.conditions, kind)
        if ended is not None and ended.status == "True":
            found.append(Notice(what, ended.last_transition_time))
    return found


def undelivered(status: QLoRAJobStatus, now: datetime) -> list[Notice]:
    """The notices that are still to be delivered."""
    known = set(status.notified or ())
    return [
        notice
        for notice in notices(status)
        if notice.key not in known and now - parse_time(notice.time) <= TRIED_FOR
    ]


def notified(status: QLoRAJobStatus, delivered: Sequence[str]) -> list[str] | None:
    """status.notified once these were delivered; what no notice has any more is forgotten."""
    known = {*(status.notified or ()), *delivered}
    return [notice.key for notice in notices(status) if notice.key in known] or None


def cloud_event(job: QLoRAJob, status: QLoRAJobStatus, uid: str, notice: Notice) -> dict[str, Any]:
    """A CloudEvent 1.0, in the structured JSON form.

    Args:
        job: as it is.
        status: its newest.
        uid: the job's.
        notice: what has happened.
    """
    name, namespace = job.metadata.name, job.metadata.namespace
    last = status.attempts[-1] if status.attempts else None
    data = {
        "namespace": namespace,
        "name": name,
        "uid": uid,
        "phase": status.phase,
        "message": status.message,
        "attempt": status.attempt,
        "reason": last.reason if last is not None else None,
        "adapter": _dump(status.adapter),
        "progress": _dump(status.progress),
        "cost": _dump(status.cost),
    }
    return {
        "specversion": "1.0",
        "id": f"{uid}-{notice.key}",
        "source": f"/apis/{API_VERSION}/namespaces/{namespace}/{PLURAL}/{name}",
        "type": f"{TYPE}.{notice.what}",
        "subject": name,
        "time": notice.time,
        "datacontenttype": "application/json",
        "data": {key: value for key, value in data.items() if value is not None},
    }


def _dump(part: Any) -> dict[str, Any] | None:
    return None if part is None else part.model_dump(by_alias=True, mode="json", exclude_none=True)
