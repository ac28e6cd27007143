"""What keeps the next attempt from starting, and what that attempt is."""

from datetime import timedelta

from qlora_contract.run_config import IsaTier
from qlora_contract.units import parse_time, rfc3339
from qlora_operator.api.names import Reason
from qlora_operator.api.run_config import cannot_write, config_hash, initial_version
from qlora_operator.api.status import Attempt, Provenance
from qlora_operator.status import policies, progress_status, stages
from qlora_operator.status.actions import StartAttempt
from qlora_operator.status.checks import Blocked, StartCheck
from qlora_operator.status.observation import Read
from qlora_operator.status.teardown import blocking_pods, delete_orphans
from qlora_operator.status.view import JobView

BLOCKED_LOOK_SECONDS = 60.0
"""How often it is looked again at what only the administrator or a new operator changes."""


def backing_off(view: JobView) -> Blocked | None:
    """The last attempts failed, and the next one waits a while."""
    last = view.last_attempt
    if last is None or last.end is None:
        return None
    until = parse_time(last.end) + timedelta(seconds=policies.backoff(view.uid, view.status.attempts))
    if view.now >= until:
        return None
    message = f"the next attempt starts at {rfc3339(until)}, since the last ones failed: {last.message}"
    return Blocked(until, Reason.BACK_OFF, message, event=False)


def pods_remain(view: JobView) -> Blocked | None:
    """A pod of an earlier attempt may still run, or be created: never two attempts of one job at a time."""
    if view.last_attempt is None and not view.seen.attempt_jobs:
        return None
    saved = view.saved_attempt
    if saved is None or saved.end is not None or view.open_attempt is not None:
        # Otherwise the attempt has ended in this very decision, which has just looked at its pods.
        view.require(Read.JOBS, Read.PODS)
    look_at = view.after(policies.LOOK_SECONDS)
    if active := view.active_pods:
        blocking = blocking_pods(view, active)
        orphans = tuple(delete_orphans(view))
        return Blocked(look_at, Reason(blocking.reason), blocking.message, event=False, actions=orphans)
    return Blocked(look_at) if view.other_jobs else None


def policy_violated(view: JobView) -> Blocked | None:
    """The administrator's settings do not let the job start.

    What a job cannot change is checked before its first attempt only: one that has begun may end, and what it has
    trained may be sent.
    """
    violation = view.seen.policy_violation
    if violation is None:
        return None
    can_change = violation.reason in (Reason.LIMIT_EXCEEDED, Reason.SCHEDULING_NOT_ALLOWED)
    if view.fixed_image is not None and not (can_change and view.status.adapter is None):
        return None
    look_at = view.after(BLOCKED_LOOK_SECONDS)
    return Blocked(look_at, Reason(violation.reason), violation.message)


def run_config_version_differs(view: JobView) -> Blocked | None:
    """The first attempt's image reads the RunConfig of its time, and this operator does not write that version."""
    message = cannot_write(view.job)
    if message is None:
        return None
    return Blocked(view.after(BLOCKED_LOOK_SECONDS), Reason.INVALID_SPEC, message)


def no_matching_nodes(view: JobView) -> Blocked | None:
    """No tier that the job allows has enough nodes."""
    if view.feasible_tiers:
        return None
    look_at, why = view.after(policies.LOOK_SECONDS), view.seen.infeasible_because
    if view.fewer_pods is not None:
        waited = timedelta(seconds=view.spec.isa.step_down_seconds)
        shrinks_at = policies.pending_since(view.status, view.now) + waited
        if view.now >= shrinks_at:
            return None
        look_at = min(look_at, shrinks_at)
        why = f"{why}; from {rfc3339(shrinks_at)} on {view.fewer_pods[1]} will do, by topology.minPods"
    return Blocked(look_at, Reason.NO_MATCHING_NODES, why)


START_CHECKS: tuple[StartCheck, ...] = (
    backing_off,  # costs nothing to know, and nothing else matters until then
    pods_remain,  # two attempts at a time would write into one workspace
    policy_violated,  # the administrator's word, before that of the nodes
    run_config_version_differs,  # it would be created, and refuse to run
    no_matching_nodes,  # no node would take its pods, or too few, too soon
)
"""What keeps the next attempt from starting; the first that applies is shown to the user."""


def next_attempt(view: JobView) -> Attempt:
    """The attempt after the last one. Read.FEASIBLE_TIERS.

    It asks for all pods, unless the last one was given up for one with fewer, or there are no nodes for all.
    """
    number = 0 if view.status.attempt is None else view.status.attempt + 1
    stage, last, pods = stages.next_stage(view.spec, view.status), view.last_attempt, None
    if stage == "train" and last is not None and last.reason == Reason.SHRUNK:
        pods = last.placed
    elif not view.feasible_tiers and view.fewer_pods is not None:
        pods = view.fewer_pods[1]
    return Attempt(attempt=number, stage=stage, pods=pods, start=rfc3339(view.now))


def next_tier(view: JobView) -> IsaTier:
    """The first tier that has nodes; after one whose nodes had no room, one with other nodes, if there is one.

    Read.FEASIBLE_TIERS; there must be one, or one with room for fewer pods.
    """
    tiers, last, before = view.feasible_tiers, view.last_attempt, view.placement.isa
    if before is not None and view.status.adapter is not None:
        return before  # where it was trained; the adapter is sent from any node
    if before is not None and last is not None and last.reason == Reason.SHRUNK:
        return before  # whose nodes it has just let go
    if not tiers and view.fewer_pods is not None:
        return view.fewer_pods[0]
    if last is None or before is None or last.reason not in policies.UNSCHEDULED or before not in tiers:
        return tiers[0]
    return view.wider_tier or before


def fixed_provenance(view: JobView) -> Provenance:
    """What the first attempt fixes for all."""
    if view.fixed_image is not None:
        return view.provenance
    return Provenance(
        image=view.image,
        run_config_version=initial_version(view.job),
        seed=view.spec.training.seed,
        config_hash=config_hash(view.job),
    )


def create_children(view: JobView) -> StartAttempt:
    """Creates the children of the newest attempt, as the status describes it."""
    attempt, placement = view.last_attempt, view.placement
    assert attempt is not None
    assert placement.isa is not None
    return StartAttempt(
        attempt.attempt,
        placement.isa,
        view.image,
        avoid=tuple(placement.avoid),
        shun=policies.shunned(view.status.attempts, view.now),
        pods=attempt.pods,
        stage=attempt.stage,
        fetched=stages.fetched(view.status),
        checkpoint_time=progress_status.checkpoint_time(view.status.checkpoint, view.now),
        requested=attempt.start,
        workload=view.taken_over,
    )
