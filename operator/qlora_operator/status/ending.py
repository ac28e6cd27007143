"""Why the open attempt is over, or must be."""

from datetime import datetime, timedelta

from qlora_contract.units import parse_time
from qlora_operator.api.names import ConditionType, Reason
from qlora_operator.api.v1alpha1 import topology_hash
from qlora_operator.status import policies
from qlora_operator.status.checks import AttemptEnd, Budget, EndCheck, NotYet
from qlora_operator.status.deadlines import JOB_DEADLINES, progress_deadline_exceeded
from qlora_operator.status.failure import Evidence, classify, disruption, evidence_deadline, only_stopped
from qlora_operator.status.observation import AttemptJob, Pod, ReasonMessage
from qlora_operator.status.view import JobView
from qlora_operator.status.waiting import waiting_for

SETTLE_LOOK_SECONDS = 1.0
"""How often pods are looked at while a Job fails that only lost a peer: a deleted pod is soon gone, and its
termination message with it."""

SILENCE = timedelta(seconds=400)
"""How long a node may be silent under a running attempt. Kubernetes takes pods away after 300 s, which names the cause
better, unless they tolerate that."""

TAKE_OVER = timedelta(minutes=1)
"""How long Kueue may take to give a Workload to the next attempt's Job."""

PODS_READY_TIMEOUT = "PodsReadyTimeout"
"""Kueue's word for quota that it took back because not all pods were ready in time."""

_ANY_TIER = frozenset({Reason.VOLUME_NOT_READY, Reason.QUOTA_EXCEEDED, Reason.REFUSED})
"""What pods wait for whatever the tier of their nodes."""


# --- it ended by itself, or others ended it


def job_lost(view: JobView) -> AttemptEnd | None:
    """Its Job, which existed, is gone, or is another one of the same name."""
    attempt, job = view.open_attempt, view.confirmed_job
    if attempt is None or attempt.job_uid is None or (job is not None and job.uid == attempt.job_uid):
        return None
    message = f"another client deleted the Job of attempt {attempt.attempt}, or removed its labels"
    return AttemptEnd(Reason.JOB_DELETED, message, Budget.INFRASTRUCTURE)


def job_failing(view: JobView) -> AttemptEnd | NotYet | None:
    """Its Job fails, and its pods have had the time to tell why."""
    job = view.confirmed_job
    if job is None or job.failing is None:
        return None
    evidence = _evidence(view, job)
    deadline = evidence_deadline(evidence)
    if deadline is not None and view.now < deadline:
        return NotYet(min(deadline, view.after(SETTLE_LOOK_SECONDS)))
    return None if _was_stopped(view, job) else classify(evidence)


def _evidence(view: JobView, job: AttemptJob) -> Evidence:
    return Evidence(job, view.pods, view.lost_nodes, view.stage)


def _was_stopped(view: JobView, job: AttemptJob) -> bool:
    """Whether its Job fails only because its pods ended when it was suspended."""
    return (job.suspended or _is_held(view)) and only_stopped(classify(_evidence(view, job)))


def _is_held(view: JobView) -> bool:
    """Whether its queue's administrator held it when it was last looked at."""
    reserved = view.condition(ConditionType.QUOTA_RESERVED)
    return reserved is not None and reserved.reason == Reason.DEACTIVATED


def job_being_deleted(view: JobView) -> AttemptEnd | None:
    """Another client deletes its Job."""
    job = view.confirmed_job
    if job is None or job.failing is not None or not job.deleting:
        return None
    message = f"another client is deleting the Job {job.name}"
    return AttemptEnd(Reason.JOB_DELETED, message, Budget.INFRASTRUCTURE)


def job_suspended_again(view: JobView) -> AttemptEnd | None:
    """Its Job, which had been admitted, is suspended: by its queue, or by another client by mistake.

    One that its queue's administrator holds is left alone, so that they decide when it goes on; it goes on as another
    attempt, since pods of this one may still be writing. That its pods were stopped may have failed it meanwhile.
    """
    job, reserved = view.confirmed_job, view.condition(ConditionType.QUOTA_RESERVED)
    if job is None or job.deleting or _spec_changed(view) or not view.is_true(ConditionType.INITIALIZED):
        return None
    if job.failing is not None and not _was_stopped(view, job):
        return None
    held = _is_held(view)
    if not (job.suspended or held):
        return None
    seen_unsuspended = reserved is None and view.job.queue_name is None and view.job_was_seen
    ran = view.is_true(ConditionType.RUNNING) or seen_unsuspended
    admitted = held or view.is_true(ConditionType.QUOTA_RESERVED)
    if admitted or (ran and view.queue is not None):
        if job.suspended and view.deactivated:
            return None
        return _requeued(view.eviction, view.workload)
    if not ran:
        return None  # a queue has not admitted it yet, be it one that the user did not ask for
    message = f"another client suspended the Job {job.name}: suspend the QLoRAJob instead"
    return AttemptEnd(Reason.JOB_CHANGED, message, Budget.INFRASTRUCTURE)


