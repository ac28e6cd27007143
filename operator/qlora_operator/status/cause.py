"""Why an attempt ended, from what its Job and its pods say: one reason, one sentence, one budget."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pydantic import ValidationError

from qlora_contract.exit_codes import COLLATERAL, ExitCode
from qlora_contract.progress import TerminationReport
from qlora_operator.api.names import Reason
from qlora_operator.status.observation import Gang, Pod

SIGTERM_CODE = 143
MESSAGE_CHARACTERS = 1024
"""Longer causes are cut: they go into the status, into events and into a column."""


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
    ExitCode.RENDEZVOUS_FAILED: (Reason.RENDEZVOUS_FAILED, Budget.USER),
    ExitCode.STALLED: (Reason.STALLED, Budget.USER),
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
        return TerminationReport.model_validate_json(pod.last_words, extra="ignore")
    except ValidationError:
        return None


def classify(gang: Gang, pods: Sequence[Pod]) -> Cause:
    """Why a Job that is failing fails. `pods`: those of its attempt that are still there."""
    assert gang.failing is not None
    codes = tuple(sorted({pod.exit_code for pod in pods if pod.exit_code is not None}))
    said = gang.failing.message
    if match := _DISRUPTED.search(said):
        cause = _disrupted(match["pod"], _named(match["pod"], pods))
    elif match := _EXITED.search(said):
        cause = _exited(match["pod"], int(match["code"]), _named(match["pod"], pods))
        codes = tuple(sorted({*codes, int(match["code"])}))
    else:
        cause = _by_pods(pods, said)
    return Cause(cause.reason, cause.message[:MESSAGE_CHARACTERS], cause.budget, codes)


def below_tier(pods: Iterable[Pod]) -> list[str]:
    """Nodes whose processor lacks what their labels promise, as the ranks on them found out."""
    return sorted({pod.node for pod in pods if pod.exit_code == ExitCode.ISA_BELOW_TIER and pod.node})


def disrupted(pods: Iterable[Pod]) -> Cause | None:
    """Why an attempt is about to end whose Job does not know yet: a pod of it is being taken away."""
    gone = next((pod for pod in pods if pod.disruption is not None), None)
    return None if gone is None else _disrupted(gone.name, gone)


def _named(name: str, pods: Iterable[Pod]) -> Pod | None:
    return next((pod for pod in pods if pod.name == name), None)


def _where(name: str, pod: Pod | None) -> str:
    return f"pod {name} on node {pod.node}" if pod is not None and pod.node else f"pod {name}"


def _disrupted(name: str, pod: Pod | None) -> Cause:
    said = pod.disruption if pod is not None else None
    reason, words = DISRUPTIONS.get(said.reason if said else "", (Reason.EVICTED, "was disrupted"))
    detail = f": {said.message}" if said and said.message else ""
    return Cause(reason, f"{_where(name, pod)} {words}{detail}", Budget.INFRASTRUCTURE)


def _exited(name: str, code: int, pod: Pod | None) -> Cause:
    where = _where(name, pod)
    if pod is not None and pod.disruption is not None:
        return _disrupted(name, pod)
    if pod is not None and pod.ended_by == "OOMKilled":
        return Cause(
            Reason.OUT_OF_MEMORY,
            f"{where} was killed at its memory limit: raise topology.memoryPerRank (while suspended), or "
            "lower training.microBatchTokens or training.maxSequenceLength in another job",
            Budget.PERMANENT,
        )
    reason, budget = EXIT_REASONS.get(
        code, (Reason.KILLED if code > 128 else Reason.UNEXPECTED_ERROR, Budget.USER)
    )
    words = f"was killed by signal {code - 128}" if code > 128 else f"exited with code {code}"
    return Cause(reason, f"{where} {words}{_detail(pod)}", budget)


def _detail(pod: Pod | None) -> str:
    """The cause that the trainer gives, or the last line it wrote."""
    if pod is None or not pod.last_words:
        return ""
    told = report(pod)
    return f": {told.cause if told else pod.last_words.splitlines()[-1].strip()}"


def _by_pods(pods: Sequence[Pod], said: str) -> Cause:
    """No rule of the Job's matched: no pod failed by itself, or none that names a cause."""
    for pod in pods:
        if pod.disruption is not None:
            return _disrupted(pod.name, pod)
    for pod in pods:
        if pod.verdict is not None and pod.exit_code is None and pod.phase == "Failed":
            message = f"the kubelet of node {pod.node} refused pod {pod.name}: {_words(pod)}"
            return Cause(Reason.ADMISSION_REJECTED, message, Budget.INFRASTRUCTURE)
    for pod in pods:
        if pod.exit_code not in (None, 0, *COLLATERAL, SIGTERM_CODE):
            return _exited(pod.name, pod.exit_code or 0, pod)
    lost = next((pod for pod in pods if pod.exit_code in COLLATERAL), None)
    told = _detail(lost) if lost is not None else f": {said}" if said else ""
    return Cause(Reason.PEER_LOST, f"the ranks lost a peer{told}", Budget.INFRASTRUCTURE)


def _words(pod: Pod) -> str:
    assert pod.verdict is not None
    return ": ".join(part for part in (pod.verdict.reason, pod.verdict.message) if part)
