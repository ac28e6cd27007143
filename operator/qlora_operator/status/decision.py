"""What to do about a job: (job, observation, now) -> decision. Pure.

The status says what is so before anything is done about it: an attempt is in the status before its Job is
created, and the end of one, with its price, before the next begins. Whoever reads the status and the cluster
can thus go on from any point at which the operator was killed.
"""

from datetime import datetime, timedelta

from qlora_contract.run import RUN_CONFIG_VERSION, IsaTier, config_hash, shaping_fields
from qlora_operator.api.names import CONTROLLER, ConditionType, Reason
from qlora_operator.api.times import parse, stamp
from qlora_operator.api.types import Attempt, Placement, Provenance, QLoRAJob, QLoRAJobSpec, Topology
from qlora_operator.status import conditions, policies, stages
from qlora_operator.status.columns import columns
from qlora_operator.status.current import (
    LOOK_SECONDS,
    attend,
    await_pods,
    deadline,
    start_attempt,
    wait_in_queue,
)
from qlora_operator.status.draft import Decision, DeleteGang, DeleteJob, Draft
from qlora_operator.status.observation import Observation


def decide(job: QLoRAJob, seen: Observation, now: datetime) -> Decision:
    """What the job's status is, and what is to be done once it is saved."""
    draft = Draft(job, seen, now)
    if hands_off(job):
        return Decision(draft.status)
    if not draft.holds(ConditionType.FINISHED):
        _begin(draft)
        _suspension(draft)
    if draft.open is not None:
        attend(draft)
    if not (draft.holds(ConditionType.FINISHED) or job.spec.suspend):
        _go_on(draft)
    _clean_up(draft)
    if draft.holds(ConditionType.FINISHED):
        _expire(draft)
    _derive(draft)
    return Decision(draft.status, tuple(draft.actions), tuple(draft.events), draft.look_at)


def hands_off(job: QLoRAJob) -> bool:
    """Whether another controller has the job, or it is on its way out."""
    return job.spec.managed_by not in (None, CONTROLLER) or job.metadata.deletion_timestamp is not None


def _begin(draft: Draft) -> None:
    """From now on the job waits for its ranks."""
    if conditions.find(draft.status.conditions, ConditionType.RUNNING) is None:
        draft.deny(ConditionType.RUNNING, Reason.STARTING, "no attempt has started")


def _suspension(draft: Draft) -> None:
    """The condition Suspended, and the clock of activeDeadlineSeconds."""
    held = draft.holds(ConditionType.SUSPENDED)
    if draft.job.spec.suspend and not held:
        draft.affirm(ConditionType.SUSPENDED, Reason.SUSPENDED, "spec.suspend is true")
        draft.set(message="held by spec.suspend")
        draft.event("Normal", Reason.SUSPENDED, "held by spec.suspend")
    elif held and not draft.job.spec.suspend:
        draft.deny(ConditionType.SUSPENDED, Reason.RESUMED, "spec.suspend is false again")
        draft.set(start_time=None, message="goes on")
        draft.event("Normal", Reason.RESUMED, "goes on")
    queued = draft.job.spec.scheduling.queue_name is not None
    if draft.status.start_time is None and not draft.job.spec.suspend and not queued:
        draft.set(start_time=stamp(draft.now))


# --- the next attempt


def _go_on(draft: Draft) -> None:
    """Between attempts: the next one, unless a deadline has passed meanwhile."""
    if draft.open is not None and draft.open.reason is None:
        return
    if cause := deadline(draft):
        draft.finish(ConditionType.FAILED, cause.reason, cause.message)
    elif draft.open is None and not (_backs_off(draft) or _occupied(draft) or _barred(draft)):
        _start(draft)


def _backs_off(draft: Draft) -> bool:
    last = draft.attempt
    if last is None or last.end is None:
        return False
    until = parse(last.end) + timedelta(seconds=policies.backoff(draft.uid, draft.status.attempts))
    if draft.now >= until:
        return False
    message = f"the next attempt starts at {stamp(until)}, since the last ones failed: {last.message}"
    draft.wait(ConditionType.INITIALIZED, Reason.BACK_OFF, message, note=False)
    draft.look(until)
    return True


def _occupied(draft: Draft) -> bool:
    """Whether a pod of an earlier attempt may still run: never two live gangs for one job."""
    first = draft.status.attempt is None and draft.seen.pods is None
    if first or (draft.seen.pods is not None and not draft.living and not draft.rivals):
        return False
    if draft.living:
        await_pods(draft)
    draft.look_in(LOOK_SECONDS)
    return True


def _barred(draft: Draft) -> bool:
    """Whether the administrator, the operator's version, or the nodes, do not let an attempt start."""
    return _bars_administrator(draft) or _bars_version(draft) or _bars_nodes(draft)


def _bars_administrator(draft: Draft) -> bool:
    """What cannot change is looked at before the first attempt only: a job that began may end, and what was
    trained may be sent."""
    said, begun = draft.seen.refusal, draft.fixed_image is not None
    over = said is not None and said.reason == Reason.LIMIT_EXCEEDED and draft.status.adapter is None
    if said is None or (begun and not over):
        return False
    draft.wait(ConditionType.INITIALIZED, Reason(said.reason), said.message)
    draft.look_in(6 * LOOK_SECONDS)
    return True


