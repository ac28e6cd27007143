"""What an attempt waits for whose ranks are not all up."""

import re
from collections.abc import Sequence

from qlora_operator.api.names import Reason
from qlora_operator.status.draft import Draft
from qlora_operator.status.observation import Gang, Pod, Said, Warned
from qlora_operator.status.quote import quote

_WAITS = {
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
"""Why a container waits, in a kubelet's words and in ours."""
_VOLUME_EVENTS = frozenset({"FailedMount", "FailedAttachVolume", "FailedMapVolume"})
_OUTDATED = frozenset({"FailedScheduling"})
"""Events that say no more than the pod does, and stay when it is true no more."""
_CLAIM = re.compile(r"persistentvolumeclaim|persistentvolume |persistent volumes to bind", re.IGNORECASE)
_QUOTA = re.compile(
    r"(exceeded|failed|insufficient) quota|(usage|ratio) per (Container|Pod|PersistentVolumeClaim)"
)


def waiting(draft: Draft, gang: Gang) -> Said:
    """The one thing that helps most to know."""
    pods, warnings = draft.pods, draft.seen.warnings
    wanted = draft.wanted
    if len(pods) < wanted and (said := _of_refusal(gang, warnings)):
        return said
    for pod in pods:
        if said := _of_pod(pod) or _of_warnings(pod, warnings):
            return said
    return Said(Reason.STARTING, f"{gang.ready}/{wanted} pods of attempt {gang.attempt} are ready")


def by_quota(refusal: str) -> bool:
    """Whether it is a ResourceQuota or a LimitRange that the API server refuses an object for."""
    return _QUOTA.search(refusal) is not None


def _of_pod(pod: Pod) -> Said | None:
    if pod.unschedulable is not None:
        reason = Reason.VOLUME_NOT_READY if _CLAIM.search(pod.unschedulable) else Reason.UNSCHEDULABLE
        return Said(reason, f"pod {pod.name}: {quote(pod.unschedulable)}")
    if pod.waiting is None or pod.over or pod.waiting.reason not in _WAITS:
        return None
    words = quote(pod.waiting.message) or pod.waiting.reason
    return Said(_WAITS[pod.waiting.reason], f"{pod.where}: {words}")


def _of_refusal(gang: Gang, warnings: Sequence[Warned]) -> Said | None:
    """Why the Job controller does not get its pods: newest first."""
    for warning in warnings:
        if warning.reason == "FailedCreate" and warning.about == gang.uid:
            reason = Reason.QUOTA_EXCEEDED if by_quota(warning.message) else Reason.REFUSED
            return Said(reason, f"the pods of {gang.name} are refused: {quote(warning.message)}")
    return None


def _of_warnings(pod: Pod, warnings: Sequence[Warned]) -> Said | None:
    """What its node tells of a pod whose container says nothing, since there is none yet."""
    if pod.phase != "Pending":
        return None
    for warning in warnings:
        if warning.about == pod.uid and warning.reason not in _OUTDATED:
            reason = Reason.VOLUME_NOT_READY if warning.reason in _VOLUME_EVENTS else Reason.STARTING
            return Said(reason, f"{pod.where}: {quote(warning.message)}")
    return None
