"""How an attempt goes whose Job exists: its pods start, and its ranks run."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from qlora_contract.units import parse_time, rfc3339
from qlora_operator.api.names import ConditionType, Reason
from qlora_operator.status import conditions, cost, policies, progress_status, stages
from qlora_operator.status.actions import RestoreNetwork, TellCheckpoint
from qlora_operator.status.builder import StatusBuilder
from qlora_operator.status.observation import AttemptJob, Pod
from qlora_operator.status.view import JobView
from qlora_operator.status.waiting import pods_ready, waiting_for

QUIET = timedelta(seconds=20)
"""Minimum time before the status says that pods are still starting."""

HELD_LOOK_SECONDS = 30.0
"""How often it is looked whether a job that its queue's administrator has stopped may go on: nothing tells of that."""

QUEUE_LOOK_SECONDS = 300.0
"""How often at least a queue is asked why it has not admitted a job."""

CHECKPOINT_TOLD = timedelta(minutes=5)
"""Minimum time between two checkpoints that an attempt's Job is annotated with."""

_REASONS = {
    "Starting": Reason.LOADING,
    "Fetching": Reason.FETCHING,
    "Uploading": Reason.UPLOADING,
    "Training": Reason.TRAINING,
    "Evaluating": Reason.EVALUATING,
    "Publishing": Reason.PUBLISHING,
    "Done": Reason.PUBLISHING,
}
"""The reason of the condition Running, by the stage that rank 0 reports."""

_MESSAGES = {
    Reason.LOADING: "every rank is up; the model is being loaded",
    Reason.TRAINING: "training",
    Reason.EVALUATING: "evaluating",
    Reason.PUBLISHING: "the adapter is being verified and stored",
    Reason.EXPORTING: "the adapter is being made into what output.formats asks for",
    Reason.FETCHING: "the remote sources are being fetched",
    Reason.UPLOADING: "the adapter is being sent to output.destination",
}


def follow(builder: StatusBuilder, job: AttemptJob) -> None:
    """What the Job of the open attempt does, in the status."""
    view = builder.view
    if _nothing_new(view, job):
        builder.requeue_at(_next_look(view))
        return
    builder.set_attempt(job_uid=job.uid)
    builder.set_true(ConditionType.INITIALIZED, Reason.STARTED, f"Job {job.name} exists")
    if view.seen.children_missing:
        builder.act(RestoreNetwork())
    if job.managed_by is not None:
        wait_in_queue(builder, view.queue, _elsewhere(job))
        return
    if job.suspended:
        if view.is_true(ConditionType.QUOTA_RESERVED) or _is_held(view):
            _hold(builder)
        else:
            _wait_longer(builder)
        return
    if view.queue is not None or view.condition(ConditionType.QUOTA_RESERVED) is not None:
        message = f"the queue {view.queue} has admitted the job" if view.queue else "the job is admitted"
        builder.set(start_time=_start_time(view, job))
        builder.set_true(ConditionType.QUOTA_RESERVED, Reason.ADMITTED, message)
    if _is_up(view, job):
        _run(builder, job)
        return
    waiting = waiting_for(view, job) if view.pods_are_worth_a_look else pods_ready(view, job)
    reason = Reason(waiting.reason)
    builder.set_waiting(ConditionType.RUNNING, reason, waiting.message, event=reason != Reason.STARTING)
    builder.requeue_at(_next_look(view))


def _wait_longer(builder: StatusBuilder) -> None:
    """The queue has not admitted the job for a while, and may have said why: it does not exist, or has less quota than
    the job wants. The longer the job waits the more rarely Kueue is asked, since most jobs in a queue just wait."""
    view = builder.view
    started = view.open_attempt.start if view.open_attempt else None
    waited = (view.now - parse_time(started)).total_seconds() if started else 0.0
    asked = waited >= policies.LOOK_SECONDS
    wait_in_queue(builder, view.queue, view.queue_says if asked else "")
    builder.requeue_at(view.after(min(max(waited, policies.LOOK_SECONDS), QUEUE_LOOK_SECONDS)))


