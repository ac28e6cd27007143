"""What is known of a job's children, read from the API's JSON into the few facts that decisions need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from qlora_contract.cost import Price
from qlora_contract.progress import ProgressReport
from qlora_contract.run_config import IsaTier
from qlora_contract.units import parse_time
from qlora_operator.api.names import (
    ATTEMPT_LABEL,
    CHECK_CONTAINER,
    CHECKPOINT_ANNOTATION,
    PREBUILT_WORKLOAD_LABEL,
    QUEUE_LABEL,
    TOPOLOGY_HASH_ANNOTATION,
    TRAINER_CONTAINER,
)
from qlora_operator.status.policies import MIN_STARTUP_GRACE

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
JOB_CONTROLLER = "kubernetes.io/job-controller"
MAX_LABEL = 63
"""Characters of a label's value."""


@dataclass(frozen=True)
class ReasonMessage:
    """A reason and a message, as conditions and Events have them."""

    reason: str
    message: str


@dataclass(frozen=True)
class WarningEvent(ReasonMessage):
    """An Event of type Warning."""

    about: str = ""
    """The uid of the Job or pod that it is about."""


@dataclass(frozen=True)
class AttemptJob:
    """The batch/v1 Job of one attempt: an Indexed Job with one pod per completion index."""

    name: str
    uid: str
    attempt: int
    controlled: bool
    """Its controller is this very QLoRAJob. Otherwise it merely has the name that a child would have."""
    suspended: bool = False
    """By its queue: the operator never suspends a Job that exists."""
    managed_by: str | None = None
    """The controller that makes its pods, if it is not that of this cluster."""
    queue: str | None = None
    """The queue that its label names: ours, or one that a webhook has set."""
    workload: str | None = None
    """Kueue's Workload that it has taken over from an earlier attempt."""
    template_attempt: int | None = None
    """The attempt that its pods are labelled with."""
    ready: int = 0
    """Pods that are ready."""
    deleting: bool = False
    complete: bool = False
    failing: ReasonMessage | None = None
    """It has failed, or will once its pods are gone."""
    failing_since: datetime | None = None
    failed: bool = False
    """It has failed, and none of its pods runs."""
    admitted_at: datetime | None = None
    """When it was started, or admitted by its queue."""
    parallelism: int | None = None
    """How many pods it is to have at a time."""
    checkpoint_time: datetime | None = None
    """When the newest checkpoint was made, as the Job itself says."""
    topology_hash: str | None = None
    """A hash of those spec fields that may only change while the job is suspended, as they were when it was made."""

    @property
    def finished(self) -> bool:
        """It creates no more pods."""
        return self.complete or self.failed

    @property
    def starting(self) -> bool:
        """Not all of its pods are ready yet."""
        return self.healthy and self.ready < (self.parallelism or 0)

    @property
    def healthy(self) -> bool:
        """It starts or runs, as far as its own status tells."""
        return not (self.finished or self.suspended or self.deleting or self.failing is not None)


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
    disruption: ReasonMessage | None = None
    """The condition DisruptionTarget."""
    unready_since: datetime | None = None
    """Since when it runs, and is not ready."""
    unschedulable: str | None = None
    """The scheduler's message."""
    gated: bool = False
    """Held back from the scheduler: a queue places it, or has it wait."""
    waiting: ReasonMessage | None = None
    """Why its container does not run yet."""
    exit_code: int | None = None
    termination_reason: str = ""
    """The container's, such as OOMKilled or Error."""
    termination_message: str = ""
    """The container's: a TerminationReport, or the last lines of its log."""
    check_message: str = ""
    """That of the container that looks at the data, once it has ended."""
    status_reason: ReasonMessage | None = None
    """The pod's own, such as Evicted or TopologyAffinityError."""
    image_digest: str | None = None

    @property
    def description(self) -> str:
        """Its name, and its node if it has one, for a sentence."""
        return f"pod {self.name} on node {self.node}" if self.node else f"pod {self.name}"

    @property
    def finished(self) -> bool:
        """None of its processes runs, or will run."""
        return self.phase in ("Succeeded", "Failed")


class Read(StrEnum):
    """What a decision may need that the watches do not tell. Each costs a request, or shares one with other jobs."""

    JOBS = "Jobs"
    """The attempts' Jobs, listed anew: before another one may be created, the watch's word is not enough."""
    PODS = "pods"
    NODE_HEALTH = "node health"
    """Which of the pods' nodes are not ready."""
    FEASIBLE_TIERS = "feasible tiers"
    """Which tiers have enough nodes for the job."""
    WARNINGS = "warnings"
    """Events of type Warning about the Jobs and pods."""
    WORKLOAD = "workload"
    """What Kueue knows of the open attempt's Job."""