def _requeued(eviction: ReasonMessage | None, workload: str | None) -> AttemptEnd:
    message = "the queue withdrew the quota that it had granted"
    if eviction is None:
        return AttemptEnd(Reason.REQUEUED, message, Budget.NONE, workload=workload)
    message = f"{message}: {eviction.message}"
    if eviction.reason == PODS_READY_TIMEOUT:
        return AttemptEnd(Reason.NOT_READY_IN_TIME, message, Budget.NONE)
    return AttemptEnd(Reason.REQUEUED, message, Budget.NONE, workload=workload)


def workload_lost(view: JobView) -> AttemptEnd | NotYet | None:
    """Its Job was to take over the Workload of an earlier attempt, and Kueue does not let it: the Job has other
    containers, since the spec or the settings have changed, or the Workload is gone."""
    job, attempt = _intact_job(view), view.open_attempt
    if job is None or attempt is None or not job.suspended or job.workload is None:
        return None
    started = parse_time(attempt.start) if attempt.start else view.now
    if view.now < started + TAKE_OVER:
        return NotYet(started + TAKE_OVER)
    if view.workload is not None:
        return None
    message = (
        f"the place in the queue is lost: the Workload {job.workload} is gone, or was made for other pods"
    )
    return AttemptEnd(Reason.REQUEUED, message, Budget.NONE)


def pods_of_an_earlier_attempt(view: JobView) -> AttemptEnd | None:
    """Its queue has let its Job in with the pod template of the attempt that the Workload was made for: Kueue restores
    that in a Job whose Workload was evicted, also in one that has taken it over since. The next attempt takes over a
    Workload that is let in, of which nothing is restored."""
    job = _intact_job(view)
    if job is None or job.suspended or job.template_attempt in (None, job.attempt):
        return None
    message = f"let in, with pods as the queue knew them from attempt {job.template_attempt}: another attempt follows"
    return AttemptEnd(Reason.REQUEUED, message, Budget.NONE, workload=view.workload)


def parallelism_changed(view: JobView) -> AttemptEnd | None:
    """Its queue has let in fewer pods than it was made for, as topology.minPods allows: its ranks count on all. Or
    another client gave its Job another number of pods.

    In a queue a Job may have more: those that the Workload was made for which it takes over.
    """
    job = _intact_job(view)
    if job is None or job.parallelism in (None, view.desired_pods) or _spec_changed(view):
        return None
    if job.suspended and job.workload is not None:
        return None
    least = view.spec.topology.min_pods
    if (
        view.queue is not None
        and view.stage == "train"
        and least is not None
        and least <= job.parallelism <= view.spec.topology.pods
    ):
        message = f"the queue lets in {job.parallelism} of {view.spec.topology.pods} pods, as topology.minPods allows"
        workload = view.workload
        return AttemptEnd(Reason.SHRUNK, message, Budget.NONE, placed=job.parallelism, workload=workload)
    message = f"another client set the parallelism of the Job {job.name} to {job.parallelism}"
    return AttemptEnd(Reason.JOB_CHANGED, message, Budget.INFRASTRUCTURE)


def pod_disrupted(view: JobView) -> AttemptEnd | None:
    """One of its pods is being taken away, and its Job does not know it yet."""
    if _intact_job(view) is None or not view.pods_are_worth_a_look:
        return None
    return disruption(view.pods)


def _intact_job(view: JobView) -> AttemptJob | None:
    """Its Job, unless that fails or is being deleted."""
    job = view.confirmed_job
    return None if job is None or job.failing is not None or job.deleting else job


def node_silent(view: JobView) -> AttemptEnd | NotYet | None:
    """A node of its pods has not answered for longer than Kubernetes itself waits before it takes pods away: they
    tolerate that, or nobody looks after the node."""
    if _intact_job(view) is None or not view.is_true(ConditionType.RUNNING) or not view.pods_are_worth_a_look:
        return None
    lost = [
        pod for pod in view.pods if not pod.finished and pod.unready_since and pod.node in view.lost_nodes
    ]
    if not lost:
        return None
    pod = min(lost, key=lambda pod: (pod.unready_since or view.now, pod.name))
    deadline = (pod.unready_since or view.now) + SILENCE
    if view.now < deadline:
        return NotYet(deadline)
    message = f"node {pod.node} of pod {pod.name} has not answered for {SILENCE.total_seconds():.0f} s"
    return AttemptEnd(Reason.NODE_LOST, message, Budget.INFRASTRUCTURE)


