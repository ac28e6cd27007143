"""The attempt that is open: has it ended, and if not, how does it go?"""

from dataclasses import replace
from datetime import datetime, timedelta

from qlora_contract.run import Fetched
from qlora_operator.api.names import ConditionType, Reason
from qlora_operator.api.times import parse, stamp
from qlora_operator.api.types import (
    NODES_SHOWN,
    AdapterStatus,
    Placement,
    Progress,
    Provenance,
    held_fields,
)
from qlora_operator.status import conditions, live, policies, stages
from qlora_operator.status.cause import (
    RANKS_NEED,
    TRANSFERS_NEED,
    Budget,
    Cause,
    below_tier,
    classify,
    disrupted,
    exit_codes,
    settled_at,
)
from qlora_operator.status.draft import DeleteGang, DeletePod, Draft, RestoreNetwork, StartAttempt
from qlora_operator.status.observation import Gang, Said
from qlora_operator.status.pending import waiting
from qlora_operator.status.stuck import remaining

LOOK_SECONDS = 10.0
"""How often pods are looked at while an attempt starts or ends."""
FIRST_RETRY_SECONDS = 0.5
"""When the children that could not be created are tried again."""
SETTLE_LOOK_SECONDS = 1.0
"""How often, while a Job ends that only lost a peer: a deleted pod is soon gone, and what it had to tell, too."""

_STAGES = {
    "Starting": Reason.LOADING,
    "Fetching": Reason.FETCHING,
    "Uploading": Reason.UPLOADING,
    "Training": Reason.TRAINING,
    "Evaluating": Reason.EVALUATING,
    "Publishing": Reason.PUBLISHING,
    "Done": Reason.PUBLISHING,
}

_RUNNING_MESSAGES = {
    Reason.LOADING: "every rank is up; the model is being loaded",
    Reason.TRAINING: "training",
    Reason.EVALUATING: "evaluating",
    Reason.PUBLISHING: "the adapter is being verified and stored",
    Reason.FETCHING: "the remote sources are being fetched",
    Reason.UPLOADING: "the adapter is being sent to output.destination",
}

_LOST_WORDS = "the transfer ended well, but left no report of all that it did; it is done again"

QUIET = timedelta(seconds=20)
"""For how long at least nothing is said of pods that merely start."""

_TIERS_DO_NOT_MATTER = frozenset({Reason.VOLUME_NOT_READY, Reason.QUOTA_EXCEEDED, Reason.REFUSED})
"""What pods wait for on the nodes of any tier."""


def attend(draft: Draft) -> None:
    """See to the open attempt."""
    assert draft.open is not None
    gang = draft.gang
    if draft.open.reason is None:
        if gang is not None and gang.complete:
            _succeed(draft)
        elif cause := _end(draft, gang):
            end(draft, cause)
        elif gang is None:
            _create(draft)
        else:
            _follow(draft, gang)
    if draft.open.reason is not None:
        _wind_up(draft, draft.gang)


# --- ends


def _end(draft: Draft, gang: Gang | None) -> Cause | None:
    """Why the attempt is over, or must be; None when it goes on."""
    return _own_end(draft, gang) or _our_end(draft, gang)


def _own_end(draft: Draft, gang: Gang | None) -> Cause | None:
    """An end that came by itself."""
    assert draft.open is not None
    known = draft.open.job_uid
    if known is not None and (gang is None or gang.uid != known):
        message = f"the Job of attempt {draft.open.attempt} was deleted, or lost its labels, by somebody else's doing"
        return Cause(Reason.JOB_DELETED, message, Budget.INFRASTRUCTURE)
    if gang is None:
        return None
    if gang.failing is not None:
        return _failure(draft, gang)
    if gang.deleting:
        message = f"the Job {gang.name} is being deleted by somebody else"
        return Cause(Reason.JOB_DELETED, message, Budget.INFRASTRUCTURE)
    if not _held_fields_changed(draft, gang) and (cause := _meddled(draft, gang)):
        return cause
    return disrupted(draft.pods)


