"""What a check may look at: the job, what was observed of it, and its status as far as it is decided. Read-only."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from qlora_contract.run_config import IsaTier, RunStage
from qlora_contract.units import parse_time
from qlora_operator.api import names
from qlora_operator.api.names import ConditionType
from qlora_operator.api.pod_resources import stage_pods, with_pods
from qlora_operator.api.status import Attempt, Condition, Placement, Provenance, QLoRAJobStatus, Restarts
from qlora_operator.api.v1alpha1 import QLoRAJob, QLoRAJobSpec, Topology
from qlora_operator.status import conditions, holds, stages
from qlora_operator.status.observation import (
    AttemptJob,
    Observation,
    Pod,
    Read,
    ReasonMessage,
    WarningEvent,
)


class ReadRequired(Exception):  # noqa: N818 - not an error: the decision is made again once these are read
    """A decision depends on what has not been read yet."""

    def __init__(self, reads: frozenset[Read]) -> None:
        super().__init__(", ".join(sorted(reads)))
        self.reads = reads


def current_job(job: QLoRAJob, status: QLoRAJobStatus, jobs: Iterable[AttemptJob]) -> AttemptJob | None:
    """The Job of the newest attempt: by its name, and by its uid once that is in the status. Whoever may create Jobs in
    the namespace may give them any label, and any owner."""
    if not status.attempts:
        return None
    last = status.attempts[-1]
    name = names.attempt_job(job.metadata.name, last.attempt)
    found = (each for each in jobs if each.controlled and (each.name, each.attempt) == (name, last.attempt))
    return next((each for each in found if last.job_uid in (None, each.uid)), None)


@dataclass(frozen=True)
class JobView:
    """One job at one moment.

    What costs a request to know is not read in advance: whichever property is the first to need it raises
    ReadRequired. So the checks themselves say what is read; there is no second list.
    """

    job: QLoRAJob
    """Its status is the one that is saved."""
    seen: Observation
    now: datetime
    status: QLoRAJobStatus
    """As decided so far."""

    # --- the job

    @property
    def hold(self) -> holds.Hold | None:
        """What suspends the job now."""
        return holds.hold(self.spec, self.now)

    @property
    def spec(self) -> QLoRAJobSpec:
        """What the user wants."""
        return self.job.spec

    @property
    def uid(self) -> str:
        """The QLoRAJob's uid."""
        assert self.job.metadata.uid is not None
        return self.job.metadata.uid

    @property
    def finished(self) -> bool:
        """Whether the job is Complete or Failed."""
        return self.is_true(ConditionType.FINISHED)

    @property
    def fixed_image(self) -> str | None:
        """The image that the first attempt fixed for all."""
        return self.provenance.image

    @property
    def image(self) -> str:
        """The image of every attempt from now on."""
        return self.fixed_image or self.seen.image

    @property
    def provenance(self) -> Provenance:
        """What the first attempts have fixed."""
        return self.status.provenance or Provenance()

    @property
    def placement(self) -> Placement:
        """Where the job runs, or ran last."""
        return self.status.placement or Placement()

    @property
    def restarts(self) -> Restarts:
        """Restarts so far, by whose doing they were."""
        return self.status.restarts or Restarts()

    @property
    def topology(self) -> Topology:
        """The topology of the newest attempt, which may make do with fewer pods."""
        return with_pods(self.spec.topology, self.last_attempt.pods if self.last_attempt else None)

    @property
    def world_size(self) -> int | None:
        """Ranks of all pods of the newest attempt; None while only the launchers know."""
        topology = self.topology
        if topology.ranks_per_pod == "auto":
            return None
        return topology.pods * topology.ranks_per_pod

    def is_true(self, kind: ConditionType) -> bool:
        """Whether a condition is True."""
        return conditions.is_true(self.status.conditions, kind)

    def condition(self, kind: ConditionType) -> Condition | None:
        """A condition, if it was ever set."""
        return conditions.find(self.status.conditions, kind)

    # --- its attempts

    @property
    def last_attempt(self) -> Attempt | None:
        """The newest attempt, ended or not."""
        return self.status.attempts[-1] if self.status.attempts else None

    @property
    def open_attempt(self) -> Attempt | None:
        """The newest attempt, unless it has ended: until its last pod is gone it has not."""
        last = self.last_attempt
        return last if last is not None and last.end is None else None

    @property
    def saved_attempt(self) -> Attempt | None:
        """The newest attempt as it was saved before this decision."""
        return self.job.status.attempts[-1] if self.job.status and self.job.status.attempts else None

    @property
    def end_is_saved(self) -> bool:
        """Whether the newest attempt had its reason, and price, before this decision."""
        last, saved = self.last_attempt, self.saved_attempt
        if last is None or last.reason is None:
            return True
        return saved is not None and saved.attempt == last.attempt and saved.reason is not None

    @property
    def taken_over(self) -> str | None:
        """Kueue's Workload that the newest attempt was to take over from the one before."""
        return self.status.attempts[-2].workload if len(self.status.attempts) > 1 else None

    @property
    def stage(self) -> RunStage:
        """What the newest attempt is for."""
        return self.last_attempt.stage if self.last_attempt is not None else "train"

    @property
    def desired_pods(self) -> int:
        """Pods that the newest attempt has when all are there."""
        return stage_pods(self.topology, self.stage)

    # --- its Jobs and pods

    @property
    def attempt_job(self) -> AttemptJob | None:
        """The current attempt's own Job, as far as the watch has shown."""
        return current_job(self.job, self.status, self.seen.attempt_jobs)

    @property
    def confirmed_job(self) -> AttemptJob | None:
        """The current attempt's own Job. That it is gone, or going, must be the API server's word."""
        job = self.attempt_job
        if job is None or job.deleting:
            self.require(Read.JOBS)
        return job

    @property
    def job_was_seen(self) -> bool:
        """Whether the open attempt's Job had been seen when its status was last written."""
        return self.open_attempt is not None and self.open_attempt.job_uid is not None

    @property
    def queue(self) -> str | None:
        """The queue of the current attempt's Job, whoever has put it there."""
        job = self.attempt_job
        return self.job.queue_name or (job.queue if job is not None else None)

    @property
    def other_jobs(self) -> list[AttemptJob]:
        """Jobs that may still create pods, but for the open attempt's."""
        current = self.status.attempt if self.open_attempt is not None else None
        return [
            job
            for job in self.seen.attempt_jobs
            if job.controlled and job.attempt != current and not job.finished
        ]

    @property
    def pods(self) -> list[Pod]:
        """The current attempt's pods, which its Job has made: others may carry its labels. Read.PODS."""
        last, job = self.last_attempt, self.attempt_job
        owner = job.uid if job is not None else last.job_uid if last is not None else None
        return [
            pod
            for pod in self._all_pods()
            if pod.attempt == self.status.attempt and owner is not None and pod.owner_uid == owner
        ]

    @property
    def active_pods(self) -> list[Pod]:
        """Pods of any attempt that run or may run. Read.PODS."""
        return [pod for pod in self._all_pods() if not pod.finished]

    @property
    def pods_are_worth_a_look(self) -> bool:
        """Whether the pods of a Job that exists may tell more than the Job does.

        Those of one that is in a queue or runs well do not, and why pods do not start is not asked before they have
        had the time: at any moment that is most Jobs, and they cost no request.
        """
        job = self.attempt_job
        if job is None:
            return False
        if self.hold is not None or job.failing is not None:
            return True
        if job.suspended:
            return False
        if self.is_true(ConditionType.RUNNING):
            return job.ready < self.desired_pods
        started = self.open_attempt.start if self.open_attempt else None
        late = started is None or self.now >= parse_time(started) + self.seen.startup_grace
        return late or job.ready >= self.desired_pods

    # --- the rest of what is read

    @property
    def lost_nodes(self) -> frozenset[str]:
        """Nodes of pods that do not respond. Read.NODE_HEALTH."""
        self.require(Read.NODE_HEALTH)
        return self.seen.lost_nodes or frozenset()

    @property
    def deactivated(self) -> str:
        """Why the queue's administrator holds the open attempt's Job; empty if they do not. Read.WORKLOAD."""
        self.require(Read.WORKLOAD)
        return self.seen.deactivated or ""

    @property
    def queue_says(self) -> str:
        """Why the queue has not admitted the open attempt's Job. Read.WORKLOAD."""
        self.require(Read.WORKLOAD)
        return self.seen.queue_says

    @property
    def eviction(self) -> ReasonMessage | None:
        """Why Kueue took the quota of the open attempt's Job back. Read.WORKLOAD."""
        self.require(Read.WORKLOAD)
        return self.seen.eviction

    @property
    def workload(self) -> str | None:
        """Kueue's Workload of the newest attempt's Job, if another Job can take it over. Read.WORKLOAD."""
        self.require(Read.WORKLOAD)
        return self.seen.workload

    @property
    def feasible_tiers(self) -> Sequence[IsaTier]:
        """Tiers that have enough nodes, in order of preference. Read.FEASIBLE_TIERS."""
        self.require(Read.FEASIBLE_TIERS)
        return self.seen.feasible_tiers or ()

    @property
    def fewer_pods(self) -> tuple[IsaTier, int] | None:
        """The first tier that has nodes for as many pods of ranks as will do, and for how many; None if none has.
        Read.FEASIBLE_TIERS."""
        self.require(Read.FEASIBLE_TIERS)
        least, most = self.spec.topology.min_pods, self.spec.topology.pods
        if least is None or stages.next_stage(self.spec, self.status) != "train":
            return None
        found = ((tier, min(pods, most)) for tier, pods in self.seen.tier_pods.items() if pods >= least)
        return next(found, None)

    @property
    def wider_tier(self) -> IsaTier | None:
        """The tier to try when the current one's nodes have no room: the next in order of preference, from the first
        again after the last, that has nodes which the current one lacks. Read.FEASIBLE_TIERS.

        A node of a better tier has the labels of the lesser ones, too: in a cluster of equal nodes all tiers are the
        same nodes, and another tier finds no other room there.
        """
        tiers, current, known = self.feasible_tiers, self.placement.isa, self.seen.tier_nodes
        start = tiers.index(current) + 1 if current in tiers else 0
        for tier in (*tiers[start:], *tiers[:start]):
            if tier == current:
                continue
            if current is None or current not in known or tier not in known or known[tier] - known[current]:
                return tier
        return None

    @property
    def warnings(self) -> Sequence[WarningEvent]:
        """Warnings about the Jobs and pods, newest first. Read.WARNINGS."""
        self.require(Read.WARNINGS)
        return self.seen.warnings or ()

    def require(self, *reads: Read) -> None:
        """Raise ReadRequired for those of these that have not been read."""
        if missing := self.seen.missing(*reads):
            raise ReadRequired(missing)

    def _all_pods(self) -> Sequence[Pod]:
        self.require(Read.PODS)
        return self.seen.pods or ()

    # --- time

    def after(self, seconds: float) -> datetime:
        """The time in so many seconds."""
        return self.now + timedelta(seconds=seconds)
