"""What a job has cost, attempt by attempt."""

from datetime import datetime

from qlora_contract.cost import Price
from qlora_contract.units import parse_time
from qlora_operator.api.pod_resources import pod_cpus, stage_topology
from qlora_operator.api.status import Attempt, Cost, Progress
from qlora_operator.api.v1alpha1 import Topology
from qlora_operator.status.policies import DONE


def with_attempt(
    known: Cost | None,
    attempt: Attempt,
    topology: Topology,
    progress: Progress | None,
    price: Price | None,
    now: datetime,
) -> Cost:
    """The cost once an attempt has ended. Transfers, which mostly wait for the network, cost nothing.

    CPUs count from when all ranks were up to when the last pod is gone; before that the attempt waits.

    Args:
        known: of the attempts before.
        attempt: which has its reason.
        topology: its own.
        progress: the newest that was seen of it.
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
            "lost_steps": (cost.lost_steps or 0) + _lost_steps(attempt, progress),
            "money": None if price is None else round(core_hours * price.amount, 6),
            "currency": None if price is None else price.currency or None,
        }
    )


def _seconds(start: datetime, end: datetime) -> float:
    return max(0.0, (end - start).total_seconds())


def _lost_steps(attempt: Attempt, progress: Progress | None) -> int:
    """Steps that were seen and that its newest checkpoint does not hold: the next attempt makes them again."""
    if attempt.reason in DONE or progress is None or progress.attempt != attempt.attempt:
        return 0
    return max(0, (progress.step or 0) - (attempt.checkpoint_step or 0))
