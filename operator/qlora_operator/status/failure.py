"""Why a Job failed, from what it and its pods say: one reason, one sentence, one budget."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from pydantic import ValidationError

from qlora_contract.exit_codes import COLLATERAL, ExitCode, FailureKind
from qlora_contract.progress import TerminationReport
from qlora_contract.run_config import RunStage
from qlora_operator.api.names import Reason
from qlora_operator.api.status import RANKS_SHOWN
from qlora_operator.status.checks import AttemptEnd, Budget
from qlora_operator.status.observation import AttemptJob, Pod
from qlora_operator.status.sanitize import last_line, sanitize, sanitized

SIGKILL_CODE = 137
SIGTERM_CODE = 143
SETTLE_SECONDS = 10.0
"""How long the pods of a Job that only lost a peer may take to tell why: the pod that is the cause may be
reported after those that it took along."""

_TRANSFER_MEMORY = (
    "the administrator sets how much a transfer has, as jobs.transfer.memory; then create another job"
)
MORE_MEMORY: dict[RunStage, str] = {
    "train": "raise topology.memoryPerRank, or lower training.microBatchTokens or training.maxSequenceLength, "
    "in another job",
    "export": "raise topology.memoryPerRank in another job of this name, which exports without training again",
    "fetch": _TRANSFER_MEMORY,
    "publish": _TRANSFER_MEMORY,
}
"""What helps a pod that was killed at its memory limit."""

_BUDGETS = {
    FailureKind.PERMANENT: Budget.PERMANENT,
    FailureKind.RETRYABLE: Budget.USER,
    FailureKind.INFRASTRUCTURE: Budget.INFRASTRUCTURE,
    FailureKind.COLLATERAL: Budget.INFRASTRUCTURE,
}

EXIT_REASONS: dict[int, tuple[Reason, Budget]] = {
    **{code: (Reason(code.reason), _BUDGETS[code.kind]) for code in ExitCode if code.kind in _BUDGETS},
    SIGTERM_CODE: (Reason.TERMINATED, Budget.INFRASTRUCTURE),
}
"""The reason and the price of each exit code that means a failure: the contract's table, in the API's words."""

DISRUPTIONS: dict[str, tuple[Reason, str]] = {
    "PreemptionByScheduler": (Reason.PREEMPTED, "was preempted by a pod of higher priority"),
    "DeletionByTaintManager": (Reason.NODE_LOST, "was removed from a node that is tainted NoExecute"),
    "DeletionByPodGC": (Reason.NODE_LOST, "was removed with its node"),
    "EvictionByEvictionAPI": (Reason.DRAINED, "was evicted through the API, as `kubectl drain` does"),
    "TerminationByKubelet": (Reason.EVICTED, "was ended by its node's kubelet"),
}
"""Reasons of the pod condition DisruptionTarget, which Kubernetes documents."""

# What the Job controller writes into the condition of a Job that a podFailurePolicy rule failed.
_EXITED = re.compile(r"Container \S+ for pod \S+?/(?P<pod>\S+) failed with exit code (?P<code>\d+)")
_DISRUPTED = re.compile(r"Pod \S+?/(?P<pod>\S+) has condition DisruptionTarget")


_STOPPED = frozenset({0, *COLLATERAL, ExitCode.TERMINATED, SIGTERM_CODE, SIGKILL_CODE})
"""Exit codes of pods that were told to stop, and of those that lost them."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a failing Job."""

    job: AttemptJob
    """It is failing."""
    pods: Sequence[Pod]
    """Those of its attempt that still exist."""
    lost_nodes: Collection[str] = ()
    """Nodes that do not respond."""
    stage: RunStage = "train"

    @property
    def message(self) -> str:
        """What the Job controller says."""
        return self.job.failing.message if self.job.failing is not None else ""

    def named(self, name: str) -> Pod | None:
        """The pod of this name, unless it is gone."""
        return next((pod for pod in self.pods if pod.name == name), None)


def classify(evidence: Evidence) -> AttemptEnd:
    """Why a failing Job fails."""
    end = _by_rule(evidence) or _by_pods(evidence)
    match = _EXITED.search(evidence.message)
    return replace(end, exit_codes=exit_codes(evidence.pods, [int(match["code"])] if match else ()))


