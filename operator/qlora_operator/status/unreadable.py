"""The status of a job that the API server took and this operator cannot read: one of another version."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from qlora_operator.api.names import CONTROLLER, ConditionType, Reason
from qlora_operator.api.types import QLoRAJobStatus
from qlora_operator.status import conditions


def unreadable(raw: Mapping[str, Any], faults: str, now: datetime) -> QLoRAJobStatus | None:
    """The job's status with what is wrong said in it; None where it is not ours to write, or not readable
    either: then what it holds, such as the budgets, stays as it is.

    Args:
        raw: the job from the API.
        faults: what is wrong with it.
        now: the time.
    """
    metadata, managed_by = raw["metadata"], raw["spec"].get("managedBy")
    if "deletionTimestamp" in metadata or managed_by not in (None, CONTROLLER):
        return None
    try:
        status = QLoRAJobStatus.model_validate(raw.get("status") or {})
    except ValidationError:
        return None
    message = f"this operator cannot read the job: {faults}"
    generation = metadata.get("generation")
    said = conditions.put(
        status.conditions,
        ConditionType.INITIALIZED,
        Reason.INVALID_SPEC,
        message,
        holds=False,
        now=now,
        generation=generation,
    )
    return status.model_copy(
        update={
            "conditions": said,
            "message": message,
            "observed_generation": generation,
            "phase": conditions.phase(said),
        }
    )