def _meddled(draft: Draft, gang: Gang) -> Cause | None:
    """What somebody else has made of the Job."""
    if gang.suspended and draft.holds(ConditionType.INITIALIZED) and _was_admitted(draft):
        return _suspended(draft, gang)
    if gang.parallelism not in (None, draft.wanted):
        message = f"the parallelism of the Job {gang.name} was set to {gang.parallelism} by somebody else"
        return Cause(Reason.JOB_CHANGED, message, Budget.INFRASTRUCTURE)
    return None


def _suspended(draft: Draft, gang: Gang) -> Cause:
    """Somebody holds a Job that had been let go."""
    if draft.job.spec.scheduling.queue_name is None:
        message = f"the Job {gang.name} was suspended by somebody else: suspend the QLoRAJob instead"
        return Cause(Reason.JOB_CHANGED, message, Budget.INFRASTRUCTURE)
    message = "the queue took back the quota that it had given"
    return Cause(Reason.PREEMPTED, message, Budget.INFRASTRUCTURE)


def _failure(draft: Draft, gang: Gang) -> Cause | None:
    """Why the Job fails; None until somebody has looked at its pods, and they have had time to tell."""
    if draft.seen.pods is None:
        return None
    settled = settled_at(gang, draft.pods, draft.seen.lost_nodes)
    if settled is not None and not _passed(draft, settled):
        draft.look_in(SETTLE_LOOK_SECONDS)
        return None
    cause = classify(gang, draft.pods, draft.seen.lost_nodes)
    if draft.stage == "train":
        return cause
    return replace(cause, message=cause.message.replace(RANKS_NEED, TRANSFERS_NEED))


def _was_admitted(draft: Draft) -> bool:
    return draft.job.spec.scheduling.queue_name is None or draft.holds(ConditionType.QUOTA_RESERVED)


def _our_end(draft: Draft, gang: Gang | None) -> Cause | None:
    """An end that the user, a deadline, or a better use of the nodes asks for."""
    if draft.job.spec.suspend:
        return Cause(Reason.SUSPENDED, "spec.suspend is true", Budget.NONE)
    if gang is not None and _held_fields_changed(draft, gang):
        message = "spec.topology or spec.scheduling was changed while the job was suspended for a moment"
        return Cause(Reason.SUSPENDED, message, Budget.NONE)
    if cause := deadline(draft):
        return cause
    if gang is None or gang.suspended:
        return None
    if draft.holds(ConditionType.RUNNING):
        return _no_progress(draft) if draft.stage == "train" else None
    return _no_room(draft, gang)


def _held_fields_changed(draft: Draft, gang: Gang) -> bool:
    """Whether the Job was made from another topology or scheduling than the spec has now."""
    return gang.held_fields not in (None, held_fields(draft.job.spec))


def deadline(draft: Draft) -> Cause | None:
    """The deadline that has passed, if any; the next one is looked at in time."""
    spec = draft.job.spec
    active = policies.active_deadline(spec, draft.status)
    if active is not None and _passed(draft, active):
        message = f"the job was active for longer than activeDeadlineSeconds: {spec.active_deadline_seconds}"
        return Cause(Reason.DEADLINE_EXCEEDED, message, Budget.PERMANENT)
    pending = policies.pending_deadline(spec, draft.status, draft.now)
    if pending is None or not _passed(draft, pending):
        return None
    message = f"not all ranks ran within pendingDeadlineSeconds: {spec.pending_deadline_seconds}"
    waited = _waited_for(draft)
    return Cause(
        Reason.PENDING_DEADLINE_EXCEEDED, f"{message}: {waited}" if waited else message, Budget.PERMANENT
    )


def _waited_for(draft: Draft) -> str | None:
    """What keeps the ranks from running: as it is now, else as it was when the last attempt gave up."""
    gang, attempts = draft.gang, draft.status.attempts
    if draft.open is None or gang is None:
        return draft.status.message
    if draft.seen.pods is not None and not gang.suspended:
        said = waiting(draft, gang)
        if said.reason != Reason.STARTING:
            return said.message
    gave_up = attempts[-2] if len(attempts) > 1 and attempts[-2].reason in policies.GAVE_UP else None
    return gave_up.message if gave_up else draft.status.message