def only_stopped(end: AttemptEnd) -> bool:
    """Whether nothing failed in this end of a Job but that its pods were told to stop."""
    return end.reason in (Reason.TERMINATED, Reason.PEER_LOST, Reason.KILLED) and _STOPPED.issuperset(
        end.exit_codes
    )


def evidence_deadline(evidence: Evidence) -> datetime | None:
    """Until when the pods of a failing Job may yet tell the cause; None when there is nothing to wait for."""
    since = evidence.job.failing_since
    if since is None or all(pod.finished for pod in evidence.pods) or _by_rule(evidence):
        return None
    if _by_pods(evidence).reason not in (Reason.PEER_LOST, Reason.TERMINATED):
        return None
    return since + timedelta(seconds=SETTLE_SECONDS)


def exit_codes(pods: Iterable[Pod], known: Iterable[int] = ()) -> tuple[int, ...]:
    """The distinct exit codes of pods and those known besides, in ascending order, at most RANKS_SHOWN of them."""
    codes = {*known, *(pod.exit_code for pod in pods if pod.exit_code is not None)}
    return tuple(sorted(codes))[:RANKS_SHOWN]


def below_tier(pods: Iterable[Pod]) -> list[str]:
    """Nodes whose processor lacks what their labels promise, as the ranks on them found out."""
    return sorted({pod.node for pod in pods if pod.exit_code == ExitCode.ISA_BELOW_TIER and pod.node})


def termination_report(pod: Pod) -> TerminationReport | None:
    """The trainer's report of its end; None if it left none."""
    return _report(pod.termination_message)


def check_report(pod: Pod) -> TerminationReport | None:
    """What was found of the data beside a fetch; None if nothing is reported."""
    return _report(pod.check_message)


def _report(message: str) -> TerminationReport | None:
    try:
        return sanitized(TerminationReport.model_validate_json(message, extra="ignore"))
    except ValidationError:
        return None


def disruption(pods: Iterable[Pod]) -> AttemptEnd | None:
    """Why an attempt is about to end whose Job does not know it yet: one of its pods is being taken away."""
    pod = next((pod for pod in pods if pod.disruption is not None), None)
    return None if pod is None else _disrupted(pod.name, pod)


# --- what the Job says


def _by_rule(evidence: Evidence) -> AttemptEnd | None:
    """A rule of the Job's podFailurePolicy matched: it names the pod, even one that is gone."""
    if match := _DISRUPTED.search(evidence.message):
        return _disrupted(match["pod"], evidence.named(match["pod"]))
    if match := _EXITED.search(evidence.message):
        return _exited(match["pod"], int(match["code"]), evidence.named(match["pod"]), evidence.stage)
    return None


# --- what the pods say


def _by_pods(evidence: Evidence) -> AttemptEnd:
    """No rule of the Job's matched: no pod failed by itself, or none that names a cause."""
    for check in POD_CHECKS:
        for pod in evidence.pods:
            if end := check(pod, evidence):
                return end
    message = f"a pod of {evidence.job.name} failed and left no trace: {sanitize(evidence.message)}"
    return AttemptEnd(Reason.PEER_LOST, message, Budget.INFRASTRUCTURE)


def taken_away(pod: Pod, _: Evidence) -> AttemptEnd | None:
    """It has the condition DisruptionTarget."""
    return disruption([pod])


def rejected_by_kubelet(pod: Pod, _: Evidence) -> AttemptEnd | None:
    """Its node's kubelet did not admit it."""
    if pod.status_reason is None or pod.exit_code is not None or pod.phase != "Failed":
        return None
    words = sanitize(": ".join(filter(None, (pod.status_reason.reason, pod.status_reason.message))))
    message = f"the kubelet of node {pod.node} refused pod {pod.name}: {words}"
    return AttemptEnd(Reason.ADMISSION_REJECTED, message, Budget.INFRASTRUCTURE, node=pod.node)


