"""What an attempt waits for while not all of its pods are ready."""

import re

from qlora_operator.api.names import Reason
from qlora_operator.status.observation import AttemptJob, Pod, ReasonMessage
from qlora_operator.status.sanitize import sanitize
from qlora_operator.status.view import JobView

_CONTAINER_REASONS = {
    "ErrImagePull": Reason.IMAGE_PULL_ERROR,
    "ImagePullBackOff": Reason.IMAGE_PULL_ERROR,
    "InvalidImageName": Reason.IMAGE_PULL_ERROR,
    "ErrImageNeverPull": Reason.IMAGE_PULL_ERROR,
    "ImageInspectError": Reason.IMAGE_PULL_ERROR,
    "RegistryUnavailable": Reason.IMAGE_PULL_ERROR,
    "SignatureValidationFailed": Reason.IMAGE_PULL_ERROR,
    "CreateContainerConfigError": Reason.CONTAINER_CONFIG_ERROR,
    "CreateContainerError": Reason.CONTAINER_CONFIG_ERROR,
    "RunContainerError": Reason.CONTAINER_CONFIG_ERROR,
}
"""Why a container waits: the kubelet's reason and ours."""
_VOLUME_EVENTS = frozenset({"FailedMount", "FailedAttachVolume", "FailedMapVolume"})
_OUTDATED_EVENTS = frozenset({"FailedScheduling"})
"""They repeat what the pod's status says, and remain after it is outdated."""
_CLAIM = re.compile(r"persistentvolumeclaim|persistentvolume |persistent volumes to bind", re.IGNORECASE)
_QUOTA = re.compile(
    r"(exceeded|failed|insufficient) quota|(usage|ratio) per (Container|Pod|PersistentVolumeClaim)"
)


def waiting_for(view: JobView, job: AttemptJob) -> ReasonMessage:
    """The one thing that helps most to know. Read.PODS, and Read.WARNINGS unless a pod says enough."""
    pods, desired = view.pods, view.desired_pods
    if len(pods) < desired and (rejection := _rejected_pods(view, job)):
        return rejection
    for pod in pods:
        if found := _pod_condition(pod) or _pod_warning(view, pod):
            return found
    return pods_ready(view, job)


def pods_ready(view: JobView, job: AttemptJob) -> ReasonMessage:
    """How many pods are ready: all that the Job tells by itself."""
    message = f"{job.ready}/{view.desired_pods} pods of attempt {job.attempt} are ready"
    return ReasonMessage(Reason.STARTING, message)


def is_quota_error(message: str) -> bool:
    """Whether it is a ResourceQuota or a LimitRange for which the API server rejects an object."""
    return _QUOTA.search(message) is not None


def _pod_condition(pod: Pod) -> ReasonMessage | None:
    """What the pod's own status says."""
    if pod.unschedulable is not None:
        reason = Reason.VOLUME_NOT_READY if _CLAIM.search(pod.unschedulable) else Reason.UNSCHEDULABLE
        return ReasonMessage(reason, f"pod {pod.name}: {sanitize(pod.unschedulable)}")
    if pod.gated:
        return ReasonMessage(Reason.STARTING, f"pod {pod.name} is held back from the scheduler by its gates")
    if pod.waiting is None or pod.finished or pod.waiting.reason not in _CONTAINER_REASONS:
        return None
    words = sanitize(pod.waiting.message) or pod.waiting.reason
    return ReasonMessage(_CONTAINER_REASONS[pod.waiting.reason], f"{pod.description}: {words}")


def _rejected_pods(view: JobView, job: AttemptJob) -> ReasonMessage | None:
    """Why the Job controller cannot create its pods, by the newest Event."""
    for warning in view.warnings:
        if warning.reason == "FailedCreate" and warning.about == job.uid:
            reason = Reason.QUOTA_EXCEEDED if is_quota_error(warning.message) else Reason.REFUSED
            message = f"the pods of {job.name} are refused: {sanitize(warning.message)}"
            return ReasonMessage(reason, message)
    return None


def _pod_warning(view: JobView, pod: Pod) -> ReasonMessage | None:
    """What Events say about a pod whose container has no status yet."""
    if pod.phase != "Pending":
        return None
    for warning in view.warnings:
        if warning.about == pod.uid and warning.reason not in _OUTDATED_EVENTS:
            reason = Reason.VOLUME_NOT_READY if warning.reason in _VOLUME_EVENTS else Reason.STARTING
            return ReasonMessage(reason, f"{pod.description}: {sanitize(warning.message)}")
    return None
