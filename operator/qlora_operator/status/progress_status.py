"""What rank 0 reports and what the pods show, as parts of the status."""

from collections.abc import Sequence
from datetime import datetime

from qlora_contract.progress import ProgressReport, TerminationReport
from qlora_contract.run_config import RanksPerPod
from qlora_contract.units import rfc3339
from qlora_operator.api.status import (
    NODES_SHOWN,
    RANKS_SHOWN,
    AdapterStatus,
    Attempt,
    CheckpointStatus,
    Progress,
    RankStatus,
)
from qlora_operator.status.failure import termination_report
from qlora_operator.status.observation import Pod, aware_time

MAX_KWH = 1e7
"""The most energy of a job that is believed: a thousand machines for a year."""


def progress(before: Progress | None, report: ProgressReport, now: datetime) -> Progress:
    """The progress after a report."""
    same_step = before is not None and before.step == report.step
    stands = before is not None and same_step and before.advances == report.advances
    return Progress(
        step=report.step,
        total_steps=report.total_steps,
        percent=100 * report.step // report.total_steps if report.total_steps else None,
        epoch=report.epoch,
        loss=report.loss,
        eval_loss=report.eval_loss,
        tokens_per_second=report.tokens_per_second,
        eta_seconds=round(report.eta_seconds) if report.eta_seconds is not None else None,
        memory_estimate=report.memory_estimate,
        memory_peak=report.memory_peak,
        attempt=report.attempt,
        step_time=(before.step_time if before is not None and same_step else None) or rfc3339(now),
        advances=report.advances,
        advance_time=(before.advance_time or before.step_time if before is not None and stands else None)
        or rfc3339(now),
        updated_time=report.updated_time,
    )


def step_of(known: Progress | None, attempt: Attempt | None) -> int | None:
    """Steps that an attempt was seen to have completed; None where nothing was seen of it."""
    mine = known is not None and attempt is not None and known.attempt == attempt.attempt
    return known.step if known is not None and mine else None


def finished(before: Progress | None) -> Progress | None:
    """The progress of a job that has made all its steps."""
    if before is None:
        return None
    return before.model_copy(
        update={"step": before.total_steps, "percent": 100, "eta_seconds": 0} if before.total_steps else {}
    )


def checkpoint(report: ProgressReport) -> CheckpointStatus | None:
    """The newest checkpoint that rank 0 knows of."""
    known = report.checkpoint
    return CheckpointStatus(step=known.step, time=known.time, uri=known.uri) if known else None


def ranks(before: Sequence[RankStatus], pods: Sequence[Pod], ranks_per_pod: RanksPerPod) -> list[RankStatus]:
    """Where the ranks run, with what was known of each in its pod; at most RANKS_SHOWN of them.

    With `auto` only those that rank 0 has reported.
    """
    known = {(rank.index, rank.pod): rank for rank in before}
    found = []
    for pod in sorted(pods, key=lambda pod: pod.index):
        if ranks_per_pod == "auto":
            indices = [rank.index for rank in before if rank.pod == pod.name]
        else:
            indices = [pod.index * ranks_per_pod + local for local in range(ranks_per_pod)]
        for index in indices:
            rank = known.get((index, pod.name)) or RankStatus(index=index, pod=pod.name)
            found.append(rank.model_copy(update={"node": pod.node}))
    return found[:RANKS_SHOWN]


def with_facts(
    before: Sequence[RankStatus], report: ProgressReport, pods: Sequence[Pod] = ()
) -> list[RankStatus]:
    """The ranks with what each has found out by now.

    Args:
        before: the ranks so far.
        report: of rank 0.
        pods: those of which only rank 0 knows how many ranks they have.
    """
    known = {rank.index: rank for rank in before}
    of_index = {pod.index: pod for pod in pods}
    for fact in report.ranks:
        if fact.rank not in known and fact.pod in of_index:
            pod = of_index[fact.pod]
            known[fact.rank] = RankStatus(index=fact.rank, pod=pod.name, node=pod.node)
        if fact.rank in known:
            found = {"isa": fact.isa, "cpus": fact.cpus, "numa_nodes": fact.nodes or None}
            known[fact.rank] = known[fact.rank].model_copy(update=found)
    return [known[index] for index in sorted(known)][:RANKS_SHOWN]


def nodes(pods: Sequence[Pod]) -> list[str]:
    """The nodes of the pods, each once, at most NODES_SHOWN of them."""
    return sorted({pod.node for pod in pods if pod.node})[:NODES_SHOWN]


def dtype(pods: Sequence[Pod]) -> str | None:
    """The data type in which pods that have ended completed a step, by their reports."""
    reports = (termination_report(pod) for pod in pods)
    return next((report.compute_dtype for report in reports if report is not None and report.step), None)


def checkpoint_time(known: CheckpointStatus | None, now: datetime) -> str | None:
    """When the newest checkpoint was made, RFC 3339; None if that is unknown. Not in the future, whatever the clock of
    rank 0 says."""
    made = aware_time(known.time) if known is not None else None
    return None if made is None else rfc3339(min(made, now))


def checkpoint_step(known: CheckpointStatus | None, pods: Sequence[Pod]) -> int | None:
    """Steps in the newest checkpoint that rank 0 has reported, live or at its end."""
    steps = [report.checkpoint_step for report in _rank_zero_reports(pods)]
    steps.append(known.step if known is not None else None)
    return max((step for step in steps if step is not None), default=None)


def transfer_report(pods: Sequence[Pod]) -> TerminationReport | None:
    """The report of a transfer's pod that ended well."""
    return next((report for report in _rank_zero_reports(pods) if report.exit_code == 0), None)


def world_size(pods: Sequence[Pod]) -> int | None:
    """How many ranks there were, by rank 0's report."""
    return next((report.world_size for report in _rank_zero_reports(pods) if report.world_size), None)


def energy_kwh(pods: Sequence[Pod]) -> float | None:
    """What the processors took over all attempts, by rank 0's report; None where that is not known, or no such number:
    a pod may report anything."""
    found = (report.energy_kwh or 0.0 for report in _rank_zero_reports(pods))
    return next((energy for energy in found if 0 < energy <= MAX_KWH), None)


def adapter(pods: Sequence[Pod]) -> AdapterStatus | None:
    """The adapter that rank 0 has stored, by its report."""
    for report in _rank_zero_reports(pods):
        if report.adapter_uri:
            base = report.base_eval_loss
            return AdapterStatus(
                uri=report.adapter_uri,
                sha256=report.adapter_sha256,
                base_eval_loss=report.base_eval_loss_quantized if base is None else base,
                eval_loss=report.eval_loss,
            )
    return None


def _rank_zero_reports(pods: Sequence[Pod]) -> list[TerminationReport]:
    """What pods of index 0 report of their end: of several, if one was replaced."""
    reports = (termination_report(pod) for pod in pods if pod.index == 0)
    return [report for report in reports if report is not None]
