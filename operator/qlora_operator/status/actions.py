"""What a decision consists of: the status, and what is to be done once it is saved."""

from dataclasses import dataclass
from datetime import datetime

from qlora_contract.run_config import IsaTier, ResolvedRevisions, RunStage
from qlora_operator.api.status import QLoRAJobStatus
from qlora_operator.status.observation import Read

NOTHING_FETCHED = ResolvedRevisions()


@dataclass(frozen=True)
class StartAttempt:
    """Create the children of an attempt, except those that exist."""

    attempt: int
    isa: IsaTier
    image: str
    avoid: tuple[str, ...] = ()
    shun: tuple[str, ...] = ()
    pods: int | None = None
    """How many it makes do with; None: all that the job asks for."""
    stage: RunStage = "train"
    fetched: ResolvedRevisions = NOTHING_FETCHED
    checkpoint_time: str | None = None
    """When the checkpoint was made that it goes on from, RFC 3339, as far as that is known."""
    requested: str | None = None
    """When it was decided upon, RFC 3339: from then on it waits."""
    workload: str | None = None
    """Kueue's Workload that it takes over, unless that is gone or over by now."""


@dataclass(frozen=True)
class RestoreNetwork:
    """Create the Service and the NetworkPolicy that all attempts share, unless they exist."""


@dataclass(frozen=True)
class DeleteNetwork:
    """Delete the Service and the NetworkPolicy: no attempt follows."""


@dataclass(frozen=True)
class DeleteAttemptJob:
    """Delete an attempt's batch/v1 Job with its pods."""

    name: str
    uid: str


@dataclass(frozen=True)
class KeepWorkload:
    """Let one of Kueue's Workloads outlive the Job that it belongs to."""

    name: str
    job_name: str
    job_uid: str


@dataclass(frozen=True)
class DropWorkload:
    """Delete one that was kept: it would hold quota for nobody."""

    name: str


@dataclass(frozen=True)
class TellCheckpoint:
    """Write into an attempt's Job when its newest checkpoint was made."""

    name: str
    uid: str
    time: str
    """RFC 3339."""


@dataclass(frozen=True)
class DeletePod:
    """Delete a pod that has lost its Job."""

    name: str
    uid: str


@dataclass(frozen=True)
class DeleteJob:
    """Delete the QLoRAJob itself."""


Action = (
    StartAttempt
    | RestoreNetwork
    | DeleteNetwork
    | DeleteAttemptJob
    | KeepWorkload
    | DropWorkload
    | TellCheckpoint
    | DeletePod
    | DeleteJob
)


@dataclass(frozen=True)
class Event:
    """An Event for `kubectl describe`."""

    type: str
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """What the status is now, and what to do once it is saved; or what must be read before anything is decided."""

    status: QLoRAJobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    look_at: datetime | None = None
    """When something is due even if nothing happens."""
    reads: frozenset[Read] = frozenset()
    """When not empty, nothing is decided: read these, and decide again."""
