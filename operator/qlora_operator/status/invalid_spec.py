"""The status of a job that the API server accepts and this operator cannot read: it is of another version."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from qlora_operator.api.names import CONTROLLER, ConditionType, Reason
from qlora_operator.api.status import QLoRAJobStatus
from qlora_operator.status import conditions


def invalid_spec_status(raw: Mapping[str, Any], faults: str, now: datetime) -> QLoRAJobStatus | None:
    """The job's status with the faults in it, under the reason InvalidSpec. Everything else, such as the budgets,
    stays as it is. None if the job is not ours to write, or its status cannot be read either.

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
    updated = conditions.put(
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
            "conditions": updated,
            "message": message,
            "observed_generation": generation,
            "phase": conditions.phase(updated),
        }
    )
