"""What a job says when the API server keeps failing at what the job needs: the server's words."""

from datetime import datetime

from qlora_operator.api.names import ConditionType, Reason
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.status import conditions
from qlora_operator.status.actions import Decision
from qlora_operator.status.builder import StatusBuilder
from qlora_operator.status.observation import Observation
from qlora_operator.status.sanitize import sanitize

_PREFIX = "the API server fails at what the job needs, and is asked again: "


def api_failure(job: QLoRAJob, seen: Observation, error: str, now: datetime) -> Decision | None:
    """The job's status with the error in it, and an Event; None if the job says that already, or needs nothing more.

    The error itself is no news: a webhook may name each request in its message.

    Args:
        job: neither managed elsewhere nor being deleted.
        seen: its Jobs, as far as they are known.
        error: what the API server said.
        now: the time.
    """
    builder = StatusBuilder(job, seen, now)
    view, message = builder.view, f"{_PREFIX}{sanitize(error)}"
    if view.finished or (view.status.message or "").startswith(_PREFIX):
        return None
    begun = view.open_attempt is not None and (view.attempt_job is not None or view.open_attempt.job_uid)
    kind = ConditionType.RUNNING if begun else ConditionType.INITIALIZED
    if view.is_true(ConditionType.RUNNING):
        builder.set(message=message)  # what runs goes on
        builder.event("Warning", Reason.API_SERVER_ERROR, message)
    else:
        builder.set_waiting(kind, Reason.API_SERVER_ERROR, message, event=True)
    builder.set(phase=conditions.phase(builder.status.conditions))
    return builder.build()
