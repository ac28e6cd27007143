"""What to do about a job: (job, observation, now) -> decision. Pure.

The status says what is so before anything is done about it: an attempt is in the status before its Job is
created, and the end of one, with its price, before the next begins. Whoever reads the status and the cluster
can therefore continue from any point at which the operator was killed.
"""

from datetime import datetime

from qlora_contract.units import parse_time, rfc3339
from qlora_operator.api.names import CONTROLLER, ConditionType, Reason
from qlora_operator.api.status import Condition, QLoRAJobStatus, Restarts
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.status import (
    completion,
    conditions,
    cost,
    holds,
    notices,
    policies,
    progress_status,
    running,
    stages,
    starting,
    teardown,
)
from qlora_operator.status.actions import Decision, DeleteJob, DropWorkload
from qlora_operator.status.builder import StatusBuilder
from qlora_operator.status.checks import AttemptEnd, Budget, NotYet, first_end, first_obstacle
from qlora_operator.status.columns import columns
from qlora_operator.status.deadlines import JOB_DEADLINES
from qlora_operator.status.ending import END_CHECKS
from qlora_operator.status.failure import exit_codes
from qlora_operator.status.observation import Observation
from qlora_operator.status.restarts import charge, placement_after
from qlora_operator.status.starting import START_CHECKS
from qlora_operator.status.view import JobView, ReadRequired

REFUSED_LOOK_SECONDS = 120.0
"""How often at least children are tried again that the API server refuses, for a quota say."""
FIRST_RETRY_SECONDS = 0.5
"""When children that could not be created are first tried again."""


def decide(job: QLoRAJob, seen: Observation, now: datetime) -> Decision:
    """What the job's status is, and what is to be done once it is saved; or what has to be read first."""
    builder = StatusBuilder(job, seen, now)
    if managed_elsewhere(job):
        return builder.build()
    try:
        if not builder.view.finished:
            if builder.view.condition(ConditionType.RUNNING) is None:
                builder.set_false(ConditionType.RUNNING, Reason.STARTING, "no attempt has started")
            _suspend_or_resume(builder)
        if builder.view.open_attempt is not None:
            _reconcile_attempt(builder)
        if not (builder.view.finished or builder.view.hold is not None):
            _start_next_attempt(builder)
        _leave_the_queue(builder)
        builder.act(*teardown.delete_leftover_jobs(builder.view))
        # A finished job is deleted after its time to live.
        expiry = policies.expiry(job.spec, builder.status) if builder.view.finished else None
        if expiry is not None and now >= expiry:
            builder.act(DeleteJob())
        elif expiry is not None:
            builder.requeue_at(expiry)
        if DeleteJob() not in builder.actions:
            builder.act(*teardown.delete_network(builder.view))
        _summarize(builder)
    except ReadRequired as required:
        return Decision(job.status or QLoRAJobStatus(), reads=required.reads)
    return builder.build()


def managed_elsewhere(job: QLoRAJob) -> bool:
    """Whether another controller has the job, or it is being deleted."""
    return job.spec.managed_by not in (None, CONTROLLER) or job.metadata.deletion_timestamp is not None


def _suspend_or_resume(builder: StatusBuilder) -> None:
    """The condition Suspended, and the clock of activeDeadlineSeconds."""
    view = builder.view
    hold, before = view.hold, view.condition(ConditionType.SUSPENDED)
    held_by = before.reason if before is not None and before.status == "True" else None
    if hold is not None and before is not None and (held_by, before.message) == (hold.reason, hold.why):
        pass  # it says so
    elif hold is not None:
        if held_by == Reason.SUSPENDED != hold.reason:  # the user resumes it, outside its windows
            builder.set(start_time=None)
        builder.set_true(ConditionType.SUSPENDED, hold.reason, hold.why)
        builder.set(message=hold.message)
        if held_by != hold.reason:
            builder.event("Normal", hold.reason, hold.message)
    elif held_by is not None:
        assert before is not None
        reason, why = holds.resumed(view.spec, held_by)
        builder.set_false(ConditionType.SUSPENDED, reason, why)
        builder.set(start_time=_start_time_after(view, before), message="resumed")
        builder.event("Normal", reason, "resumed")
    # In a queue the clock starts when the queue admits the job.
    queued = view.job.queue_name is not None
    if builder.status.start_time is None and hold is None and not queued:
        builder.set(start_time=rfc3339(view.now))


