"""Why an attempt ended, from what its Job and its pods say: one reason, one sentence, one budget."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from pydantic import ValidationError

from qlora_contract.exit_codes import COLLATERAL, ExitCode
from qlora_contract.progress import TerminationReport
from qlora_operator.api.names import Reason
from qlora_operator.api.types import RANKS_SHOWN
from qlora_operator.status.observation import Gang, Pod
from qlora_operator.status.quote import last_line, presentable, quote

SIGKILL_CODE = 137
SIGTERM_CODE = 143
SETTLE_SECONDS = 10.0
"""How long the pods of a Job that only lost a peer may take to tell why: the pod that is the cause may be
reported after those that it took along."""

RANKS_NEED = (
    "raise topology.memoryPerRank, or lower training.microBatchTokens or "
    "training.maxSequenceLength, in another job"
)
TRANSFERS_NEED = "the administrator sets how much a transfer has, as transfer.memory; then create another job"
"""What helps a pod that was killed at its memory limit."""


class Budget(StrEnum):
    """Whose doing the end of an attempt was."""

    NONE = "none"
    """Nobody's: it costs nothing."""
    USER = "user"
    INFRASTRUCTURE = "infrastructure"
    PERMANENT = "permanent"
    """There is nothing to be gained by another attempt."""


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended."""

    reason: Reason
    message: str
    budget: Budget
    exit_codes: tuple[int, ...] = ()


EXIT_REASONS: dict[int, tuple[Reason, Budget]] = {
    ExitCode.UNEXPECTED: (Reason.UNEXPECTED_ERROR, Budget.USER),
    ExitCode.INVALID_CONFIGURATION: (Reason.INVALID_CONFIGURATION, Budget.PERMANENT),
    ExitCode.INVALID_DATA: (Reason.INVALID_DATA, Budget.PERMANENT),
    ExitCode.MODEL_UNUSABLE: (Reason.MODEL_UNUSABLE, Budget.PERMANENT),
    ExitCode.DIVERGED: (Reason.DIVERGED, Budget.PERMANENT),
    ExitCode.STORAGE_FULL: (Reason.STORAGE_FULL, Budget.PERMANENT),
    ExitCode.OUT_OF_MEMORY: (Reason.OUT_OF_MEMORY, Budget.PERMANENT),
    ExitCode.NO_IMPROVEMENT: (Reason.NO_IMPROVEMENT, Budget.PERMANENT),
    ExitCode.TRANSFER_REFUSED: (Reason.TRANSFER_REFUSED, Budget.PERMANENT),
    ExitCode.RENDEZVOUS_FAILED: (Reason.RENDEZVOUS_FAILED, Budget.USER),
    ExitCode.STALLED: (Reason.STALLED, Budget.USER),
    ExitCode.TRANSFER_FAILED: (Reason.TRANSFER_FAILED, Budget.USER),
    ExitCode.LOST_PEER: (Reason.PEER_LOST, Budget.INFRASTRUCTURE),
    ExitCode.COLLECTIVE_TIMEOUT: (Reason.PEER_LOST, Budget.INFRASTRUCTURE),
    ExitCode.TERMINATED: (Reason.TERMINATED, Budget.INFRASTRUCTURE),
    ExitCode.ISA_BELOW_TIER: (Reason.ISA_BELOW_TIER, Budget.INFRASTRUCTURE),
    SIGTERM_CODE: (Reason.TERMINATED, Budget.INFRASTRUCTURE),
}

DISRUPTIONS: dict[str, tuple[Reason, str]] = {
    "PreemptionByScheduler": (Reason.PREEMPTED, "was preempted by a pod of higher priority"),
    "DeletionByTaintManager": (Reason.NODE_LOST, "was removed from a node that is tainted NoExecute"),
    "DeletionByPodGC": (Reason.NODE_LOST, "was removed with its node"),
    "EvictionByEvictionAPI": (Reason.DRAINED, "was evicted, as a drain does"),
    "TerminationByKubelet": (Reason.EVICTED, "was ended by its node's kubelet"),
}
"""Reasons of the pod condition DisruptionTarget, which Kubernetes documents."""

# What the Job controller writes into the condition of a Job that a podFailurePolicy rule failed.
_EXITED = re.compile(r"Container \S+ for pod \S+?/(?P<pod>\S+) failed with exit code (?P<code>\d+)")
_DISRUPTED = re.compile(r"Pod \S+?/(?P<pod>\S+) has condition DisruptionTarget")


def report(pod: Pod) -> TerminationReport | None:
    """The trainer's own words about its end; None where it had none."""
    try:
        return presentable(TerminationReport.model_validate_json(pod.last_words, extra="ignore"))
    except ValidationError:
        return None


