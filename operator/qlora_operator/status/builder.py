"""The one place that writes a status."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from qlora_contract.units import rfc3339
from qlora_operator.api.names import ConditionType, Reason
from qlora_operator.api.status import ATTEMPTS_SHOWN, Attempt, QLoRAJobStatus
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.status import conditions
from qlora_operator.status.actions import Action, Decision, Event, RestoreNetwork, StartAttempt
from qlora_operator.status.checks import Blocked
from qlora_operator.status.observation import Observation
from qlora_operator.status.view import JobView


@dataclass
class StatusBuilder:
    """One decision in the making. Checks are given its `view`, which is read-only."""

    job: QLoRAJob
    seen: Observation
    now: datetime
    status: QLoRAJobStatus = field(init=False)
    actions: list[Action] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    look_at: datetime | None = None

    def __post_init__(self) -> None:
        self.status = self.job.status or QLoRAJobStatus()

    @property
    def view(self) -> JobView:
        """The job as it is decided so far."""
        return JobView(self.job, self.seen, self.now, self.status)

    def build(self) -> Decision:
        """The decision. What is in the way goes before anything is created."""
        actions = sorted(self.actions, key=lambda action: isinstance(action, StartAttempt | RestoreNetwork))
        return Decision(self.status, tuple(actions), tuple(self.events), self.look_at)

    # --- fields

    def set(self, **values: Any) -> None:
        """Change fields of the status."""
        self.status = self.status.model_copy(update=values)

    def set_attempt(self, **values: Any) -> None:
        """Change fields of the newest attempt."""
        *earlier, last = self.status.attempts
        self.set(attempts=[*earlier, last.model_copy(update=values)])

    def add_attempt(self, attempt: Attempt) -> None:
        """Append an attempt; only the newest ones are kept."""
        self.set(attempt=attempt.attempt, attempts=[*self.status.attempts, attempt][-ATTEMPTS_SHOWN:])

    # --- conditions

    def set_true(self, kind: ConditionType, reason: Reason, message: str) -> None:
        """A condition is True."""
        self._put(kind, reason, message, holds=True)

    def set_false(self, kind: ConditionType, reason: Reason, message: str) -> None:
        """A condition is False."""
        self._put(kind, reason, message, holds=False)

    def drop_condition(self, kind: ConditionType) -> None:
        """A condition no longer applies to the job."""
        self.set(conditions=conditions.without(self.status.conditions, kind))

    def set_waiting(self, kind: ConditionType, reason: Reason, message: str, *, event: bool) -> None:
        """A condition is False, and its message is the job's. A new reason is worth an Event if `event`."""
        before = conditions.find(self.status.conditions, kind)
        if event and (before is None or before.reason != reason):
            self.event("Warning", reason, message)
        self.set_false(kind, reason, message)
        self.set(message=message)

    def finish(self, kind: ConditionType, reason: Reason, message: str) -> None:
        """The job is Complete or Failed, for good."""
        over = (Reason.FINISHED, "the job is over")
        self.set_false(ConditionType.RUNNING, *over)
        if conditions.find(self.status.conditions, ConditionType.RESTARTING):
            self.set_false(ConditionType.RESTARTING, *over)
        if conditions.is_true(self.status.conditions, ConditionType.SUSPENDED):
            self.set_false(ConditionType.SUSPENDED, *over)
        self.set_true(kind, reason, message)
        self.set_true(ConditionType.FINISHED, reason, message)
        self.set(message=message, completion_time=rfc3339(self.now))
        self.event("Normal" if kind == ConditionType.COMPLETE else "Warning", reason, message)

    def _put(self, kind: ConditionType, reason: Reason, message: str, *, holds: bool) -> None:
        before, generation = self.status.conditions, self.job.metadata.generation
        after = conditions.put(
            before, kind, reason, message, holds=holds, now=self.now, generation=generation
        )
        self.set(conditions=after)

    # --- what follows once it is saved

    def act(self, *actions: Action) -> None:
        """Do this, once."""
        self.actions += [action for action in actions if action not in self.actions]

    def block(self, blocked: Blocked) -> None:
        """The next attempt cannot start."""
        if blocked.reason is not None:
            self.set_waiting(ConditionType.INITIALIZED, blocked.reason, blocked.message, event=blocked.event)
        self.act(*blocked.actions)
        self.requeue_at(blocked.look_at)

    def event(self, kind: str, reason: str, message: str) -> None:
        """Post an Event."""
        self.events.append(Event(kind, reason, message))

    def requeue_at(self, time: datetime) -> None:
        """Decide again at this time at the latest."""
        self.look_at = time if self.look_at is None else min(self.look_at, time)