def _start_time_after(view: JobView, suspended: Condition) -> str | None:
    """From when activeDeadlineSeconds counts in a job that is resumed: anew, but outside its windows the clock only
    stood still. In a queue it did so anyway, and is set when the queue admits the job."""
    start = view.status.start_time
    if start is None or suspended.reason != Reason.OUTSIDE_WINDOWS:
        return None
    if conditions.is_false(view.status.conditions, ConditionType.QUOTA_RESERVED):
        return start
    return rfc3339(parse_time(start) + (view.now - parse_time(suspended.last_transition_time)))


# --- the open attempt


def _reconcile_attempt(builder: StatusBuilder) -> None:
    """Whether it is over, and if not, how it goes."""
    view = builder.view
    if view.open_attempt is not None and view.open_attempt.reason is None:
        job, found = view.attempt_job, None
        if job is not None and completion.is_done(view, job):
            # The attempt did what it was for, if its report says so.
            result = completion.stage_result(view)
            builder.set(**result.fields)
            if result.data:
                builder.set_true(ConditionType.DATA_CHECKED, Reason.DATA_SAMPLED, result.data)
            if result.completes:
                end = result.end
                builder.set_attempt(reason=end.reason, message=end.message, exit_codes=list(end.exit_codes))
                builder.finish(ConditionType.COMPLETE, Reason.SUCCEEDED, result.completes)
            else:
                _end_attempt(builder, result.end)
        elif isinstance(found := first_end(view, END_CHECKS), AttemptEnd):
            _end_attempt(builder, found)
        elif job is None:
            _create_children(builder)
        else:
            running.follow(builder, job)
        if isinstance(found, NotYet):
            builder.requeue_at(found.at)
    view = builder.view
    if view.open_attempt is not None and view.open_attempt.reason is not None:
        _tear_down(builder)


def _end_attempt(builder: StatusBuilder, end: AttemptEnd) -> None:
    """The attempt gets its reason, and the job pays. This happens once per attempt."""
    view = builder.view
    builder.set_attempt(
        reason=end.reason,
        message=end.message,
        exit_codes=list(end.exit_codes),
        checkpoint_step=progress_status.checkpoint_step(view.status.checkpoint, view.pods),
        node=end.node,
        placed=end.placed,
        # Somebody who deletes a Job leaves a Workload behind that it had taken over, since that is the job's, too.
        workload=end.workload or (view.taken_over if view.attempt_job is None else None),
        step=progress_status.step_of(view.status.progress, view.open_attempt),
    )
    builder.set(placement=placement_after(view, end))
    if view.finished:
        return
    if end.reason == Reason.INVALID_DATA:
        builder.set_false(ConditionType.DATA_CHECKED, Reason.INVALID_DATA, end.message)
    if end.budget == Budget.PERMANENT:
        builder.finish(ConditionType.FAILED, end.reason, end.message)
        return
    if end.budget == Budget.NONE:
        builder.set_false(ConditionType.RUNNING, end.reason, end.message)
        if end.reason not in policies.HELD:
            builder.event("Normal", end.reason, end.message)
        return
    progressed = policies.made_progress(builder.status.attempts)
    charged = charge(view.spec, view.restarts, end, progressed=progressed)
    if not isinstance(charged, Restarts):
        builder.finish(ConditionType.FAILED, Reason(charged.reason), charged.message)
        return
    builder.set(restarts=charged, message=end.message)
    builder.set_false(ConditionType.RUNNING, end.reason, end.message)
    builder.set_true(ConditionType.RESTARTING, end.reason, end.message)
    builder.event("Warning", end.reason, end.message)


def _create_children(builder: StatusBuilder) -> None:
    """The attempt is in the status, and its Job does not exist yet."""
    view = builder.view
    if error := view.seen.create_error:
        builder.set_waiting(ConditionType.INITIALIZED, Reason(error.reason), error.message, event=True)
    if blocked := starting.pods_remain(view):
        builder.block(blocked)
    else:
        builder.act(starting.create_children(view))
    # After as many seconds as the attempt is old, so twice as long each time: what is in the way of a Job that was
    # just created is often one of the same name that is on its way out.
    started = view.open_attempt.start if view.open_attempt else None
    age = (view.now - parse_time(started)).total_seconds() if started else policies.LOOK_SECONDS
    most = REFUSED_LOOK_SECONDS if view.seen.create_error else policies.LOOK_SECONDS
    builder.requeue_at(view.after(min(max(age, FIRST_RETRY_SECONDS), most)))