def classify(gang: Gang, pods: Sequence[Pod], lost_nodes: Collection[str] = ()) -> Cause:
    """Why a Job that is failing fails.

    Args:
        gang: the Job, which is failing.
        pods: those of its attempt that are still there.
        lost_nodes: nodes that do not answer.
    """
    said = _said(gang)
    cause = _by_rule(said, pods) or _by_pods(gang, pods, lost_nodes)
    match = _EXITED.search(said)
    return replace(cause, exit_codes=exit_codes(pods, [int(match["code"])] if match else ()))


def settled_at(gang: Gang, pods: Sequence[Pod], lost_nodes: Collection[str] = ()) -> datetime | None:
    """Until when the pods of a failing Job may yet tell the cause; None when there is nothing to wait for."""
    if gang.failing_since is None or all(pod.over for pod in pods) or _by_rule(_said(gang), pods):
        return None
    if _by_pods(gang, pods, lost_nodes).reason not in (Reason.PEER_LOST, Reason.TERMINATED):
        return None
    return gang.failing_since + timedelta(seconds=SETTLE_SECONDS)


def exit_codes(pods: Iterable[Pod], known: Iterable[int] = ()) -> tuple[int, ...]:
    """The different exit codes of pods, and those that are known besides, the first few of them."""
    codes = {*known, *(pod.exit_code for pod in pods if pod.exit_code is not None)}
    return tuple(sorted(codes))[:RANKS_SHOWN]


def below_tier(pods: Iterable[Pod]) -> list[str]:
    """Nodes whose processor lacks what their labels promise, as the ranks on them found out."""
    return sorted({pod.node for pod in pods if pod.exit_code == ExitCode.ISA_BELOW_TIER and pod.node})


def disrupted(pods: Iterable[Pod]) -> Cause | None:
    """Why an attempt is about to end whose Job does not know yet: a pod of it is being taken away."""
    gone = next((pod for pod in pods if pod.disruption is not None), None)
    return None if gone is None else _disrupted(gone.name, gone)


# --- what the Job says


def _said(gang: Gang) -> str:
    assert gang.failing is not None
    return gang.failing.message


def _by_rule(said: str, pods: Sequence[Pod]) -> Cause | None:
    """A rule of the Job's matched: it names the pod, even one that is gone."""
    if match := _DISRUPTED.search(said):
        return _disrupted(match["pod"], _named(match["pod"], pods))
    if match := _EXITED.search(said):
        return _exited(match["pod"], int(match["code"]), _named(match["pod"], pods))
    return None


def _named(name: str, pods: Iterable[Pod]) -> Pod | None:
    return next((pod for pod in pods if pod.name == name), None)


# --- what the pods say


def _by_pods(gang: Gang, pods: Sequence[Pod], lost_nodes: Collection[str]) -> Cause:
    """No rule of the Job's matched: no pod failed by itself, or none that names a cause."""
    causes = (
        disrupted(pods),
        _first(_refused, pods),
        _first(_failed_late, pods),
        next((_node_lost(pod) for pod in pods if not pod.over and pod.node in lost_nodes), None),
        _first(_lost_peer, pods),
        _first(_terminated, pods),
    )
    untold = f"a pod of {gang.name} failed and left no trace: {quote(_said(gang))}"
    return next(filter(None, causes), Cause(Reason.PEER_LOST, untold, Budget.INFRASTRUCTURE))