def _passed(draft: Draft, time: datetime) -> bool:
    if draft.now >= time:
        return True
    draft.look(time)
    return False


def _no_progress(draft: Draft) -> Cause | None:
    """No step for too long. Only of a rank 0 that has answered in this attempt: silence alone may be the
    network's, and lost ranks are noticed by their peers."""
    running = conditions.find(draft.status.conditions, ConditionType.RUNNING)
    told = draft.status.progress
    if running is None or told is None or told.step_time is None or not _has_told(draft, told):
        return None
    since = max(parse(told.step_time), parse(running.last_transition_time))
    seconds = draft.job.spec.progress_deadline_seconds
    if not _passed(draft, since + timedelta(seconds=seconds)):
        return None
    message = f"no step was completed for progressDeadlineSeconds: {seconds}, since step {told.step}"
    return Cause(Reason.PROGRESS_DEADLINE_EXCEEDED, message, Budget.USER)


def _has_told(draft: Draft, told: Progress) -> bool:
    """Whether the progress is this attempt's, not an earlier one's."""
    begun = draft.open.start if draft.open else None
    return told.updated_time is not None and begun is not None and parse(told.updated_time) >= parse(begun)


def _no_room(draft: Draft, gang: Gang) -> Cause | None:
    """Pods without a node for too long: another gang may need what we hold, or another tier may have room."""
    assert draft.open is not None
    placed = [pod for pod in draft.pods if pod.node is not None]
    wanted = draft.wanted
    if draft.seen.pods is None or gang.ready >= wanted or len(placed) >= wanted:
        return None
    why = waiting(draft, gang)
    since = gang.admitted_at or parse(draft.open.start or stamp(draft.now))
    seconds = draft.job.spec.isa.step_down_seconds
    if placed:
        # Two gangs that wait for each other's nodes must not let go of them at once.
        spread = policies.released_spread(draft.uid, draft.open.attempt)
        if _passed(draft, since + timedelta(seconds=seconds * (1 + spread / 2))):
            message = f"lets go of {len(placed)}/{wanted} pods, since the others find no room: {why.message}"
            return Cause(Reason.RELEASED, message, Budget.NONE)
    elif why.reason in _TIERS_DO_NOT_MATTER:
        return None
    elif _other_tiers(draft) and _passed(draft, since + timedelta(seconds=seconds)):
        message = f"no pod found room within isa.stepDownSeconds: {seconds}: {why.message}"
        return Cause(Reason.STEPPED_DOWN, message, Budget.NONE)
    return None


def _other_tiers(draft: Draft) -> bool:
    had = draft.status.placement.isa if draft.status.placement else None
    return draft.seen.feasible is not None and any(tier != had for tier in draft.seen.feasible.tiers)


def end(draft: Draft, cause: Cause) -> None:
    """The attempt is over for this cause: its price, and what follows. Happens once per attempt."""
    codes = list(cause.exit_codes)
    draft.set_attempt(reason=cause.reason, message=cause.message, exit_codes=codes)
    _learn(draft, cause)
    if draft.holds(ConditionType.FINISHED):
        return
    if cause.budget == Budget.PERMANENT:
        draft.finish(ConditionType.FAILED, cause.reason, cause.message)
    elif cause.budget == Budget.NONE:
        draft.deny(ConditionType.RUNNING, cause.reason, cause.message)
        if cause.reason != Reason.SUSPENDED:
            draft.event("Normal", cause.reason, cause.message)
    else:
        _charge(draft, cause)


def _learn(draft: Draft, cause: Cause) -> None:
    """What the attempt leaves to the next ones."""
    before = draft.status.placement or Placement()
    found = below_tier(draft.pods) if cause.reason == Reason.ISA_BELOW_TIER else []
    avoid = sorted({*before.avoid, *found})[:NODES_SHOWN]
    dtype = before.dtype or live.dtype(draft.pods)
    draft.set(placement=before.model_copy(update={"avoid": avoid, "dtype": dtype}))