def failed_by_itself(pod: Pod, evidence: Evidence) -> AttemptEnd | None:
    """It failed by itself, and the Job controller learned of it after it had given up the Job."""
    consequences = {None, 0, *COLLATERAL, SIGTERM_CODE}
    if pod.deleting_since is not None and pod.termination_reason != "OOMKilled":
        consequences |= {ExitCode.TERMINATED, SIGKILL_CODE}
    if pod.exit_code is None or pod.exit_code in consequences:
        return None
    return _exited(pod.name, pod.exit_code, pod, evidence.stage)


def on_a_lost_node(pod: Pod, evidence: Evidence) -> AttemptEnd | None:
    """Its node does not respond."""
    if pod.finished or pod.node not in evidence.lost_nodes:
        return None
    message = f"node {pod.node} of pod {pod.name} does not answer"
    return AttemptEnd(Reason.NODE_LOST, message, Budget.INFRASTRUCTURE)


def lost_a_peer(pod: Pod, _: Evidence) -> AttemptEnd | None:
    """It ended because another one did."""
    if pod.exit_code not in COLLATERAL:
        return None
    return AttemptEnd(Reason.PEER_LOST, f"{pod.description} lost a peer{_detail(pod)}", Budget.INFRASTRUCTURE)


def stopped(pod: Pod, evidence: Evidence) -> AttemptEnd | None:
    """It was asked to stop, or killed."""
    if pod.exit_code not in (ExitCode.TERMINATED, SIGTERM_CODE, SIGKILL_CODE):
        return None
    return _exited(pod.name, pod.exit_code or 0, pod, evidence.stage)


POD_CHECKS: tuple[Callable[[Pod, Evidence], AttemptEnd | None], ...] = (
    taken_away,  # the cluster says itself that it takes a pod away
    rejected_by_kubelet,  # a pod that never ran has no exit code
    failed_by_itself,  # a pod that names a cause of its own
    on_a_lost_node,  # a pod there reports nothing, and its peers lose it
    lost_a_peer,  # nothing better is known than that ranks lost each other
    stopped,  # pods that were asked to stop, by an unknown client
)
"""What pods tell, from causes to mere consequences. The first check that finds a pod wins."""


# --- ends of a pod


def _describe(name: str, pod: Pod | None) -> str:
    return f"pod {name}" if pod is None else pod.description


def _disrupted(name: str, pod: Pod | None) -> AttemptEnd:
    target = pod.disruption if pod is not None else None
    reason, words = DISRUPTIONS.get(target.reason if target else "", (Reason.DISRUPTED, "was disrupted"))
    detail = f": {sanitize(target.message)}" if target and target.message else ""
    return AttemptEnd(reason, f"{_describe(name, pod)} {words}{detail}", Budget.INFRASTRUCTURE)


def _exited(name: str, code: int, pod: Pod | None, stage: RunStage) -> AttemptEnd:
    subject = _describe(name, pod)
    if pod is not None and pod.disruption is not None:
        return _disrupted(name, pod)
    if pod is not None and pod.termination_reason == "OOMKilled":
        message = f"{subject} was killed at its memory limit: {MORE_MEMORY[stage]}"
        return AttemptEnd(Reason.OUT_OF_MEMORY, message, Budget.PERMANENT)
    if pod is not None and pod.deleting_since is not None and code == SIGKILL_CODE:
        message = f"{subject} was deleted, and killed at the end of its grace period"
        return AttemptEnd(Reason.TERMINATED, message, Budget.INFRASTRUCTURE)
    unknown = (Reason.KILLED if code > 128 else Reason.UNEXPECTED_ERROR, Budget.USER)
    reason, budget = EXIT_REASONS.get(code, unknown)
    words = f"was killed by signal {code - 128}" if code > 128 else f"exited with code {code}"
    return AttemptEnd(reason, f"{subject} {words}{_detail(pod)}", budget, node=pod.node if pod else None)


def _detail(pod: Pod | None) -> str:
    """The cause that the trainer gives, or the last line it wrote."""
    if pod is None:
        return ""
    report = termination_report(pod)
    words = sanitize(report.cause) if report else last_line(pod.termination_message)
    return f": {words}" if words else ""