@dataclass(frozen=True)
class Observation:
    """What the operator knows of a job, besides the object itself."""

    attempt_jobs: tuple[AttemptJob, ...] = ()
    """Jobs that have the QLoRAJob's uid on their label."""
    jobs_listed: bool = False
    """Whether they are the API server's list; otherwise they are the watch's."""
    pods: tuple[Pod, ...] | None = None
    """None: not read."""
    lost_nodes: frozenset[str] | None = None
    """Nodes of the pods that are not ready, or gone. None: not read."""
    feasible_tiers: tuple[IsaTier, ...] | None = None
    """Tiers that have enough nodes, in order of preference. None: not read."""
    tier_nodes: Mapping[IsaTier, frozenset[str]] = field(default_factory=dict)
    """The nodes of each tier that fit, by name; of tiers that are not in it they are unknown."""
    tier_pods: Mapping[IsaTier, int] = field(default_factory=dict)
    """How many pods of ranks the nodes of each tier have room for, in order of preference; empty where nodes may not be
    listed."""
    infeasible_because: str = ""
    """Why there are no such tiers, in a sentence."""
    warnings: tuple[WarningEvent, ...] | None = None
    """Newest first. None: not read."""
    deactivated: str | None = None
    """Why the queue's administrator holds the open attempt's Job; empty: they do not. None: not read."""
    queue_says: str = ""
    """Why the queue has not admitted the open attempt's Job, as far as Kueue says; read with `deactivated`."""
    eviction: ReasonMessage | None = None
    """Why Kueue took the quota of the open attempt's Job back; read with `deactivated`."""
    workload: str | None = None
    """Kueue's Workload of the newest attempt's Job, if another Job can take it over; read with `deactivated`."""
    progress: ProgressReport | None = None
    """What rank 0 of the current attempt reports now."""
    image: str = ""
    """The image that a first attempt would get."""
    price: Price | None = None
    """Of a CPU's hour, by the administrator's settings."""
    policy_violation: ReasonMessage | None = None
    """Why the administrator's settings do not let the job start."""
    create_error: ReasonMessage | None = None
    """Why the children could not be created when that was last tried."""
    children_missing: bool = False
    """The Service or the NetworkPolicy is known to be missing."""
    network_exists: bool = False
    """The Service or the NetworkPolicy is known to exist."""
    delivered: frozenset[str] = frozenset()
    """Keys of the notices that were delivered since this operator started."""
    startup_grace: timedelta = MIN_STARTUP_GRACE
    """How long pods may take to start before they are looked at, and how long between two looks."""

    def missing(self, *reads: Read) -> frozenset[Read]:
        """Those of these that have not been read."""
        known = {
            Read.JOBS: self.jobs_listed,
            Read.PODS: self.pods is not None,
            Read.NODE_HEALTH: self.lost_nodes is not None,
            Read.FEASIBLE_TIERS: self.feasible_tiers is not None,
            Read.WARNINGS: self.warnings is not None,
            Read.WORKLOAD: self.deactivated is not None,
        }
        return frozenset(read for read in reads if not known[read])