def _charge(draft: Draft, cause: Cause) -> None:
    """One restart more of the budget, or the job's end when there is none left."""
    spec, restarts = draft.job.spec, draft.restarts
    user = cause.budget == Budget.USER
    limit = spec.backoff_limit if user else spec.infrastructure_backoff_limit
    used = restarts.user if user else restarts.infrastructure
    if used >= limit:
        reason = Reason.BACKOFF_LIMIT_EXCEEDED if user else Reason.INFRASTRUCTURE_BACKOFF_LIMIT_EXCEEDED
        name = "backoffLimit" if user else "infrastructureBackoffLimit"
        draft.finish(
            ConditionType.FAILED,
            reason,
            f"{cause.message}; all {limit} restarts of {name} are used up"
            if limit
            else f"{cause.message}; {name} is 0",
        )
        return
    field = "user" if user else "infrastructure"
    draft.set(restarts=restarts.model_copy(update={field: used + 1}), message=cause.message)
    draft.deny(ConditionType.RUNNING, cause.reason, cause.message)
    draft.affirm(ConditionType.RESTARTING, cause.reason, cause.message)
    draft.event("Warning", cause.reason, cause.message)


def _succeed(draft: Draft) -> None:
    """The stage is done."""
    if draft.seen.pods is None:
        return
    if draft.stage == "fetch":
        _fetched(draft)
    elif draft.stage == "train":
        _trained(draft)
    else:
        _published(draft)


def _fetched(draft: Draft) -> None:
    said = live.transfer(draft.pods)
    found = said.fetched if said is not None and said.fetched is not None else Fetched()
    known = draft.status.provenance or Provenance()
    update = {
        "model_revision": known.model_revision or found.model,
        "dataset_revision": known.dataset_revision or found.dataset,
    }
    draft.set(provenance=known.model_copy(update=update))
    if stages.next_stage(draft.job.spec, draft.status) == "fetch":
        end(draft, Cause(Reason.TRANSFER_FAILED, _LOST_WORDS, Budget.USER))
        return
    end(draft, Cause(Reason.FETCHED, "the remote sources are in the workspace", Budget.NONE, (0,)))


def _published(draft: Draft) -> None:
    said = live.transfer(draft.pods)
    if said is None or said.published_uri is None:
        end(draft, Cause(Reason.TRANSFER_FAILED, _LOST_WORDS, Budget.USER))
        return
    adapter = (draft.status.adapter or AdapterStatus()).model_copy(
        update={"published_uri": said.published_uri}
    )
    draft.set_attempt(reason=Reason.SUCCEEDED, message="the adapter is sent", exit_codes=[0])
    draft.set(adapter=adapter)
    _complete(draft, adapter)


def _trained(draft: Draft) -> None:
    spec = draft.job.spec
    uri = f"{spec.workspace.rstrip('/')}/jobs/{draft.job.metadata.name}/adapter"
    adapter = live.adapter(draft.pods) or AdapterStatus(uri=uri)
    draft.set(adapter=adapter, progress=live.finished(draft.status.progress))
    placement = draft.status.placement or Placement()
    # Ranks of a short job have not told how many they are before they are done.
    draft.set(
        placement=placement.model_copy(
            update={"world_size": placement.world_size or live.world_size(draft.pods)}
        )
    )
    if spec.output.destination is not None:
        message = f"the adapter is in {adapter.uri}; {spec.output.destination} gets it next"
        end(draft, Cause(Reason.TRAINED, message, Budget.NONE, (0,)))
        return
    draft.set_attempt(reason=Reason.SUCCEEDED, message="every rank is done", exit_codes=[0])
    _complete(draft, adapter)


def _complete(draft: Draft, adapter: AdapterStatus) -> None:
    better = (
        f": eval loss {adapter.eval_loss:.4g}, that of the base {adapter.base_eval_loss:.4g}"
        if adapter.eval_loss is not None and adapter.base_eval_loss is not None
        else ""
    )
    sent = f" and {adapter.published_uri}" if adapter.published_uri else ""
    draft.finish(ConditionType.COMPLETE, Reason.SUCCEEDED, f"the adapter is in {adapter.uri}{sent}{better}")