def _tear_down(builder: StatusBuilder) -> None:
    """The attempt has a reason, and ends with its last pod."""
    view = builder.view
    state = teardown.tear_down(view)
    builder.act(*state.actions)
    if state.stuck is not None:
        builder.set_false(ConditionType.RUNNING, Reason(state.stuck.reason), state.stuck.message)
        builder.set(message=state.stuck.message)
    if state.done and view.open_attempt is not None:
        codes = exit_codes(view.pods, view.open_attempt.exit_codes)
        spent = cost.with_attempt(
            view.status.cost,
            view.open_attempt,
            view.topology,
            view.seen.price,
            view.now,
        )
        builder.set(cost=spent)
        builder.set_attempt(end=rfc3339(view.now), exit_codes=list(codes))
    else:
        builder.requeue_at(view.after(policies.LOOK_SECONDS))


# --- the next attempt


def _start_next_attempt(builder: StatusBuilder) -> None:
    """Between attempts: the next one, unless a deadline has passed, or something is in the way."""
    view = builder.view
    if view.open_attempt is not None and view.open_attempt.reason is None:
        return
    over = first_end(view, JOB_DEADLINES)
    if isinstance(over, AttemptEnd):
        builder.finish(ConditionType.FAILED, over.reason, over.message)
        return
    if over is not None:
        builder.requeue_at(over.at)
    if view.open_attempt is not None:
        return
    try:
        blocked = first_obstacle(view, START_CHECKS)
    except ReadRequired:
        if view.end_is_saved:
            raise
        builder.requeue_at(view.now)  # what is decided is saved before more is read
        return
    if blocked is not None:
        builder.block(blocked)
        if blocked.reason not in (None, Reason.PODS_REMAIN):
            _leave_the_queue(builder, blocked=True)
    else:
        _start(builder)


def _leave_the_queue(builder: StatusBuilder, *, blocked: bool = False) -> None:
    """A Workload that no attempt takes over soon must not hold quota: the job is over or suspended, or has no nodes."""
    view, last = builder.view, builder.view.last_attempt
    if last is None or last.end is None or last.workload is None:
        return
    if not (blocked or view.finished or view.hold is not None):
        return
    if view.workload is None:
        builder.set_attempt(workload=None)
    else:
        builder.act(DropWorkload(last.workload))
        builder.requeue_at(view.after(policies.LOOK_SECONDS))


def _start(builder: StatusBuilder) -> None:
    """Another attempt is in the status; its children are created once that is saved."""
    view = builder.view
    attempt, tier, queue = (
        starting.next_attempt(view),
        starting.next_tier(view),
        view.job.queue_name,
    )
    builder.add_attempt(attempt)
    placement = view.placement.model_copy(update={"isa": tier, "world_size": builder.view.world_size})
    if attempt.stage == "train":
        placement = placement.model_copy(update={"nodes": []})
        builder.set(ranks=[])
    builder.set(placement=placement, provenance=starting.fixed_provenance(view))
    message = f"attempt {attempt.attempt} {stages.describe(view.spec, attempt.stage)} on {tier}"
    if attempt.pods is not None:
        message = f"{message}, with {attempt.pods} of {view.spec.topology.pods} pods"
    builder.set_true(ConditionType.INITIALIZED, Reason.STARTED, message)
    builder.set_false(ConditionType.RUNNING, Reason.STARTING, message)
    builder.set(message=message)
    if queue is not None:
        running.wait_in_queue(builder, queue)
    else:
        builder.drop_condition(ConditionType.QUOTA_RESERVED)
    builder.act(starting.create_children(builder.view))
    builder.requeue_at(view.now + view.seen.startup_grace)


# --- the rest


def _summarize(builder: StatusBuilder) -> None:
    """What follows from the rest of the status."""
    view = builder.view
    job, pods = view.attempt_job, view.topology.pods
    trains = view.open_attempt is not None and view.stage == "train"
    world_size = view.world_size or view.placement.world_size
    ready = job.ready * (world_size or 0) // pods if job is not None and trains else 0
    schedule, window, shown = view.spec.schedule, None, None
    if schedule is not None and not view.finished:
        window = holds.window_status(schedule, view.now)
    if schedule is not None and window is not None:
        shown = holds.column(schedule, window)
        if look_at := holds.look_at(window, view.now):
            builder.requeue_at(look_at)
    if view.finished and (adapter := view.status.adapter) is not None:
        builder.set(adapter=completion.exported_since(view.job, adapter))
    builder.set(
        observed_generation=view.job.metadata.generation,
        phase=conditions.phase(view.status.conditions),
        restarts=view.restarts,
        window=window,
        columns=columns(min(ready, world_size or 0), world_size, view.status.progress, view.restarts, shown),
        notified=notices.notified(view.status, sorted(view.seen.delivered)),
    )