def _elsewhere(job: AttemptJob) -> str:
    """Of a queue whose Jobs MultiKueue runs in other clusters, where nothing else of the job is: pods of this one never
    come."""
    return (
        f"it hands Jobs alone to other clusters (spec.managedBy of {job.name} is {job.managed_by}), where they lack "
        "the rest of the job: name a queue of this cluster"
    )


def wait_in_queue(builder: StatusBuilder, queue: str | None, why: str = "") -> None:
    """The queue has not admitted the job."""
    message = f"waits in the queue {queue}"
    if queue is None:
        message = "waits to be admitted: its Job was suspended when it was created, as queues do it"
    if why:
        message = f"{message}: {why}"
    builder.set_waiting(ConditionType.QUOTA_RESERVED, Reason.QUEUED, message, event=False)


def _hold(builder: StatusBuilder) -> None:
    """The queue's administrator has stopped the job, which goes on only when they say so."""
    view = builder.view
    message = f"held by its queue, until the Workload of its Job is activated again: {view.deactivated}"
    builder.set_waiting(ConditionType.QUOTA_RESERVED, Reason.DEACTIVATED, message, event=True)
    if view.is_true(ConditionType.RUNNING):
        builder.set_false(ConditionType.RUNNING, Reason.DEACTIVATED, message)
    builder.requeue_at(view.after(HELD_LOOK_SECONDS))


def _is_held(view: JobView) -> bool:
    reserved = view.condition(ConditionType.QUOTA_RESERVED)
    return reserved is not None and reserved.reason == Reason.DEACTIVATED


def _run(builder: StatusBuilder, job: AttemptJob) -> None:
    """Every rank is up. Nothing more is due then: rank 0's reports and the Job's changes come by themselves."""
    view = builder.view
    if view.open_attempt is not None and view.open_attempt.running is None:
        builder.set_attempt(running=_up_since(view))
    report = view.seen.progress
    pods = view.pods if view.pods_are_worth_a_look else []
    reason = _REASONS[report.stage] if report and view.stage == "train" else stages.RUNNING[view.stage]
    unready = (pod for pod in pods if not pod.finished and pod.unready_since is not None)
    lost = next((pod for pod in unready if pod.node in view.lost_nodes), None)
    if lost is not None:
        reason = Reason.NODE_LOST
        message = (
            f"node {lost.node} of pod {lost.name} does not answer: unless it is back soon, the job restarts when "
            "its pod is certain to be dead"
        )
        said = view.condition(ConditionType.RUNNING)
        if said is None or said.reason != Reason.NODE_LOST:
            builder.event("Warning", reason, message)
        builder.set_true(ConditionType.RUNNING, reason, message)
        builder.set(message=message)
    elif report or not view.is_true(ConditionType.RUNNING):
        message = _MESSAGES[reason] + stages.bytes_transferred(report)
        builder.set_true(ConditionType.RUNNING, reason, message)
        builder.set(message=message)
    if view.is_true(ConditionType.RESTARTING):
        builder.set_false(ConditionType.RESTARTING, Reason.STARTED, "every rank is up again")
    if view.stage == "train":
        builder.set(**_facts(view, pods))
        _count_lost_steps(builder)
        if report and report.data:
            builder.set_true(ConditionType.DATA_CHECKED, Reason.DATA_READ, report.data)
        if time := _checkpoint_to_tell(builder.view, job):
            builder.act(TellCheckpoint(job.name, job.uid, time))
    if job.ready < view.desired_pods:
        builder.requeue_at(view.after(policies.LOOK_SECONDS))


def _count_lost_steps(builder: StatusBuilder) -> None:
    """Once an attempt: when it says which step it goes on from."""
    status, report = builder.status, builder.view.seen.progress
    if report is not None and report.resumed_step is not None and status.attempts[-1].resumed_step is None:
        builder.set(cost=cost.with_lost_steps(status.cost, status.attempts, report.resumed_step))
        builder.set_attempt(resumed_step=report.resumed_step)


