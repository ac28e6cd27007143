"""The end of an attempt that has a reason: its pods must all be gone, or finished, before it has ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from qlora_operator.api.names import ConditionType, Reason
from qlora_operator.status.actions import (
    Action,
    DeleteAttemptJob,
    DeleteNetwork,
    DeletePod,
    DropWorkload,
    KeepWorkload,
)
from qlora_operator.status.failure import disruption
from qlora_operator.status.observation import AttemptJob, Pod, ReasonMessage
from qlora_operator.status.view import JobView

OVERDUE = timedelta(seconds=30)
"""How long after the end of its grace period a pod that still exists counts as stuck."""


@dataclass(frozen=True)
class Teardown:
    """How far it is."""

    done: bool
    """Nothing of the attempt runs any more."""
    actions: tuple[Action, ...] = ()
    stuck: ReasonMessage | None = None
    """A pod that does not end by itself."""


def tear_down(view: JobView) -> Teardown:
    """What is left of the open attempt, and what is to be done about it.

    That its Job is gone is the API server's word: a watch that has just begun may not have shown it yet.
    """
    job = view.confirmed_job
    actions: list[Action] = []
    if job is not None and not job.finished and not job.deleting:
        # A Job that fails by itself keeps its pods, for their logs; one that fails while it is suspended would never be
        # done with it: the API server takes no end of a Job without a start, which suspension takes away.
        fails = not job.suspended and (job.failing is not None or disruption(view.pods) is not None)
        if view.hold is not None or not fails:
            if view.open_attempt is not None and view.open_attempt.workload is not None:
                actions.append(KeepWorkload(view.open_attempt.workload, job.name, job.uid))
            actions += _delete(job, view)
    actions += delete_orphans(view)
    active = view.active_pods
    if not active and (job is None or job.finished):
        return Teardown(done=True, actions=tuple(actions))
    blocking = blocking_pods(view, active) if active and not view.finished else None
    stuck = blocking if blocking and blocking.reason == Reason.NODE_LOST else None
    return Teardown(done=False, actions=tuple(actions), stuck=stuck)


def blocking_pods(view: JobView, pods: Sequence[Pod]) -> ReasonMessage:
    """Why these pods, which should be gone, are not. Read.NODE_HEALTH."""
    lost = next((pod for pod in pods if pod.node in view.lost_nodes), None)
    overdue = (
        pod
        for pod in pods
        if pod.node and pod.deleting_since is not None and view.now > pod.deleting_since + OVERDUE
    )
    if stuck := lost or next(overdue, None):
        trouble = "does not answer" if lost else "does not end it"
        return ReasonMessage(
            Reason.NODE_LOST,
            f"pod {stuck.name} may still run on node {stuck.node}, which {trouble}: the job continues when the "
            "node is back, is deleted, or has the taint node.kubernetes.io/out-of-service",
        )
    names = ", ".join(pod.name for pod in pods[:3]) + (", ..." if len(pods) > 3 else "")
    message = f"waiting for {len(pods)} pod(s) of an earlier attempt to end: {names}"
    return ReasonMessage(Reason.PODS_REMAIN, message)


def delete_orphans(view: JobView) -> list[Action]:
    """Deletes pods whose Job was deleted without them."""
    jobs = {job.uid for job in view.seen.attempt_jobs}
    return [
        DeletePod(pod.name, pod.uid)
        for pod in view.active_pods
        if pod.owner_uid not in jobs and pod.deleting_since is None
    ]


def delete_leftover_jobs(view: JobView) -> list[Action]:
    """Deletes Jobs of other attempts, and the last one's if it outlives the attempt, whatever the job does next: a
    queue may yet admit it.

    The newest that failed by itself stays for its pods' logs, until the next attempt has ended or the job has; the one
    that trained the adapter stays with the job, as the last one does: what talks to its model is made like its pods.
    """
    over, kept = view.open_attempt is None, (_kept_for_its_logs(view), _that_trained(view))
    return [
        action
        for job in view.seen.attempt_jobs
        if job.controlled
        and not job.deleting
        and job not in kept
        and (job.attempt != view.status.attempt or (over and not job.finished and job.failing is None))
        for action in _delete(job, view)
    ]


def _delete(job: AttemptJob, view: JobView) -> list[Action]:
    """Deletes a Job. A Workload that it has taken over would outlive it, so that goes, too, unless the next attempt is
    to have it."""
    attempts = view.status.attempts
    kept = {attempt.workload for attempt in attempts[-1 if job.attempt == view.status.attempt else -2 :]}
    dropped = [] if job.workload is None or job.workload in kept else [DropWorkload(job.workload)]
    return [*dropped, DeleteAttemptJob(job.name, job.uid)]


def delete_network(view: JobView) -> list[Action]:
    """Deletes what only ranks need, once the job is over and its pods, too: thousands of old jobs would each keep a
    NetworkPolicy in the network plugin, and a Service that every change of a pod is compared with."""
    over = view.finished and view.open_attempt is None and view.seen.network_exists
    return [DeleteNetwork()] if over else []


def _kept_for_its_logs(view: JobView) -> AttemptJob | None:
    """The newest Job before the open attempt's that failed. It holds no nodes; but a quota may count it, or its pods,
    and then it goes."""
    number = view.status.attempt
    if view.open_attempt is None or view.finished or number is None or _short_of_quota(view):
        return None
    failed = (job for job in view.seen.attempt_jobs if job.controlled and job.failed and job.attempt < number)
    return max(failed, key=lambda job: job.attempt, default=None)


def _that_trained(view: JobView) -> AttemptJob | None:
    """The Job whose ranks finished the adapter. It holds no nodes; but a quota may count it, and then it goes."""
    if view.status.adapter is None or _short_of_quota(view):
        return None
    trained = {attempt.attempt for attempt in view.status.attempts if attempt.stage == "train"}
    done = (
        job for job in view.seen.attempt_jobs if job.controlled and job.complete and job.attempt in trained
    )
    return max(done, key=lambda job: job.attempt, default=None)


def _short_of_quota(view: JobView) -> bool:
    waits = (view.condition(kind) for kind in (ConditionType.INITIALIZED, ConditionType.RUNNING))
    return any(each is not None and each.reason == Reason.QUOTA_EXCEEDED for each in waits)
