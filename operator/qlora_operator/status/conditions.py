"""The conditions of a job, and the phase that follows from them."""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from qlora_contract.units import rfc3339
from qlora_operator.api.names import ConditionType, Phase, Reason
from qlora_operator.api.status import Condition


def find(conditions: Sequence[Condition], kind: ConditionType) -> Condition | None:
    """The condition of this type, if it was ever set."""
    return next((condition for condition in conditions if condition.type == kind), None)


def is_true(conditions: Sequence[Condition], kind: ConditionType) -> bool:
    """Whether it is True."""
    found = find(conditions, kind)
    return found is not None and found.status == "True"


def is_false(conditions: Sequence[Condition], kind: ConditionType) -> bool:
    """Whether it is False; one that was never set is neither."""
    found = find(conditions, kind)
    return found is not None and found.status == "False"


def without(conditions: Sequence[Condition], kind: ConditionType) -> list[Condition]:
    """All conditions but that of this type."""
    return [condition for condition in conditions if condition.type != kind]


def put(
    conditions: Sequence[Condition],
    kind: ConditionType,
    reason: Reason,
    message: str,
    *,
    holds: bool,
    now: datetime,
    generation: int | None,
) -> list[Condition]:
    """The conditions with this one set, in their fixed order; its transition time moves only when its status does."""
    status: Literal["True", "False"] = "True" if holds else "False"
    before = find(conditions, kind)
    since = before.last_transition_time if before and before.status == status else rfc3339(now)
    condition = Condition(
        type=kind,
        status=status,
        observed_generation=generation,
        last_transition_time=since,
        reason=reason,
        message=message,
    )
    # As documented; last are those of an operator that knows more of them.
    order = {str(known): position for position, known in enumerate(ConditionType)}
    return sorted([*without(conditions, kind), condition], key=lambda each: order.get(each.type, len(order)))


_RUNNING_PHASES: dict[str, Phase] = {
    Reason.FETCHING: Phase.FETCHING,
    Reason.PUBLISHING: Phase.PUBLISHING,
    Reason.EXPORTING: Phase.PUBLISHING,
    Reason.UPLOADING: Phase.PUBLISHING,
}


def phase(conditions: Sequence[Condition]) -> Phase:
    """One word that sums up all conditions."""
    true = {condition.type for condition in conditions if condition.status == "True"}
    running = find(conditions, ConditionType.RUNNING)
    if ConditionType.COMPLETE in true:
        return Phase.SUCCEEDED
    if ConditionType.FAILED in true:
        return Phase.FAILED
    if ConditionType.SUSPENDED in true:
        return Phase.SUSPENDED
    if ConditionType.RUNNING in true and running is not None:
        return _RUNNING_PHASES.get(running.reason, Phase.RUNNING)
    if is_false(conditions, ConditionType.QUOTA_RESERVED) and ConditionType.INITIALIZED in true:
        return Phase.QUEUED
    if ConditionType.RESTARTING in true:
        return Phase.RESTARTING
    return Phase.STARTING if ConditionType.INITIALIZED in true else Phase.PENDING
