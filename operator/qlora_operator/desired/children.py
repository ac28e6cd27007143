"""What every child of a job has in common: labels, and the job as its owner."""

from typing import Any

from qlora_operator.api import names
from qlora_operator.api.types import QLoRAJob
from qlora_operator.desired.run_config import DEFAULT_NAMESPACE


def labels(job: QLoRAJob, uid: str, role: names.Role, attempt: int | None = None) -> dict[str, str]:
    """Labels of a child or of its pods; `attempt` for what belongs to one attempt."""
    result = {
        "app.kubernetes.io/name": names.SINGULAR,
        "app.kubernetes.io/instance": job.metadata.name,
        "app.kubernetes.io/component": role.value,
        "app.kubernetes.io/managed-by": names.COMPONENT,
        names.JOB_NAME_LABEL: job.metadata.name,
        names.JOB_UID_LABEL: uid,
        names.ROLE_LABEL: role.value,
    }
    return result if attempt is None else {**result, names.ATTEMPT_LABEL: str(attempt)}


def pods_of(uid: str) -> dict[str, Any]:
    """A label selector for all pods of a job, and of no earlier job of the same name."""
    return {"matchLabels": {names.JOB_UID_LABEL: uid}}


def metadata(
    job: QLoRAJob, uid: str, name: str, role: names.Role, attempt: int | None = None
) -> dict[str, Any]:
    """Metadata of a child that goes when the job goes."""
    return {
        "name": name,
        "namespace": job.metadata.namespace or DEFAULT_NAMESPACE,
        "labels": labels(job, uid, role, attempt),
        "ownerReferences": [_owner(job, uid)],
    }


def _owner(job: QLoRAJob, uid: str) -> dict[str, Any]:
    """The job as the controller of a child.

    It blocks the job's deletion in the foreground: `kubectl delete --cascade=foreground` then returns when the
    pods are gone. Clusters that check owner references (OpenShift) ask for the permission to update
    qlorajobs/finalizers in return.
    """
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": job.metadata.name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
