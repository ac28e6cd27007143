"""What must be looked at to decide about a job, besides what the watches tell. Looking costs requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from qlora_operator.api.names import ConditionType
from qlora_operator.api.sizes import stage_pods
from qlora_operator.api.times import parse
from qlora_operator.api.types import QLoRAJob, QLoRAJobStatus
from qlora_operator.status import conditions
from qlora_operator.status.observation import Gang
from qlora_operator.status.policies import PATIENCE, pending_deadline


@dataclass(frozen=True)
class Needs:
    """What to look at."""

    pods: bool = False
    fresh: bool = False
    """The Jobs, too: another one may be created."""
    stuck: bool = False
    """Pods ought to be going: whether their nodes answer."""
    nodes: bool = False
    """Which tiers have nodes."""
    warnings: bool = False


def needs(job: QLoRAJob, gangs: Sequence[Gang], now: datetime, patience: timedelta = PATIENCE) -> Needs:
    """What to look at now, if pods may take so long to start."""
    status = job.status or QLoRAJobStatus()
    last = status.attempts[-1] if status.attempts else None
    over = conditions.is_true(status.conditions, ConditionType.FINISHED)
    if last is None:
        start = not over and not job.spec.suspend
        # Children without an attempt: somebody emptied the status.
        return Needs(pods=start and bool(gangs), fresh=start and bool(gangs), nodes=start)
    gang = next((each for each in gangs if each.ours and each.attempt == last.attempt), None)
    if last.end is not None:
        start = not over and not job.spec.suspend
        return Needs(pods=start, fresh=start, stuck=start, nodes=start)
    if last.reason is not None:
        return Needs(pods=True, stuck=True, nodes=not over and not job.spec.suspend)
    if gang is None or gang.deleting:
        return Needs(pods=True, fresh=True, stuck=True)
    if gang.over or gang.failing is not None or job.spec.suspend:
        return Needs(pods=True, stuck=True)
    return _of_living(job, status, gang, now, patience)


def _of_living(
    job: QLoRAJob, status: QLoRAJobStatus, gang: Gang, now: datetime, patience: timedelta
) -> Needs:
    wanted = stage_pods(job.spec.topology, status.attempts[-1].stage)
    if gang.suspended:
        return Needs()
    if conditions.is_true(status.conditions, ConditionType.RUNNING):
        return Needs(pods=gang.ready < wanted, stuck=gang.ready < wanted)
    if gang.ready >= wanted:
        return Needs(pods=True)
    start = status.attempts[-1].start
    due = pending_deadline(job.spec, status, now)
    late = start is None or now >= parse(start) + patience or (due is not None and now >= due)
    return Needs(pods=late, nodes=late, warnings=late)