def _wind_up(draft: Draft, gang: Gang | None) -> None:
    """An attempt that is ending: its pods must all be gone, or over, before it has ended."""
    if gang is not None and not gang.over:
        _take_away(draft, gang)
    delete_orphans(draft)
    if draft.seen.pods is None:
        return
    if draft.living or (gang is not None and not gang.over):
        said = remaining(draft, draft.living) if draft.living else None
        if said is not None and said.reason == Reason.NODE_LOST and not draft.holds(ConditionType.FINISHED):
            _held(draft, said)
        draft.look_in(LOOK_SECONDS)
        return
    assert draft.open is not None
    codes = exit_codes(draft.pods, draft.open.exit_codes)
    draft.set_attempt(end=stamp(draft.now), exit_codes=list(codes))


def _held(draft: Draft, said: Said) -> None:
    draft.deny(ConditionType.RUNNING, Reason(said.reason), said.message)
    draft.set(message=said.message)


def _take_away(draft: Draft, gang: Gang) -> None:
    """Delete the Job, unless it fails by itself: then its pods stay, for their logs."""
    by_itself = gang.failing is not None or (disrupted(draft.pods) is not None and not gang.suspended)
    if not gang.deleting and (not by_itself or draft.job.spec.suspend):
        draft.actions.append(DeleteGang(gang.name, gang.uid))


# --- goes on


def _create(draft: Draft) -> None:
    """The attempt is a fact, its Job is not yet."""
    if obstacle := draft.seen.obstacle:
        draft.wait(ConditionType.INITIALIZED, Reason(obstacle.reason), obstacle.message)
    if draft.living:
        await_pods(draft)
    elif not draft.rivals:
        _ensure_children(draft)
    draft.look_in(_until_next_try(draft))


def _until_next_try(draft: Draft) -> float:
    """Seconds: as many as the attempt is old, so twice as long each time. What is in the way of a job that was just
    created is often a job of its name that is on its way out."""
    assert draft.open is not None
    age = (draft.now - parse(draft.open.start)).total_seconds() if draft.open.start else LOOK_SECONDS
    return min(max(age, FIRST_RETRY_SECONDS), LOOK_SECONDS)


def await_pods(draft: Draft) -> None:
    """Pods that may still run are in the way of another gang: said, and orphans among them deleted."""
    delete_orphans(draft)
    said = remaining(draft, draft.living)
    draft.wait(ConditionType.INITIALIZED, Reason(said.reason), said.message, note=False)


def start_attempt(draft: Draft) -> StartAttempt:
    """Create the children of the last attempt, as the status has it."""
    placement = draft.status.placement
    assert draft.attempt is not None
    assert placement is not None
    assert placement.isa is not None
    return StartAttempt(
        draft.attempt.attempt,
        placement.isa,
        draft.image,
        avoid=tuple(placement.avoid),
        stage=draft.stage,
        fetched=stages.fetched(draft.status),
    )


def _ensure_children(draft: Draft) -> None:
    draft.actions.append(start_attempt(draft))


def delete_orphans(draft: Draft) -> None:
    """Pods whose Job was deleted without them."""
    present = {known.uid for known in draft.seen.gangs}
    for pod in draft.living:
        if pod.owner_uid not in present and pod.deleting_since is None:
            draft.actions.append(DeletePod(pod.name, pod.uid))


def _follow(draft: Draft, gang: Gang) -> None:
    if _starts_quietly(draft, gang):
        _look_at_pods(draft)
        return
    draft.set_attempt(job_uid=gang.uid)
    draft.affirm(ConditionType.INITIALIZED, Reason.STARTED, f"Job {gang.name} exists")
    if draft.seen.incomplete:
        draft.actions.append(RestoreNetwork())
    queue = draft.job.spec.scheduling.queue_name
    if queue is not None:
        _queue(draft, gang, queue)
    if gang.suspended:
        return
    if draft.holds(ConditionType.RUNNING) or gang.ready >= draft.wanted:
        _run(draft)
    else:
        said = waiting(draft, gang)
        note = said.reason != Reason.STARTING
        draft.wait(ConditionType.RUNNING, Reason(said.reason), said.message, note=note)
        _look_at_pods(draft)