def _first(judge: Callable[[Pod], Cause | None], pods: Iterable[Pod]) -> Cause | None:
    return next(filter(None, map(judge, pods)), None)


def _refused(pod: Pod) -> Cause | None:
    if pod.verdict is None or pod.exit_code is not None or pod.phase != "Failed":
        return None
    words = quote(": ".join(filter(None, (pod.verdict.reason, pod.verdict.message))))
    message = f"the kubelet of node {pod.node} refused pod {pod.name}: {words}"
    return Cause(Reason.ADMISSION_REJECTED, message, Budget.INFRASTRUCTURE)


def _failed_late(pod: Pod) -> Cause | None:
    """A pod that failed by itself, which the Job controller learned after it had given up the Job."""
    consequences = {None, 0, *COLLATERAL, SIGTERM_CODE}
    if pod.deleting_since is not None and pod.ended_by != "OOMKilled":
        consequences |= {ExitCode.TERMINATED, SIGKILL_CODE}
    return None if pod.exit_code in consequences else _exited(pod.name, pod.exit_code or 0, pod)


def _node_lost(pod: Pod) -> Cause:
    return Cause(
        Reason.NODE_LOST, f"node {pod.node} of pod {pod.name} does not answer", Budget.INFRASTRUCTURE
    )


def _lost_peer(pod: Pod) -> Cause | None:
    if pod.exit_code not in COLLATERAL:
        return None
    message = f"{pod.where} lost a peer{_detail(pod)}"
    return Cause(Reason.PEER_LOST, message, Budget.INFRASTRUCTURE)


def _terminated(pod: Pod) -> Cause | None:
    stopped = pod.exit_code in (ExitCode.TERMINATED, SIGTERM_CODE, SIGKILL_CODE)
    return _exited(pod.name, pod.exit_code or 0, pod) if stopped else None


# --- ends of a pod


def _where(name: str, pod: Pod | None) -> str:
    return f"pod {name}" if pod is None else pod.where


def _disrupted(name: str, pod: Pod | None) -> Cause:
    said = pod.disruption if pod is not None else None
    reason, words = DISRUPTIONS.get(said.reason if said else "", (Reason.DISRUPTED, "was disrupted"))
    detail = f": {quote(said.message)}" if said and said.message else ""
    return Cause(reason, f"{_where(name, pod)} {words}{detail}", Budget.INFRASTRUCTURE)


def _exited(name: str, code: int, pod: Pod | None) -> Cause:
    where = _where(name, pod)
    if pod is not None and pod.disruption is not None:
        return _disrupted(name, pod)
    if pod is not None and pod.ended_by == "OOMKilled":
        return _out_of_memory(where)
    if pod is not None and pod.deleting_since is not None and code == SIGKILL_CODE:
        message = f"{where} was deleted, and killed at the end of its grace period"
        return Cause(Reason.TERMINATED, message, Budget.INFRASTRUCTURE)
    unknown = (Reason.KILLED if code > 128 else Reason.UNEXPECTED_ERROR, Budget.USER)
    reason, budget = EXIT_REASONS.get(code, unknown)
    words = f"was killed by signal {code - 128}" if code > 128 else f"exited with code {code}"
    return Cause(reason, f"{where} {words}{_detail(pod)}", budget)


def _out_of_memory(where: str) -> Cause:
    return Cause(
        Reason.OUT_OF_MEMORY, f"{where} was killed at its memory limit: {RANKS_NEED}", Budget.PERMANENT
    )


def _detail(pod: Pod | None) -> str:
    """The cause that the trainer gives, or the last line it wrote."""
    if pod is None:
        return ""
    told = report(pod)
    words = quote(told.cause) if told else last_line(pod.last_words)
    return f": {words}" if words else ""
