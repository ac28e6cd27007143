"""What an attempt waits for whose ranks are not all up."""

from qlora_operator.api.names import Reason
from qlora_operator.status.draft import Draft
from qlora_operator.status.observation import Gang, Pod, Said

_PULL = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
)
_VOLUME_EVENTS = frozenset({"FailedMount", "FailedAttachVolume", "FailedMapVolume"})
_CLAIM_WORDS = ("persistentvolumeclaim", "persistentvolume ")


def waiting(draft: Draft, gang: Gang) -> Said:
    """The one thing that helps most to know."""
    pods = draft.pods
    wanted = draft.job.spec.topology.pods
    for pod in pods:
        if said := _of_pod(pod):
            return said
    for warning in draft.seen.warnings:
        if warning.reason == "FailedCreate" and len(pods) < wanted:
            return Said(Reason.QUOTA_EXCEEDED, f"the pods are refused: {warning.message}")
        if warning.reason in _VOLUME_EVENTS:
            return Said(Reason.VOLUME_NOT_READY, warning.message)
    up = f"{gang.ready}/{wanted}"
    return Said(Reason.STARTING, f"{up} pods of attempt {gang.attempt} are ready")


def _of_pod(pod: Pod) -> Said | None:
    if pod.unschedulable is not None:
        claim = any(word in pod.unschedulable.lower() for word in _CLAIM_WORDS)
        reason = Reason.VOLUME_NOT_READY if claim else Reason.UNSCHEDULABLE
        return Said(reason, f"pod {pod.name}: {pod.unschedulable}")
    if pod.waiting is None or pod.over:
        return None
    detail = f"pod {pod.name} on node {pod.node}: {pod.waiting.message or pod.waiting.reason}"
    if pod.waiting.reason in _PULL:
        return Said(Reason.IMAGE_PULL_ERROR, detail)
    if pod.waiting.reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        return Said(Reason.CONTAINER_CONFIG_ERROR, detail)
    return None
