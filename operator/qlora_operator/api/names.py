"""The names of the API, and the names that are derived from a job's."""

import re
from enum import StrEnum

from qlora_contract.run_config import IsaTier

GROUP = "qlora.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "QLoRAJob"
LIST_KIND = "QLoRAJobList"
PLURAL = "qlorajobs"
SINGULAR = "qlorajob"
SHORT_NAME = "qlj"
CRD_NAME = f"{PLURAL}.{GROUP}"
CONTROLLER = f"{GROUP}/qlora-operator"
"""What spec.managedBy calls this operator."""

COMPONENT = "qlora-operator"
"""The operator's own name: for the API server, in Events, and on the objects that it manages."""

Key = tuple[str, str]
"""Namespace and name of a job."""

JOB_NAME_LABEL = f"{GROUP}/job-name"
"""On every child and pod: the job's name."""
JOB_UID_LABEL = f"{GROUP}/job-uid"
"""On every child and pod: the job's uid, which distinguishes it from an earlier job of the same name."""
ATTEMPT_LABEL = f"{GROUP}/attempt"
"""On what belongs to one attempt: the attempt's number."""
ROLE_LABEL = f"{GROUP}/role"
"""On every child and pod: what it does for the job."""

INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
"""On a pod of an attempt: its index, from the Job controller."""

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""On an attempt's Job: the queue that admits it; on a QLoRAJob the same as spec.scheduling.queueName. The label is
Kueue's own."""

WORKLOAD_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
"""On a QLoRAJob, and so on its attempts' Jobs: Kueue's WorkloadPriorityClass."""

TOPOLOGY_ANNOTATIONS = tuple(
    f"kueue.x-k8s.io/podset-{kind}-topology" for kind in ("required", "preferred", "unconstrained")
)
"""On a QLoRAJob, and so on its pods: within which level of the topology Kueue places them."""

WORKLOAD_JOB_LABEL = "kueue.x-k8s.io/job-uid"
"""On Kueue's Workload: the uid of the Job that it is about."""

PREBUILT_WORKLOAD_LABEL = "kueue.x-k8s.io/prebuilt-workload-name"
"""On an attempt's Job: the Workload that it takes over from an attempt whose quota was taken back, with its place in
the queue. The label is Kueue's own."""

PARTIAL_ADMISSION = ("kueue.x-k8s.io/job-min-parallelism", "kueue.x-k8s.io/job-completions-equal-parallelism")
"""On an attempt's Job: with how many pods Kueue may let it in, and that all of these are to end. Kueue's own."""

RANK_ZERO_ANNOTATION = f"{GROUP}/rank-zero"
"""On an attempt's pod template: the host name of rank 0, which the container's environment has by reference. Kueue
lets a Job take over a Workload only if their containers are equal, and so those of all attempts are."""

REQUESTED_ANNOTATION = f"{GROUP}/requested"
"""On an attempt's pod template, likewise: when the attempt was decided upon, RFC 3339."""

RUN_CONFIG_ANNOTATION = f"{GROUP}/run-config"
"""On an attempt's pod template: its RunConfig as JSON, which the pods see as run.json."""

TOPOLOGY_HASH_ANNOTATION = f"{GROUP}/held-fields"
"""On an attempt's Job: a hash of spec.topology and spec.scheduling, which may change only while the job is suspended.
If it differs from the job's, the job was suspended, changed and resumed while the operator was not watching. The name
is that of release 0.1.0: running Jobs carry it, and an operator of that release looks for it."""

CHECKPOINT_ANNOTATION = f"{GROUP}/checkpoint-time"
"""On an attempt's Job: when its newest checkpoint was made, RFC 3339. What it has done since is lost if its pods are
killed at once, which a scheduler may want to know that looks for pods to preempt."""

EXPORTED_ANNOTATION = f"{GROUP}/exported"
"""On a QLoRAJob: the forms that were made of its adapter since it finished, separated by commas. `kubectl qlora export`
writes it, and the operator, which alone writes the status, takes it over there."""

TRAINER_CONTAINER = "trainer"
"""The container of an attempt's pods."""

CHECK_CONTAINER = "check"
"""The container beside a fetch that looks at the data."""

_CPUID = "feature.node.kubernetes.io/cpu-cpuid."
TIER_LABELS: dict[IsaTier, tuple[str, ...]] = {
    "amx_bf16": (f"{_CPUID}AMXTILE", f"{_CPUID}AMXBF16"),
    "avx512_bf16": (f"{_CPUID}AVX512F", f"{_CPUID}AVX512BF16"),
    "avx512": (f"{_CPUID}AVX512F",),
    "avx2": (f"{_CPUID}AVX2",),
}
"""Labels, with the value "true", that Node Feature Discovery gives to a node of this tier or a better one. Without
the feature the label is absent. These are fewer than the flags that the ranks check: features that every server with
these has anyway are not required, since an administrator may have reduced the labels."""

