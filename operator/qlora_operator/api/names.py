"""Every name the API has and every name it makes, each made in one place."""

import re
from enum import StrEnum

GROUP = "qlora.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "QLoRAJob"
LIST_KIND = "QLoRAJobList"
PLURAL = "qlorajobs"
SINGULAR = "qlorajob"
SHORT_NAME = "qlj"
CRD_NAME = f"{PLURAL}.{GROUP}"

JOB_NAME_LABEL = f"{GROUP}/job-name"
"""On every child and pod: the job's name."""
JOB_UID_LABEL = f"{GROUP}/job-uid"
"""On every child and pod: the job's uid, which tells a job from an earlier one of the same name."""
ATTEMPT_LABEL = f"{GROUP}/attempt"
"""On what belongs to one attempt: its number."""
ROLE_LABEL = f"{GROUP}/role"
"""On every child and pod: what it does for the job."""

RUN_CONFIG_ANNOTATION = f"{GROUP}/run-config"
"""On an attempt's pod template: its RunConfig as JSON, shown to the pods as run.json."""

MAX_JOB_NAME = 50
"""Characters. A pod's host name `<name>-a<attempt>-<index>` has 63: 13 are left for an attempt below 10^6 and
an index below 10^3, each with its hyphen."""
JOB_NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""A letter first, since the name of a Service may not begin with a digit before Kubernetes 1.36."""
JOB_NAME_RULE = (
    "a name of lower-case letters, digits and hyphens that begins with a letter and ends with no hyphen, "
    f"at most {MAX_JOB_NAME} characters"
)


def is_job_name(name: str) -> bool:
    """Whether a job may have this name."""
    return len(name) <= MAX_JOB_NAME and re.fullmatch(JOB_NAME_PATTERN.strip("^$"), name) is not None


def ranks_service(job_name: str) -> str:
    """The headless Service through which a job's ranks find each other."""
    return f"{job_name}-ranks"


def attempt_job(job_name: str, attempt: int) -> str:
    """The Indexed Job of one attempt."""
    return f"{job_name}-a{attempt}"


def pod_host_name(job_name: str, attempt: int, index: int) -> str:
    """The host name Kubernetes gives to the pod with this completion index."""
    return f"{attempt_job(job_name, attempt)}-{index}"


def rank_zero_host(job_name: str, attempt: int) -> str:
    """Where rank 0 of an attempt is found by its peers, within the job's namespace."""
    return f"{pod_host_name(job_name, attempt, 0)}.{ranks_service(job_name)}"


class Phase(StrEnum):
    """One word for `kubectl get`: derived from the conditions, never set by hand."""

    PENDING = "Pending"
    """Not started: placement or validation has yet to succeed."""
    QUEUED = "Queued"
    """Waits for quota."""
    FETCHING = "Fetching"
    """Remote sources are being copied to the workspace."""
    STARTING = "Starting"
    """Pods are being placed, or ranks are finding each other."""
    RUNNING = "Running"
    """Training."""
    RESTARTING = "Restarting"
    """An attempt ended early; the next one starts when its pods are gone."""
    PUBLISHING = "Publishing"
    """Training is done; the adapter is being verified and stored."""
    SUSPENDED = "Suspended"
    """Held by spec.suspend."""
    SUCCEEDED = "Succeeded"
    """Ended with a verified adapter."""
    FAILED = "Failed"
    """Ended without one; the condition Failed says why."""


class ConditionType(StrEnum):
    """The conditions of a job, each with status True, False or Unknown."""

    SUSPENDED = "Suspended"
    """Held by spec.suspend; no pods."""
    INITIALIZED = "Initialized"
    """Whatever must be there before the ranks start is there."""
    QUOTA_RESERVED = "QuotaReserved"
    """A queue has let the job in."""
    RUNNING = "Running"
    """Every rank trains."""
    RESTARTING = "Restarting"
    """An attempt ended early and another follows."""
    COMPLETE = "Complete"
    """A verified adapter is stored."""
    FAILED = "Failed"
    """No adapter, and no further attempt."""
    FINISHED = "Finished"
    """Complete or Failed: what `kubectl wait --for=condition=Finished` waits for."""


class Reason(StrEnum):
    """Why a condition has its status: the reasons that the API's own descriptions name."""

    DEADLINE_EXCEEDED = "DeadlineExceeded"
    """Failed: the job was active for longer than activeDeadlineSeconds."""
    PENDING_DEADLINE_EXCEEDED = "PendingDeadlineExceeded"
    """Failed: no attempt had all its ranks within pendingDeadlineSeconds."""
    PROGRESS_DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
    """Restarting: no step was completed for progressDeadlineSeconds."""
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    """Failed: more than backoffLimit restarts were the job's own doing."""
    INFRASTRUCTURE_BACKOFF_LIMIT_EXCEEDED = "InfrastructureBackoffLimitExceeded"
    """Failed: more than infrastructureBackoffLimit restarts were the cluster's doing."""
    NAME_CONFLICT = "NameConflict"
    """Not Initialized: an object that is not the job's has the name of one of its children."""
    NO_MATCHING_NODES = "NoMatchingNodes"
    """Not Initialized: no tier of isa.allowed has enough nodes."""
