"""A status in the making: what decisions write into."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from qlora_contract.run import Fetched, IsaTier, RunStage
from qlora_operator.api.names import ConditionType, Reason
from qlora_operator.api.sizes import stage_pods
from qlora_operator.api.times import stamp
from qlora_operator.api.types import ATTEMPTS_SHOWN, Attempt, QLoRAJob, QLoRAJobStatus, Restarts
from qlora_operator.status import conditions
from qlora_operator.status.observation import Gang, Observation, Pod

NOTHING_FETCHED = Fetched()


@dataclass(frozen=True)
class StartAttempt:
    """Create the children of an attempt, those that are not there yet."""

    attempt: int
    isa: IsaTier
    image: str
    avoid: tuple[str, ...] = ()
    stage: RunStage = "train"
    fetched: Fetched = NOTHING_FETCHED


@dataclass(frozen=True)
class RestoreNetwork:
    """Create those of the children that every attempt shares which are not there."""


@dataclass(frozen=True)
class DeleteGang:
    """Delete an attempt's Job with its pods."""

    name: str
    uid: str


@dataclass(frozen=True)
class DeletePod:
    """Delete a pod that has lost its Job."""

    name: str
    uid: str


@dataclass(frozen=True)
class DeleteJob:
    """Delete the QLoRAJob itself."""


Action = StartAttempt | RestoreNetwork | DeleteGang | DeletePod | DeleteJob


@dataclass(frozen=True)
class Event:
    """An Event for `kubectl describe`."""

    type: str
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """What the status is now, and what to do once it is saved."""

    status: QLoRAJobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    look_at: datetime | None = None
    """When something is due even if nothing happens."""


@dataclass
class Draft:
    """One job's decision in the making."""

    job: QLoRAJob
    seen: Observation
    now: datetime
    status: QLoRAJobStatus = field(init=False)
    actions: list[Action] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    look_at: datetime | None = None

    def __post_init__(self) -> None:
        self.status = self.job.status or QLoRAJobStatus()

    # --- reading

    @property
    def uid(self) -> str:
        """The job's."""
        assert self.job.metadata.uid is not None
        return self.job.metadata.uid

    @property
    def attempt(self) -> Attempt | None:
        """The last attempt."""
        return self.status.attempts[-1] if self.status.attempts else None

    @property
    def open(self) -> Attempt | None:
        """The last attempt, unless all of it is gone."""
        last = self.attempt
        return last if last is not None and last.end is None else None

    @property
    def stage(self) -> RunStage:
        """What the last attempt is to do."""
        return self.attempt.stage if self.attempt is not None else "train"

    @property
    def wanted(self) -> int:
        """Pods that the last attempt has when all are there."""
        return stage_pods(self.job.spec.topology, self.stage)

    @property
    def fixed_image(self) -> str | None:
        """The image that the first attempt fixed for all."""
        return self.status.provenance.image if self.status.provenance else None

    @property
    def image(self) -> str:
        """The image of every attempt from now on."""
        return self.fixed_image or self.seen.image

    @property
    def restarts(self) -> Restarts:
        """So far."""
        return self.status.restarts or Restarts()

    @property
    def gang(self) -> Gang | None:
        """The current attempt's own Job."""
        return next((g for g in self.seen.gangs if g.ours and g.attempt == self.status.attempt), None)

    @property
    def pods(self) -> list[Pod]:
        """The current attempt's pods, as far as anybody looked."""
        return [pod for pod in self.seen.pods or () if pod.attempt == self.status.attempt]

    @property
    def rivals(self) -> list[Gang]:
        """Jobs of other attempts that may still make pods."""
        gangs = self.seen.gangs
        return [g for g in gangs if g.ours and g.attempt != self.status.attempt and not g.over]

    @property
    def living(self) -> list[Pod]:
        """Pods of any attempt that are not over."""
        return [pod for pod in self.seen.pods or () if not pod.over]

    def holds(self, kind: ConditionType) -> bool:
        """Whether a condition is true."""
        return conditions.is_true(self.status.conditions, kind)

    # --- writing

    def set(self, **values: Any) -> None:
        """Change fields of the status."""
        self.status = self.status.model_copy(update=values)

    def set_attempt(self, **values: Any) -> None:
        """Change fields of the last attempt."""
        assert self.attempt is not None
        self.set(attempts=[*self.status.attempts[:-1], self.attempt.model_copy(update=values)])

    def add_attempt(self, attempt: Attempt) -> None:
        """Another attempt; only the newest are kept."""
        self.set(attempt=attempt.attempt, attempts=[*self.status.attempts, attempt][-ATTEMPTS_SHOWN:])

    def affirm(self, kind: ConditionType, reason: Reason, message: str) -> None:
        """A condition holds."""
        self._say(kind, reason, message, holds=True)

    def deny(self, kind: ConditionType, reason: Reason, message: str) -> None:
        """A condition does not hold."""
        self._say(kind, reason, message, holds=False)

    def _say(self, kind: ConditionType, reason: Reason, message: str, *, holds: bool) -> None:
        generation = self.job.metadata.generation
        before = self.status.conditions
        now = self.now
        said = conditions.put(before, kind, reason, message, holds=holds, now=now, generation=generation)
        self.set(conditions=said)

    def wait(self, kind: ConditionType, reason: Reason, message: str, *, note: bool = True) -> None:
        """The condition does not hold, and why: also the job's message, and an event when it is news."""
        before = conditions.find(self.status.conditions, kind)
        if note and (before is None or before.reason != reason):
            self.event("Warning", reason, message)
        self.deny(kind, reason, message)
        self.set(message=message)

    def event(self, kind: str, reason: str, message: str) -> None:
        """Tell of a transition."""
        self.events.append(Event(kind, reason, message))

    def look(self, at: datetime) -> None:
        """Decide again at this time at the latest."""
        self.look_at = at if self.look_at is None else min(self.look_at, at)

    def look_in(self, seconds: float) -> None:
        """Decide again after so many seconds at the latest."""
        self.look(self.now + timedelta(seconds=seconds))

    def finish(self, kind: ConditionType, reason: Reason, message: str) -> None:
        """The job is over, for good: Complete or Failed."""
        self.deny(ConditionType.RUNNING, Reason.FINISHED, "the job is over")
        if conditions.find(self.status.conditions, ConditionType.RESTARTING):
            self.deny(ConditionType.RESTARTING, Reason.FINISHED, "the job is over")
        if self.holds(ConditionType.SUSPENDED):
            self.deny(ConditionType.SUSPENDED, Reason.FINISHED, "the job is over")
        self.affirm(kind, reason, message)
        self.affirm(ConditionType.FINISHED, reason, message)
        self.set(message=message, completion_time=stamp(self.now))
        self.event("Normal" if kind == ConditionType.COMPLETE else "Warning", reason, message)
