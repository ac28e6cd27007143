"""What is known of a job's children, read from the API's JSON into the few facts that decisions need."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from qlora_contract.progress import ProgressReport
from qlora_contract.run import IsaTier
from qlora_operator.api.names import ATTEMPT_LABEL, HELD_FIELDS_ANNOTATION
from qlora_operator.api.times import parse
from qlora_operator.status.policies import PATIENCE

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True)
class Said:
    """A reason and a message, as conditions and events have them."""

    reason: str
    message: str


@dataclass(frozen=True)
class Warned(Said):
    """An Event of type Warning."""

    about: str = ""
    """The uid of the Job or pod that it is about."""


@dataclass(frozen=True)
class Gang:
    """The Indexed Job of one attempt."""

    name: str
    uid: str
    attempt: int
    ours: bool
    """Owned by this very job, not merely of the name that its child would have."""
    suspended: bool = False
    """By its queue: we never set it on a Job that exists."""
    ready: int = 0
    """Pods that are ready."""
    deleting: bool = False
    complete: bool = False
    failing: Said | None = None
    """It has failed, or is about to when its pods are gone."""
    failing_since: datetime | None = None
    failed: bool = False
    """It has failed, and no pod of it is left running."""
    admitted_at: datetime | None = None
    """When it was started, or let in by its queue."""
    parallelism: int | None = None
    """Pods that it is to have at a time."""
    held_fields: str | None = None
    """A hash of the spec fields that may only change while the job is suspended, as it was made from them."""

    @property
    def over(self) -> bool:
        """It will have no more pods."""
        return self.complete or self.failed

    @property
    def starting(self) -> bool:
        """Its pods are not all up yet."""
        return self.does_well and self.ready < (self.parallelism or 0)

    @property
    def does_well(self) -> bool:
        """It starts or runs, as far as it tells itself."""
        return not (self.over or self.suspended or self.deleting or self.failing is not None)


@dataclass(frozen=True)
class Pod:
    """A pod of a job."""

    name: str
    uid: str
    attempt: int
    index: int
    phase: str
    owner_uid: str | None = None
    node: str | None = None
    address: str | None = None
    deleting_since: datetime | None = None
    """When its grace period ends, or ended."""
    disruption: Said | None = None
    """The condition DisruptionTarget."""
    unschedulable: str | None = None
    """The scheduler's words."""
    waiting: Said | None = None
    """Why its container does not run yet."""
    exit_code: int | None = None
    ended_by: str = ""
    """The container's reason, such as OOMKilled or Error."""
    last_words: str = ""
    """The container's termination message."""
    verdict: Said | None = None
    """The pod's own reason, such as Evicted or TopologyAffinityError."""
    image_digest: str | None = None

    @property
    def where(self) -> str:
        """Its name, and its node where it has one, for a sentence."""
        return f"pod {self.name} on node {self.node}" if self.node else f"pod {self.name}"

    @property
    def over(self) -> bool:
        """No process of it runs, or will."""
        return self.phase in ("Succeeded", "Failed")


@dataclass(frozen=True)
class Feasible:
    """What placement says of a job that is to start."""

    tiers: tuple[IsaTier, ...]
    why: str = ""
    """Why there are none."""


@dataclass(frozen=True)
class Observation:
    """What the operator sees of a job, besides the object itself."""

    gangs: tuple[Gang, ...] = ()
    """Jobs with the job's uid on their label."""
    pods: tuple[Pod, ...] | None = None
    """Its pods; None: nobody looked."""
    warnings: tuple[Warned, ...] = ()
    """Newest first: Events of type Warning about the current attempt's Job and pods."""
    feasible: Feasible | None = None
    """None: nobody asked."""
    lost_nodes: frozenset[str] = frozenset()
    """Nodes that are not ready, of those that the pods are on."""
    progress: ProgressReport | None = None
    """What rank 0 of the current attempt says now."""
    image: str = ""
    """The image that a first attempt would get."""
    refusal: Said | None = None
    """Why the administrator's settings do not let the job start."""
    obstacle: Said | None = None
    """What came of the last try to create the children, when it did not work out."""
    incomplete: bool = False
    """A child other than the Job is known to be missing."""
    patience: timedelta = PATIENCE
    """How long pods may take to start before anybody looks why, and between two looks."""


def gang(raw: Mapping[str, Any], job_uid: str) -> Gang:
    """A batch/v1 Job from the API."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or [] if c.get("status") == "True"}
    failing = conditions.get("FailureTarget") or conditions.get("Failed")
    labels = metadata.get("labels") or {}
    return Gang(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=_number(labels.get(ATTEMPT_LABEL)),
        ours=_controller_uid(metadata) == job_uid,
        suspended=bool(raw["spec"].get("suspend")),
        ready=status.get("ready") or 0,
        deleting="deletionTimestamp" in metadata,
        complete="Complete" in conditions,
        failing=_said(failing),
        failing_since=parse(failing["lastTransitionTime"]) if failing else None,
        failed="Failed" in conditions,
        admitted_at=parse(status["startTime"]) if status.get("startTime") else None,
        parallelism=raw["spec"].get("parallelism"),
        held_fields=(metadata.get("annotations") or {}).get(HELD_FIELDS_ANNOTATION),
    )


def pod(raw: Mapping[str, Any]) -> Pod:
    """A pod of a job from the API."""
    metadata, spec, status = raw["metadata"], raw["spec"], raw.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    container = (status.get("containerStatuses") or [{}])[0]
    state = container.get("state") or {}
    ended = state.get("terminated") or {}
    scheduled = conditions.get("PodScheduled") or {}
    disrupted = conditions.get("DisruptionTarget") or {}
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=_number((metadata.get("labels") or {}).get(ATTEMPT_LABEL)),
        index=_number((metadata.get("annotations") or {}).get(INDEX_ANNOTATION)),
        phase=status.get("phase") or "Pending",
        owner_uid=_controller_uid(metadata),
        node=spec.get("nodeName"),
        address=status.get("podIP"),
        deleting_since=parse(metadata["deletionTimestamp"]) if "deletionTimestamp" in metadata else None,
        disruption=_said(disrupted) if disrupted.get("status") == "True" else None,
        unschedulable=scheduled.get("message", "") if scheduled.get("status") == "False" else None,
        waiting=_said(state.get("waiting")),
        exit_code=ended.get("exitCode"),
        ended_by=ended.get("reason") or "",
        last_words=(ended.get("message") or "").strip(),
        verdict=_said(status) if status.get("reason") else None,
        image_digest=(container.get("imageID") or "").rpartition("@")[2] or None,
    )


def _controller_uid(metadata: Mapping[str, Any]) -> str | None:
    owners = metadata.get("ownerReferences") or []
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), None)


def _number(text: str | None) -> int:
    """-1 for what carries no number: somebody else's."""
    return int(text) if text and text.isdigit() else -1


def _said(raw: Mapping[str, Any] | None) -> Said | None:
    return Said(raw.get("reason") or "", raw.get("message") or "") if raw else None
