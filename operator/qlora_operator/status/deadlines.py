"""The deadlines that a user may set, as checks of a job with or without an open attempt."""

from datetime import timedelta

from qlora_contract.units import parse_time
from qlora_operator.api.names import ConditionType, Reason
from qlora_operator.api.status import Attempt, Progress
from qlora_operator.status import policies
from qlora_operator.status.checks import AttemptEnd, Budget, EndCheck, NotYet
from qlora_operator.status.view import JobView
from qlora_operator.status.waiting import waiting_for


def active_deadline_exceeded(view: JobView) -> AttemptEnd | NotYet | None:
    """The job has been active for longer than activeDeadlineSeconds."""
    deadline = policies.active_deadline(view.spec, view.status)
    if deadline is None:
        return None
    if view.now < deadline:
        return NotYet(deadline)
    message = f"the job was active for longer than activeDeadlineSeconds: {view.spec.active_deadline_seconds}"
    return AttemptEnd(Reason.DEADLINE_EXCEEDED, message, Budget.PERMANENT)


def pending_deadline_exceeded(view: JobView) -> AttemptEnd | NotYet | None:
    """Not all ranks ran within pendingDeadlineSeconds. The message says what they waited for."""
    deadline = policies.pending_deadline(view.spec, view.status, view.now)
    if deadline is None:
        return None
    if view.now < deadline:
        return NotYet(deadline)
    message = f"not all ranks ran within pendingDeadlineSeconds: {view.spec.pending_deadline_seconds}"
    obstacle = _obstacle(view)
    if obstacle:
        message = f"{message}: {obstacle}"
    return AttemptEnd(Reason.PENDING_DEADLINE_EXCEEDED, message, Budget.PERMANENT)


def _obstacle(view: JobView) -> str | None:
    """What keeps the ranks from running: as it is now, else as it was when the last attempt gave up."""
    job, attempts = view.attempt_job, view.status.attempts
    if view.open_attempt is None or job is None:
        return view.status.message
    if not job.suspended:
        waiting = waiting_for(view, job)
        if waiting.reason != Reason.STARTING:
            return waiting.message
    before = attempts[-2] if len(attempts) > 1 else None
    return before.message if before and before.reason in policies.UNSCHEDULED else view.status.message


def progress_deadline_exceeded(view: JobView) -> AttemptEnd | NotYet | None:
    """Rank 0 got nothing done for progressDeadlineSeconds: no step, and nothing that it counts besides.

    Only of a rank 0 that has reported in this attempt: silence alone may be the network's, and lost ranks are
    noticed by their peers.
    """
    job, running = view.attempt_job, view.condition(ConditionType.RUNNING)
    attempt, progress = view.open_attempt, view.status.progress
    if job is None or job.suspended or view.stage != "train" or running is None or running.status != "True":
        return None
    if progress is None or progress.step_time is None or progress.updated_time is None:
        return None
    if attempt is None or attempt.start is None or _is_of_before(progress, attempt):
        return None
    seconds = view.spec.progress_deadline_seconds
    # Without an advance the status is an earlier operator's.
    advanced = progress.advance_time or progress.step_time
    since = max(parse_time(advanced), parse_time(running.last_transition_time))
    deadline = since + timedelta(seconds=seconds)
    if view.now < deadline:
        return NotYet(deadline)
    what = "no step was completed" if progress.advances is None else "nothing advanced"
    message = f"{what} for progressDeadlineSeconds: {seconds}, since step {progress.step}"
    return AttemptEnd(Reason.PROGRESS_DEADLINE_EXCEEDED, message, Budget.USER)


def _is_of_before(progress: Progress, attempt: Attempt) -> bool:
    """Whether an earlier attempt reported this. Not by the times, which are of two machines' clocks, unless an operator
    of before has written it, which did not note the attempt."""
    if progress.attempt is not None:
        return progress.attempt != attempt.attempt
    assert progress.updated_time is not None
    assert attempt.start is not None
    return parse_time(progress.updated_time) < parse_time(attempt.start)


JOB_DEADLINES: tuple[EndCheck, ...] = (
    active_deadline_exceeded,  # counts all attempts and what is between them, but no time in a queue
    pending_deadline_exceeded,  # counts from the moment since when not all ranks run
)
"""Deadlines of the job as a whole, which may also pass between two attempts."""