def _checkpoint_to_tell(view: JobView, job: AttemptJob) -> str | None:
    """When the newest checkpoint was made, if the Job's annotation is older by CHECKPOINT_TOLD: no more often than that
    is it written, and by no more is it wrong."""
    time = progress_status.checkpoint_time(view.status.checkpoint, view.now)
    if time is None or job.deleting:
        return None
    before = job.checkpoint_time
    return time if before is None or parse_time(time) - before >= CHECKPOINT_TOLD else None


def _facts(view: JobView, pods: Sequence[Pod]) -> dict[str, Any]:
    """Fields of the status that the pods, if they were read, and rank 0, if it has reported, tell."""
    status, report, per_pod = view.status, view.seen.progress, view.spec.topology.ranks_per_pod
    fields: dict[str, Any] = {}
    ranks, placement = status.ranks, view.placement
    if pods:
        ranks = progress_status.ranks(ranks, pods, per_pod)
        placement = placement.model_copy(update={"nodes": progress_status.nodes(pods)})
        digest = next((pod.image_digest for pod in pods if pod.index == 0), None)
        if digest and status.provenance:
            fields["provenance"] = status.provenance.model_copy(update={"image_digest": digest})
    if report:
        ranks = progress_status.with_facts(ranks, report, pods if per_pod == "auto" else ())
        fields["progress"] = progress_status.progress(status.progress, report, view.now)
        fields["checkpoint"] = progress_status.checkpoint(report) or status.checkpoint
        if report.step > 0 and placement.dtype is None:
            placement = placement.model_copy(update={"dtype": report.compute_dtype})
        if report.ranks and per_pod == "auto":
            placement = placement.model_copy(update={"world_size": len(report.ranks)})
    return {**fields, "ranks": ranks, "placement": placement}


def _up_since(view: JobView) -> str:
    """Since when all ranks run; an earlier release kept that in the condition alone."""
    running = view.condition(ConditionType.RUNNING)
    if running is not None and running.status == "True":
        return running.last_transition_time
    return rfc3339(view.now)


def _is_up(view: JobView, job: AttemptJob) -> bool:
    """Whether all ranks run, or ran a moment ago: a pod that is not ready for a moment ends nothing."""
    return view.is_true(ConditionType.RUNNING) or job.ready >= view.desired_pods


def _nothing_new(view: JobView, job: AttemptJob) -> bool:
    """Whether the status as it was when the attempt began still says all there is to say: its pods have not been
    read, or merely start. Most attempts are up before that changes, and each is spared a write."""
    if _is_up(view, job) or not view.is_true(ConditionType.INITIALIZED):
        return False
    if job.suspended or view.seen.children_missing:
        return False
    if view.queue is not None or view.condition(ConditionType.QUOTA_RESERVED) is not None:
        return False
    if not view.pods_are_worth_a_look:
        return True
    started = view.open_attempt.start if view.open_attempt else None
    if started is None or view.now >= parse_time(started) + max(QUIET, 2 * view.seen.startup_grace):
        return False
    return waiting_for(view, job).reason == Reason.STARTING


def _next_look(view: JobView) -> datetime:
    """When pods that start are looked at: soon, the first time, since what keeps them from starting shows within
    seconds."""
    grace = view.seen.startup_grace
    started = view.open_attempt.start if view.open_attempt else None
    if started is not None and view.now < parse_time(started) + grace:
        return parse_time(started) + grace
    return view.after(max(policies.LOOK_SECONDS, grace.total_seconds()))


def _start_time(view: JobView, job: AttemptJob) -> str:
    """When the clock of activeDeadlineSeconds started, of a job that its queue has admitted: it stands still in the
    queue."""
    admitted = job.admitted_at or view.now
    if view.status.start_time is None:
        return rfc3339(admitted)
    reserved = conditions.find(view.status.conditions, ConditionType.QUOTA_RESERVED)
    if reserved is None or reserved.status != "False":
        return view.status.start_time
    queued = max(admitted - parse_time(reserved.last_transition_time), timedelta())
    return rfc3339(parse_time(view.status.start_time) + queued)
