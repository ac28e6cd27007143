"""What rank 0 tells and what the pods show, as parts of the status."""

from collections.abc import Sequence
from datetime import datetime

from qlora_contract.progress import ProgressReport, TerminationReport
from qlora_contract.run import RanksPerPod
from qlora_operator.api.times import stamp
from qlora_operator.api.types import (
    NODES_SHOWN,
    RANKS_SHOWN,
    AdapterStatus,
    CheckpointStatus,
    Progress,
    RankStatus,
)
from qlora_operator.status.cause import report
from qlora_operator.status.observation import Pod


def progress(before: Progress | None, told: ProgressReport, now: datetime) -> Progress:
    """The progress after a report."""
    since = before.step_time if before is not None and before.step == told.step else None
    return Progress(
        step=told.step,
        total_steps=told.total_steps,
        percent=100 * told.step // told.total_steps if told.total_steps else None,
        epoch=told.epoch,
        loss=told.loss,
        eval_loss=told.eval_loss,
        tokens_per_second=told.tokens_per_second,
        eta_seconds=round(told.eta_seconds) if told.eta_seconds is not None else None,
        memory_estimate=told.memory_estimate,
        memory_peak=told.memory_peak,
        step_time=since or stamp(now),
        updated_time=told.updated_time,
    )


def finished(before: Progress | None) -> Progress | None:
    """The progress of a job that has made all its steps."""
    if before is None:
        return None
    return before.model_copy(
        update={"step": before.total_steps, "percent": 100, "eta_seconds": 0} if before.total_steps else {}
    )


def checkpoint(told: ProgressReport) -> CheckpointStatus | None:
    """The newest checkpoint that rank 0 knows of."""
    known = told.checkpoint
    return CheckpointStatus(step=known.step, time=known.time, uri=known.uri) if known else None


def ranks(before: Sequence[RankStatus], pods: Sequence[Pod], ranks_per_pod: RanksPerPod) -> list[RankStatus]:
    """Where the ranks run, the first few of them, with what was known of each in its pod.

    With `auto` those that rank 0 has told of.
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
    before: Sequence[RankStatus], told: ProgressReport, pods: Sequence[Pod] = ()
) -> list[RankStatus]:
    """The ranks with what each has found by now.

    `pods` are those of whose ranks only rank 0 can tell how many there are.
    """
    known = {rank.index: rank for rank in before}
    of_index = {pod.index: pod for pod in pods}
    for fact in told.ranks:
        if fact.rank not in known and fact.pod in of_index:
            pod = of_index[fact.pod]
            known[fact.rank] = RankStatus(index=fact.rank, pod=pod.name, node=pod.node)
        if fact.rank in known:
            found = {"isa": fact.isa, "cpus": fact.cpus, "numa_nodes": fact.nodes or None}
            known[fact.rank] = known[fact.rank].model_copy(update=found)
    return [known[index] for index in sorted(known)][:RANKS_SHOWN]


def nodes(pods: Sequence[Pod]) -> list[str]:
    """The nodes of the pods, each once, the first few of them."""
    return sorted({pod.node for pod in pods if pod.node})[:NODES_SHOWN]


def dtype(pods: Sequence[Pod]) -> str | None:
    """What the pods that have ended say they have completed a step in."""
    told = (report(pod) for pod in pods)
    return next((each.compute_dtype for each in told if each is not None and each.step), None)


def transfer(pods: Sequence[Pod]) -> TerminationReport | None:
    """What the pod of a transfer says of its end."""
    told = (report(pod) for pod in pods if pod.index == 0)
    return next((each for each in told if each is not None and each.exit_code == 0), None)


def world_size(pods: Sequence[Pod]) -> int | None:
    """How many ranks rank 0's pod says that there were."""
    told = (report(pod) for pod in pods if pod.index == 0)
    return next((each.world_size for each in told if each is not None and each.world_size), None)


def adapter(pods: Sequence[Pod]) -> AdapterStatus | None:
    """What rank 0's pod says of the adapter that it has stored."""
    for pod in pods:
        end = report(pod)
        if pod.index == 0 and end is not None and end.adapter_uri:
            return AdapterStatus(
                uri=end.adapter_uri,
                sha256=end.adapter_sha256,
                base_eval_loss=end.base_eval_loss
                if end.base_eval_loss is not None
                else end.base_eval_loss_quantized,
                eval_loss=end.eval_loss,
            )
    return None