def _bars_version(draft: Draft) -> bool:
    """The first attempt's image reads the RunConfig of its time, and refuses any other."""
    fixed = draft.status.provenance.run_config_version if draft.status.provenance else None
    if fixed in (None, RUN_CONFIG_VERSION):
        return False
    message = (
        f"the job's first attempt had version {fixed} of the RunConfig, and this operator writes version "
        f"{RUN_CONFIG_VERSION}: run one that writes version {fixed}, or create another job"
    )
    draft.wait(ConditionType.INITIALIZED, Reason.INVALID_SPEC, message)
    draft.look_in(6 * LOOK_SECONDS)
    return True


def _bars_nodes(draft: Draft) -> bool:
    if draft.seen.feasible is None:
        draft.look_in(1.0)
        return True
    if not draft.seen.feasible.tiers:
        draft.wait(ConditionType.INITIALIZED, Reason.NO_MATCHING_NODES, draft.seen.feasible.why)
        draft.look_in(LOOK_SECONDS)
        return True
    return False


def _start(draft: Draft) -> None:
    """Another attempt becomes a fact; its children are created once that is saved."""
    number = 0 if draft.status.attempt is None else draft.status.attempt + 1
    tier, before = _tier(draft), draft.status.placement or Placement()
    image = draft.image
    spec = draft.job.spec
    stage = stages.next_stage(spec, draft.status)
    draft.add_attempt(Attempt(attempt=number, stage=stage, start=stamp(draft.now)))
    placement = before.model_copy(update={"isa": tier, "world_size": _world(spec.topology)})
    if stage == "train":
        placement = placement.model_copy(update={"nodes": []})
        draft.set(ranks=[])
    draft.set(placement=placement, provenance=_provenance(draft, image))
    message = f"attempt {number} {stages.intention(spec, stage)} on {tier}"
    draft.affirm(ConditionType.INITIALIZED, Reason.STARTED, message)
    draft.deny(ConditionType.RUNNING, Reason.STARTING, message)
    draft.set(message=message)
    if spec.scheduling.queue_name is not None:
        wait_in_queue(draft, spec.scheduling.queue_name)
    else:
        draft.set(conditions=conditions.without(draft.status.conditions, ConditionType.QUOTA_RESERVED))
    draft.actions.append(start_attempt(draft))
    draft.look_in(draft.seen.patience.total_seconds())


def _tier(draft: Draft) -> IsaTier:
    """The first tier that has nodes; after one that had no room, the next, and after the last the first."""
    assert draft.seen.feasible is not None
    tiers, last = draft.seen.feasible.tiers, draft.attempt
    had = draft.status.placement.isa if draft.status.placement else None
    if last is None or last.reason not in policies.GAVE_UP or had not in tiers:
        return tiers[0]
    return tiers[(tiers.index(had) + 1) % len(tiers)]


def _provenance(draft: Draft, image: str) -> Provenance:
    """What the first attempt fixes for all."""
    if draft.status.provenance is not None and draft.status.provenance.image is not None:
        return draft.status.provenance
    spec = draft.job.spec
    return Provenance(
        image=image,
        run_config_version=RUN_CONFIG_VERSION,
        seed=spec.training.seed,
        config_hash=_hash(spec),
    )


def _hash(spec: QLoRAJobSpec) -> str:
    fields = shaping_fields(
        spec.model, spec.dataset, spec.adapter, spec.quantization, spec.training, spec.evaluation
    )
    return config_hash(fields)


# --- the rest


def _clean_up(draft: Draft) -> None:
    """Jobs of earlier attempts go once a later one is there, and none outlives the job's end."""
    over = draft.holds(ConditionType.FINISHED)
    for gang in draft.seen.gangs:
        earlier = gang.attempt != draft.status.attempt
        doomed = earlier or (over and draft.open is None and not gang.over and gang.failing is None)
        action = DeleteGang(gang.name, gang.uid)
        if gang.ours and doomed and not gang.deleting and action not in draft.actions:
            draft.actions.append(action)


def _expire(draft: Draft) -> None:
    expiry = policies.expiry(draft.job.spec, draft.status)
    if expiry is None:
        return
    if draft.now >= expiry:
        draft.actions.append(DeleteJob())
    else:
        draft.look(expiry)


def _world(topology: Topology) -> int | None:
    """Ranks of all pods; None where the launchers settle it."""
    return None if topology.ranks_per_pod == "auto" else topology.pods * topology.ranks_per_pod


def _derive(draft: Draft) -> None:
    """What follows from the rest."""
    topology = draft.job.spec.topology
    gang = draft.gang
    trains = gang is not None and draft.open is not None and draft.stage == "train"
    known = draft.status.placement.world_size if draft.status.placement else None
    world = _world(topology) or known
    ready = gang.ready * (world or 0) // topology.pods if gang is not None and trains else 0
    draft.set(
        observed_generation=draft.job.metadata.generation,
        phase=conditions.phase(draft.status.conditions),
        restarts=draft.restarts,
        columns=columns(min(ready, world or 0), world, draft.status.progress, draft.restarts),
    )