# --- the user wants it to end


def held(view: JobView) -> AttemptEnd | None:
    """The user suspends the job, or its window has closed."""
    if view.hold is None:
        return None
    return AttemptEnd(view.hold.reason, view.hold.why, Budget.NONE)


def spec_changed(view: JobView) -> AttemptEnd | None:
    """The job was suspended, changed and resumed before the operator saw it suspended."""
    if not _spec_changed(view):
        return None
    message = "spec.topology or spec.scheduling was changed while the job was briefly suspended"
    return AttemptEnd(Reason.SUSPENDED, message, Budget.NONE)


def _spec_changed(view: JobView) -> bool:
    """Whether its Job was made from another topology or scheduling than spec has now."""
    job = view.confirmed_job
    return job is not None and job.topology_hash not in (None, topology_hash(view.spec))


# --- others have a better use for the nodes


def half_placed(view: JobView) -> AttemptEnd | NotYet | None:
    """Only some of its pods have nodes, which another job may need that waits for the rest."""
    waits = _pods_without_nodes(view)
    if waits is None or view.open_attempt is None:
        return None
    job, placed, since = waits
    if not placed:
        return None
    # Two attempts that wait for each other's nodes must not release them at once.
    spread = 1 + policies.release_jitter(view.uid, view.open_attempt.attempt) / 2
    release_at = since + timedelta(seconds=view.spec.isa.step_down_seconds * spread)
    if view.now < release_at:
        return NotYet(release_at)
    why = waiting_for(view, job).message
    least, found = view.spec.topology.min_pods, len(placed)
    if least is not None and least <= found and view.stage == "train":
        message = (
            f"makes do with the {found}/{view.desired_pods} pods that have nodes, by topology.minPods: {why}"
        )
        return AttemptEnd(Reason.SHRUNK, message, Budget.NONE, placed=found)
    message = (
        f"releases {len(placed)}/{view.desired_pods} pods, because no node has room for the others: {why}"
    )
    return AttemptEnd(Reason.RELEASED, message, Budget.NONE)


def unschedulable_tier(view: JobView) -> AttemptEnd | NotYet | None:
    """None of its pods found a node of its tier, and another tier has other nodes."""
    waits = _pods_without_nodes(view)
    if waits is None:
        return None
    job, placed, since = waits
    seconds = view.spec.isa.step_down_seconds
    step_down_at = since + timedelta(seconds=seconds)
    if placed:
        return None
    if view.now < step_down_at:
        return NotYet(step_down_at)
    why = waiting_for(view, job)
    if why.reason in _ANY_TIER or view.wider_tier is None:
        return None
    message = f"no pod was scheduled within isa.stepDownSeconds: {seconds}: {why.message}"
    return AttemptEnd(Reason.STEPPED_DOWN, message, Budget.NONE)


def _pods_without_nodes(view: JobView) -> tuple[AttemptJob, list[Pod], datetime] | None:
    """Its Job, the pods that have nodes, and since when the others wait; None if they do not."""
    attempt, job = view.open_attempt, view.confirmed_job
    if attempt is None or job is None or job.suspended or view.is_true(ConditionType.RUNNING):
        return None
    if job.managed_by is not None or job.ready >= view.desired_pods or not view.pods_are_worth_a_look:
        return None
    placed = [pod for pod in view.pods if pod.node is not None]
    if len(placed) >= view.desired_pods or any(pod.gated for pod in view.pods):
        return None
    started = parse_time(attempt.start) if attempt.start else view.now
    return job, placed, job.admitted_at or started


END_CHECKS: tuple[EndCheck, ...] = (
    job_lost,  # what became of the attempt is unknown without its Job
    job_failing,  # a failure that names its cause, before anything that could hide it
    job_being_deleted,  # as good as gone
    job_suspended_again,  # its pods are being deleted
    workload_lost,  # it would wait for ever
    pods_of_an_earlier_attempt,  # they would leave the workspace to a later one, and end
    parallelism_changed,  # its ranks would wait for pods that do not come, or for others' quota
    pod_disrupted,  # its ranks are about to lose a peer
    node_silent,  # they have lost one, and nobody takes it away
    held,  # at no cost, so after what costs a restart
    spec_changed,  # likewise: the next attempt is made from the new spec
    *JOB_DEADLINES,
    progress_deadline_exceeded,  # it runs, and hangs
    half_placed,  # it does not run, and holds nodes
    unschedulable_tier,  # it does not run, and may elsewhere
)
"""Why an open attempt is over, or must be; the first that applies."""