MAX_JOB_NAME = 50
"""Characters. A pod's host name `<name>-a<attempt>-<index>` has 63: 13 are left for an attempt below 10^6 and
an index below 10^3, each with its hyphen."""
JOB_NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""A letter first, since the name of a Service may not begin with a digit before Kubernetes 1.36."""
JOB_NAME_RULE = (
    "a name of lower-case letters, digits and hyphens that begins with a letter and does not end with a hyphen, "
    f"at most {MAX_JOB_NAME} characters"
)


def is_job_name(name: str) -> bool:
    """Whether a job may have this name."""
    return len(name) <= MAX_JOB_NAME and re.fullmatch(JOB_NAME_PATTERN.strip("^$"), name) is not None


def ranks_service(job_name: str) -> str:
    """The headless Service through which a job's ranks find each other."""
    return f"{job_name}-ranks"


def ranks_network_policy(job_name: str) -> str:
    """The NetworkPolicy of a job's pods."""
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


class Role(StrEnum):
    """What a child or pod does for its job: the values of ROLE_LABEL."""

    TRAINER = "trainer"
    """Runs the ranks of an attempt."""
    FETCHER = "fetcher"
    """Fetches remote sources into the workspace."""
    EXPORTER = "exporter"
    """Makes output.formats of the finished adapter."""
    PUBLISHER = "publisher"
    """Sends the adapter to output.destination."""
    DISCOVERY = "discovery"
    """Lets the ranks find each other."""
    ISOLATION = "isolation"
    """Keeps others' traffic from the ranks."""


class Phase(StrEnum):
    """One word for `kubectl get`: derived from the conditions, never set by hand."""

    PENDING = "Pending"
    """Not started: validation or placement has not succeeded yet."""
    QUEUED = "Queued"
    """Waiting for quota."""
    FETCHING = "Fetching"
    """Remote sources are being fetched into the workspace."""
    STARTING = "Starting"
    """Pods are being placed, or ranks are finding each other."""
    RUNNING = "Running"
    """Training."""
    RESTARTING = "Restarting"
    """An attempt ended early; the next one starts when its pods are gone."""
    PUBLISHING = "Publishing"
    """Training is done; the adapter is being verified and stored, exported, or sent to output.destination."""
    SUSPENDED = "Suspended"
    """Suspended by spec.suspend, or outside the windows of spec.schedule."""
    SUCCEEDED = "Succeeded"
    """Ended with a verified adapter."""
    FAILED = "Failed"
    """Ended without one; the condition Failed says why."""


class ConditionType(StrEnum):
    """The conditions of a job, each with status True, False or Unknown."""

    SUSPENDED = "Suspended"
    """spec.suspend is true, or no window of spec.schedule is open: pods that still run are stopped, and no others
    start."""
    INITIALIZED = "Initialized"
    """Everything that the ranks need in order to start exists."""
    QUOTA_RESERVED = "QuotaReserved"
    """A queue has admitted the job."""
    DATA_CHECKED = "DataChecked"
    """The training data were read and tokenized, at least their beginning; the message says what they are, and what of
    them is left out."""
    RUNNING = "Running"
    """Every rank is training, sources are being fetched, or the adapter is being exported or uploaded: the reason says
    which."""
    RESTARTING = "Restarting"
    """An attempt ended early and another follows."""
    COMPLETE = "Complete"
    """A verified adapter is stored."""
    FAILED = "Failed"
    """The job ended without an adapter and is not retried."""
    FINISHED = "Finished"
    """The job is Complete or Failed: what `kubectl wait --for=condition=Finished` waits for."""


