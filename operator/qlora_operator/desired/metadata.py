"""The metadata of a job's children: names, labels, and the job as their owner."""

from typing import Any

from qlora_operator.api import names
from qlora_operator.api.run_config import DEFAULT_NAMESPACE
from qlora_operator.api.v1alpha1 import QLoRAJob


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
    """A label selector for all pods of a job, but not those of an earlier job of the same name."""
    return {"matchLabels": {names.JOB_UID_LABEL: uid}}


def metadata(
    job: QLoRAJob, uid: str, name: str, role: names.Role, attempt: int | None = None
) -> dict[str, Any]:
    """Metadata of a child, which is deleted with the job.

    The job is its controller and blocks its own deletion in the foreground: `kubectl delete --cascade=foreground` then
    returns when the pods are gone. Clusters that check owner references (OpenShift) require the permission to update
    qlorajobs/finalizers in return.
    """
    return {
        "name": name,
        "namespace": job.metadata.namespace or DEFAULT_NAMESPACE,
        "labels": labels(job, uid, role, attempt),
        "ownerReferences": [{**owner(job, uid), "controller": True, "blockOwnerDeletion": True}],
    }


def owner(job: QLoRAJob, uid: str) -> dict[str, Any]:
    """An owner reference: what has only such goes with the job."""
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": job.metadata.name, "uid": uid}


def owning_job(name: str, uid: str) -> dict[str, Any]:
    """The owner reference by which one of Kueue's Workloads belongs to a batch/v1 Job."""
    return {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid, "controller": True}
