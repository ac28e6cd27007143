"""What a job has cost, attempt by attempt."""

from collections.abc import Sequence
from datetime import datetime

from qlora_contract.cost import Price
from qlora_contract.units import parse_time
from qlora_operator.api.pod_resources import pod_cpus, stage_topology
from qlora_operator.api.status import Attempt, Cost
from qlora_operator.api.v1alpha1 import Topology
from qlora_operator.status.policies import DONE


def with_attempt(
    known: Cost | None,
    attempt: Attempt,
    topology: Topology,
    price: Price | None,
    now: datetime,
) -> Cost:
    """The cost once an attempt has ended. Transfers, which mostly wait for the network, cost nothing.

    CPUs count from when all ranks were up to when the last pod is gone; before that the attempt waits.

    Args:
        known: of the attempts before.
        attempt: which has its reason.
        topology: its own.
        price: of a CPU's hour, by the administrator's settings.
        now: when its last pod was gone.
    """
    cost = known or Cost()
    if attempt.stage not in ("train", "export"):
        return cost
    topology = stage_topology(topology, attempt.stage)
    started = now if attempt.start is None else parse_time(attempt.start)
    # One that was done before anybody saw all of its ranks up ran from its start.
    never_up = started if attempt.reason in DONE else now
    up = never_up if attempt.running is None else parse_time(attempt.running)
    cpus = topology.pods * pod_cpus(topology)
    core_hours = (cost.core_hours or 0.0) + cpus * _seconds(up, now) / 3600
    return cost.model_copy(
        update={
            "core_hours": round(core_hours, 6),
            "queue_seconds": (cost.queue_seconds or 0) + round(_seconds(started, up)),
            "lost_steps": cost.lost_steps or 0,
            "money": None if price is None else round(core_hours * price.amount, 6),
            "currency": None if price is None else price.currency or None,
        }
    )


def _seconds(start: datetime, end: datetime) -> float:
    return max(0.0, (end - start).total_seconds())


def with_lost_steps(known: Cost | None, attempts: Sequence[Attempt], resumed_step: int) -> Cost | None:
    """The cost once the newest attempt says which step it goes on from: only now is it known whether the one before
    has left a checkpoint behind when it was stopped.

    Args:
        known: so far.
        attempts: the newest, which has not said it before, is the last of them.
        resumed_step: the steps that it begins with.
    """
    seen = next((each.step for each in reversed(attempts[:-1]) if each.step is not None), 0)
    lost = seen - max(0, resumed_step)
    if lost <= 0:
        return known
    cost = known or Cost()
    return cost.model_copy(update={"lost_steps": (cost.lost_steps or 0) + lost})