class Reason(StrEnum):
    """Why a condition has its status, or why an attempt ended. The docstring begins with the condition."""

    # The whole job's end.
    SUCCEEDED = "Succeeded"
    """Complete: a verified adapter is stored."""
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    """Failed: the job was active for longer than activeDeadlineSeconds."""
    PENDING_DEADLINE_EXCEEDED = "PendingDeadlineExceeded"
    """Failed: no attempt had all its ranks running within pendingDeadlineSeconds."""
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    """Failed: the job itself caused more than backoffLimit restarts."""
    INFRASTRUCTURE_BACKOFF_LIMIT_EXCEEDED = "InfrastructureBackoffLimitExceeded"
    """Failed: the cluster caused more than infrastructureBackoffLimit restarts."""

    DATA_READ = "DataRead"
    """DataChecked: every record was read; those that cannot be trained on are counted in the message."""

    DATA_SAMPLED = "DataSampled"
    """DataChecked: before the ranks start, the data were read as they will read them, up to the first 10,000 records of
    each source."""

    # Ends of an attempt that fail the job at once: the same input fails the same way.
    INVALID_CONFIGURATION = "InvalidConfiguration"
    """Failed: the settings contradict each other, the model or the data (exit code 10)."""
    INVALID_DATA = "InvalidData"
    """Failed: the dataset cannot be trained on (exit code 11). DataChecked: the same."""
    MODEL_UNUSABLE = "ModelUnusable"
    """Failed: the base model cannot be read or adapted (exit code 12)."""
    DIVERGED = "Diverged"
    """Failed: the loss or a gradient is not a finite number (exit code 13)."""
    STORAGE_FULL = "StorageFull"
    """Failed: the workspace is full (exit code 14)."""
    OUT_OF_MEMORY = "OutOfMemory"
    """Failed: a rank needed more than memoryPerRank (exit code 15, or OOMKilled)."""
    NO_IMPROVEMENT = "NoImprovement"
    """Failed: the adapter is not better than the base, and evaluation.requireImprovement is set (exit code 16)."""

    TRANSFER_REFUSED = "TransferRefused"
    """Failed: a remote source or the destination does not exist, or refuses the credentials (exit code 17)."""

    # Ends of an attempt at the cost of one of backoffLimit.
    UNEXPECTED_ERROR = "UnexpectedError"
    """Restarting: a rank failed with an unexpected error."""
    KILLED = "Killed"
    """Restarting: a rank was killed by a signal that neither its memory limit nor a drain explains."""
    RENDEZVOUS_FAILED = "RendezvousFailed"
    """Restarting: the ranks did not find each other in time (exit code 30)."""
    STALLED = "Stalled"
    """Restarting: a rank hung (exit code 31)."""
    ADAPTERS_DIFFER = "AdaptersDiffer"
    """Restarting: the ranks no longer had the same adapter (exit code 33)."""
    TRANSFER_FAILED = "TransferFailed"
    """Restarting: a transfer failed repeatedly: no answer, a broken connection or wrong bytes (exit code 32)."""
    PROGRESS_DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
    """Restarting: nothing advanced for progressDeadlineSeconds: no step, evaluation, load or tokenization."""

    # Ends of an attempt at the cost of one of infrastructureBackoffLimit.
    PEER_LOST = "PeerLost"
    """Restarting: ranks lost a peer that left no exit code of its own."""
    TERMINATED = "Terminated"
    """Restarting: the pods were asked to stop, and exited after a checkpoint (exit code 50, or 143)."""
    ISA_BELOW_TIER = "IsaBelowTier"
    """Restarting: a node lacks instructions that its labels advertise (exit code 51)."""
    PREEMPTED = "Preempted"
    """Restarting: a workload of higher priority took the nodes."""
    DRAINED = "Drained"
    """Restarting: a pod was evicted through the API, as `kubectl drain` does."""
    EVICTED = "Evicted"
    """Restarting: the kubelet ended a pod because its node ran out of a resource or shut down."""
    DISRUPTED = "Disrupted"
    """Restarting: a pod was removed before the operator could read the cause."""
    NODE_LOST = "NodeLost"
    """Restarting: a pod's node does not respond. The next attempt waits until the node is back, deleted, or tainted
    out-of-service: only then is the pod certain to be dead."""
    ADMISSION_REJECTED = "AdmissionRejected"
    """Restarting: a kubelet refused a pod, for instance because its CPUs cannot be aligned."""
    JOB_DELETED = "JobDeleted"
    """Restarting: another client deleted the attempt's Job, or removed its labels."""
    JOB_CHANGED = "JobChanged"
    """Restarting: another client changed the parallelism or the suspend field of the attempt's Job."""

    # Ends of an attempt that cost nothing.
    FETCHED = "Fetched"
    """Not Running: the remote sources are in the workspace; training follows."""
    TRAINED = "Trained"
    """Not Running: the adapter is in the workspace; what output.formats asks for, or the upload to output.destination,
    follows."""
    EXPORTED = "Exported"
    """Not Running: what output.formats asks for is in the workspace; the upload to output.destination follows."""
    SUSPENDED = "Suspended"
    """Suspended: spec.suspend is true."""
    RESUMED = "Resumed"
    """Not Suspended: spec.suspend was true and is now false."""
    OUTSIDE_WINDOWS = "OutsideWindows"
    """Suspended: no window of spec.schedule is open; the message says until when."""
    WINDOW_OPEN = "WindowOpen"
    """Not Suspended: a window of spec.schedule has opened."""
    STEPPED_DOWN = "SteppedDown"
    """Not Running: no node of the tier had room within isa.stepDownSeconds; a tier with other nodes is tried."""
    REQUEUED = "Requeued"
    """Not Running: the queue withdrew the quota that it had granted; the next attempt waits in the queue."""
    NOT_READY_IN_TIME = "NotReadyInTime"
    """Not Running: the queue took its quota back because not all pods were ready in time (Kueue's waitForPodsReady);
    the next attempt comes later each time."""
    RELEASED = "Released"
    """Not Running: only some of the pods could be scheduled, so they released their nodes for other jobs."""
    SHRUNK = "Shrunk"
    """Not Running: only some of the pods could be scheduled; the next attempt makes do with as many, as
    topology.minPods allows."""
    FINISHED = "Finished"
    """Not Running: the job is over."""

    # What a job waits for.
    INVALID_SPEC = "InvalidSpec"
    """Not Initialized: this operator cannot read the spec, or cannot write the RunConfig that the job's image reads."""
    IMAGE_NOT_ALLOWED = "ImageNotAllowed"
    """Not Initialized: the administrator does not allow spec.image."""
    SOURCE_NOT_ALLOWED = "SourceNotAllowed"
    """Not Initialized: the administrator does not allow a source, or the destination."""
    LIMIT_EXCEEDED = "LimitExceeded"
    """Not Initialized: the job asks for more than the administrator allows a single job."""
    SCHEDULING_NOT_ALLOWED = "SchedulingNotAllowed"
    """Not Initialized: the administrator does not allow a queue, priority class, node label or toleration that the job
    names."""
    NAME_CONFLICT = "NameConflict"
    """Not Initialized: an object that does not belong to the job already has the name of one of its children."""
    REFUSED = "Refused"
    """Not Initialized, or not Running: the API server refused a child of the job, or its pods; the message is
    the API server's."""
    API_SERVER_ERROR = "ApiServerError"
    """Not Initialized, or not Running: the API server has failed repeatedly, or did not answer, for instance because an
    admission webhook is down; the message is the API server's."""
    NO_MATCHING_NODES = "NoMatchingNodes"
    """Not Initialized: no tier of isa.allowed has enough nodes."""
    BACK_OFF = "BackOff"
    """Not Initialized: the next attempt is delayed because earlier ones failed."""
    PODS_REMAIN = "PodsRemain"
    """Not Initialized: a pod of an earlier attempt is still running."""
    QUEUED = "Queued"
    """Not QuotaReserved: the queue has not admitted the job."""
    DEACTIVATED = "Deactivated"
    """Not QuotaReserved: the queue's administrator holds the job by its Workload, until that is activated again."""
    ADMITTED = "Admitted"
    """QuotaReserved: the queue has admitted the job."""
    STARTED = "Started"
    """Initialized: the attempt's Job exists."""
    STARTING = "Starting"
    """Not Running: pods are being placed and started."""
    UNSCHEDULABLE = "Unschedulable"
    """Not Running: the scheduler finds no node for a pod; the message is the scheduler's."""
    IMAGE_PULL_ERROR = "ImagePullError"
    """Not Running: a node cannot pull the trainer image."""
    VOLUME_NOT_READY = "VolumeNotReady"
    """Not Running: a claim does not exist, is not bound, or cannot be mounted."""
    CONTAINER_CONFIG_ERROR = "ContainerConfigError"
    """Not Running: a container cannot be created, for instance because a Secret is missing."""
    QUOTA_EXCEEDED = "QuotaExceeded"
    """Not Initialized, or not Running: the namespace's quota or limits refuse the job's children or pods."""

    # How a job runs.
    FETCHING = "Fetching"
    """Running: remote sources are being fetched into the workspace."""
    LOADING = "Loading"
    """Running: every rank is up; the first step has not been completed."""
    TRAINING = "Training"
    """Running: the model is being trained."""
    EVALUATING = "Evaluating"
    """Running: the model is being evaluated."""
    PUBLISHING = "Publishing"
    """Running: the adapter is being verified and stored."""
    EXPORTING = "Exporting"
    """Running: what output.formats asks for is being made of the adapter."""
    UPLOADING = "Uploading"
    """Running: the adapter is being uploaded to output.destination."""