def attempt_job(raw: Mapping[str, Any], job_uid: str) -> AttemptJob:
    """A batch/v1 Job from the API."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or [] if c.get("status") == "True"}
    failing = conditions.get("FailureTarget") or conditions.get("Failed")
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    return AttemptJob(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=_number(labels.get(ATTEMPT_LABEL)),
        controlled=_controller_uid(metadata) == job_uid,
        suspended=bool(raw["spec"].get("suspend")),
        managed_by=None if raw["spec"].get("managedBy") == JOB_CONTROLLER else raw["spec"].get("managedBy"),
        queue=labels.get(QUEUE_LABEL) or None,
        workload=labels.get(PREBUILT_WORKLOAD_LABEL) or None,
        template_attempt=_template_attempt(raw["spec"]),
        ready=status.get("ready") or 0,
        deleting="deletionTimestamp" in metadata,
        complete="Complete" in conditions,
        failing=_reason_message(failing),
        failing_since=parse_time(failing["lastTransitionTime"]) if failing else None,
        failed="Failed" in conditions,
        admitted_at=parse_time(status["startTime"]) if status.get("startTime") else None,
        parallelism=raw["spec"].get("parallelism"),
        checkpoint_time=aware_time(annotations.get(CHECKPOINT_ANNOTATION)),
        topology_hash=annotations.get(TOPOLOGY_HASH_ANNOTATION),
    )


def _template_attempt(spec: Mapping[str, Any]) -> int | None:
    labels = ((spec.get("template") or {}).get("metadata") or {}).get("labels") or {}
    return _number(labels[ATTEMPT_LABEL]) if ATTEMPT_LABEL in labels else None


def pod(raw: Mapping[str, Any]) -> Pod:
    """A pod of a job from the API."""
    metadata, spec, status = raw["metadata"], raw["spec"], raw.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    # By its name: others may be injected, and the kubelet lists them in the order of their names.
    containers: dict[str, Mapping[str, Any]] = {
        each.get("name") or "": each for each in status.get("containerStatuses") or []
    }
    container = containers.get(TRAINER_CONTAINER, {})
    check_state = containers.get(CHECK_CONTAINER, {}).get("state") or {}
    state = container.get("state") or {}
    ended = state.get("terminated") or {}
    scheduled = conditions.get("PodScheduled") or {}
    gated = scheduled.get("reason") == "SchedulingGated"
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
        deleting_since=parse_time(metadata["deletionTimestamp"]) if "deletionTimestamp" in metadata else None,
        disruption=_reason_message(disrupted) if disrupted.get("status") == "True" else None,
        unready_since=_unready_since(conditions.get("Ready")),
        unschedulable=scheduled.get("message", "")
        if scheduled.get("status") == "False" and not gated
        else None,
        gated=gated,
        waiting=_reason_message(state.get("waiting")),
        exit_code=ended.get("exitCode"),
        termination_reason=ended.get("reason") or "",
        termination_message=(ended.get("message") or "").strip(),
        check_message=((check_state.get("terminated") or {}).get("message") or "").strip(),
        status_reason=_reason_message(status) if status.get("reason") else None,
        image_digest=(container.get("imageID") or "").rpartition("@")[2] or None,
    )


def deactivated(workloads: Sequence[Mapping[str, Any]]) -> str:
    """Why one of Kueue's Workloads is held by its administrator, in Kueue's words if it has any; empty if none is."""
    for raw in workloads:
        if raw["spec"].get("active") is False:
            said = {each["type"]: each for each in (raw.get("status") or {}).get("conditions") or []}
            return (said.get("Evicted") or {}).get("message") or "the workload is deactivated"
    return ""


def kept_workload(workloads: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of one of Kueue's Workloads that another Job can take over: it is not over, and a label can name it."""
    for raw in workloads:
        over = any(
            each["type"] == "Finished" and each["status"] == "True"
            for each in (raw.get("status") or {}).get("conditions") or []
        )
        if not over and len(raw["metadata"]["name"]) <= MAX_LABEL:
            return str(raw["metadata"]["name"])
    return None


def queue_says(workloads: Sequence[Mapping[str, Any]]) -> str:
    """Why none of Kueue's Workloads of a Job has its quota, in Kueue's words."""
    if not workloads:
        return "Kueue has made no Workload of its Job, or none that the operator may list"
    statuses = [raw.get("status") or {} for raw in workloads]
    conditions = (each for status in statuses for each in status.get("conditions") or [])
    waits = [each for each in conditions if each["type"] == "QuotaReserved" and each["status"] == "False"]
    if waits:
        return waits[0].get("message") or ""
    checks = (each for status in statuses for each in status.get("admissionChecks") or [])
    open_checks = (each for each in checks if each["state"] in ("Pending", "Retry"))
    return "; ".join(
        f"the check {each['name']} is open" + (f": {each['message']}" if each.get("message") else "")
        for each in open_checks
    )


def eviction(workloads: Sequence[Mapping[str, Any]]) -> ReasonMessage | None:
    """Why Kueue took the quota of a Job back; None if it did not, or has granted it again."""
    conditions = (each for raw in workloads for each in (raw.get("status") or {}).get("conditions") or [])
    evicted = (each for each in conditions if each["type"] == "Evicted" and each["status"] == "True")
    return _reason_message(next(evicted, None))


def _unready_since(ready: Mapping[str, Any] | None) -> datetime | None:
    if ready is None or ready.get("status") != "False" or "lastTransitionTime" not in ready:
        return None
    return parse_time(ready["lastTransitionTime"])


def _controller_uid(metadata: Mapping[str, Any]) -> str | None:
    owners = metadata.get("ownerReferences") or []
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), None)


def aware_time(text: str | None) -> datetime | None:
    """The time that others have written; None for what is no RFC 3339."""
    try:
        found = parse_time(text or "")
    except ValueError:
        return None
    return None if found.tzinfo is None else found


def _number(text: str | None) -> int:
    """-1 for what carries no number: it is not the operator's."""
    return int(text) if text and text.isascii() and text.isdigit() else -1


def _reason_message(raw: Mapping[str, Any] | None) -> ReasonMessage | None:
    return ReasonMessage(raw.get("reason") or "", raw.get("message") or "") if raw else None