def _starts_quietly(draft: Draft, gang: Gang) -> bool:
    """The status as it was when the attempt began says all there is to say: nobody has looked at the pods yet, or
    they are merely starting. Most gangs are up before that changes, and each is spared a write."""
    queued = draft.job.spec.scheduling.queue_name is not None
    up = draft.holds(ConditionType.RUNNING) or gang.ready >= draft.wanted
    waits = not draft.holds(ConditionType.INITIALIZED)
    if up or queued or waits or draft.seen.incomplete:
        return False
    return draft.seen.pods is None or _merely_starting(draft, gang)


def _merely_starting(draft: Draft, gang: Gang) -> bool:
    begun = draft.open.start if draft.open else None
    quiet = begun is not None and draft.now < parse(begun) + max(QUIET, 2 * draft.seen.patience)
    return quiet and waiting(draft, gang).reason == Reason.STARTING


def _look_at_pods(draft: Draft) -> None:
    """Soon, the first time: what keeps pods from starting shows within seconds."""
    assert draft.open is not None
    if draft.open.start is not None:
        first = parse(draft.open.start) + draft.seen.patience
        if draft.now < first:
            draft.look(first)
            return
    draft.look_in(max(LOOK_SECONDS, draft.seen.patience.total_seconds()))


def wait_in_queue(draft: Draft, queue: str) -> None:
    """The queue has not let the job in."""
    message = f"waits in the queue {queue}"
    draft.wait(ConditionType.QUOTA_RESERVED, Reason.QUEUED, message, note=False)


def _queue(draft: Draft, gang: Gang, queue: str) -> None:
    if gang.suspended:
        wait_in_queue(draft, queue)
        return
    admitted = gang.admitted_at or draft.now
    waiting = conditions.find(draft.status.conditions, ConditionType.QUOTA_RESERVED)
    if draft.status.start_time is None:
        draft.set(start_time=stamp(admitted))
    elif waiting is not None and waiting.status == "False":
        # The clock of activeDeadlineSeconds stood still in the queue.
        stood = max(admitted - parse(waiting.last_transition_time), timedelta())
        draft.set(start_time=stamp(parse(draft.status.start_time) + stood))
    draft.affirm(ConditionType.QUOTA_RESERVED, Reason.ADMITTED, f"the queue {queue} has let the job in")


def _run(draft: Draft) -> None:
    """Every rank is up."""
    told = draft.seen.progress
    first = not draft.holds(ConditionType.RUNNING)
    reason = _STAGES[told.stage] if told and draft.stage == "train" else stages.RUNNING[draft.stage]
    if told or first:
        message = _RUNNING_MESSAGES[reason] + stages.transferred(told)
        draft.affirm(ConditionType.RUNNING, reason, message)
        draft.set(message=message)
    if draft.holds(ConditionType.RESTARTING):
        draft.deny(ConditionType.RESTARTING, Reason.STARTED, "every rank is up again")
    if draft.stage == "train":
        _facts(draft)
    if draft.gang is not None and draft.gang.ready < draft.wanted:
        draft.look_in(LOOK_SECONDS)
    # Otherwise nothing is due: rank 0's reports and the Job's changes come by themselves, deadlines have their time.


def _facts(draft: Draft) -> None:
    """What the pods and rank 0 tell."""
    status, told, pods = draft.status, draft.seen.progress, draft.pods
    placement = status.placement or Placement()
    per_pod = draft.job.spec.topology.ranks_per_pod
    if pods:
        placement = placement.model_copy(update={"nodes": live.nodes(pods)})
        draft.set(ranks=live.ranks(status.ranks, pods, per_pod))
        digest = next((pod.image_digest for pod in pods if pod.index == 0), None)
        if digest and status.provenance:
            draft.set(provenance=status.provenance.model_copy(update={"image_digest": digest}))
    if told:
        draft.set(ranks=live.with_facts(draft.status.ranks, told, pods if per_pod == "auto" else ()))
        draft.set(progress=live.progress(status.progress, told, draft.now))
        draft.set(checkpoint=live.checkpoint(told) or status.checkpoint)
        if told.step > 0 and placement.dtype is None:
            placement = placement.model_copy(update={"dtype": told.compute_dtype})
        if told.ranks and per_pod == "auto":
            placement = placement.model_copy(update={"world_size": len(told.ranks)})
    draft.set(placement=placement)
