"""A pod that the command starts itself, beside a job's: the trainer's image where the job's ranks run, with their
volumes."""

import copy
from collections.abc import Mapping
from typing import Any

from qlora_contract.env import PRICE_ENV
from qlora_operator.api import names
from qlora_operator.api.v1alpha1 import QLoRAJob

LONGEST_SECONDS = 12 * 3600
"""A pod that nobody removes ends then."""
KEPT_ENVIRONMENT = ("HOME", "TMPDIR", "HF_HOME", "PYTHONUNBUFFERED", PRICE_ENV)
"""Variables of a rank's container that are no rank's alone."""


def own_pod(job: QLoRAJob, template: Mapping[str, Any], role: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod, without a name, and its container, for the caller to complete.

    Image, user, pull secrets, size, node requirements and volumes are those of the job's ranks. Nothing of it counts as
    a pod of the job: the operator waits for those to end. It is deleted with the job.

    Args:
        job: with its uid.
        template: pod template of an attempt of the job that trains; its run.json is the pod's.
        role: what it is for; a label says it.
    """
    assert job.metadata.uid is not None, "a job of the API server has one"
    spec = copy.deepcopy(dict(template["spec"]))
    container = next(c for c in spec["containers"] if c["name"] == names.TRAINER_CONTAINER)
    for unwanted in ("subdomain", "hostname", "topologySpreadConstraints"):
        spec.pop(unwanted, None)
    container.pop("ports", None)
    container["env"] = [e for e in container.get("env", []) if e["name"] in KEPT_ENVIRONMENT]
    spec |= {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": LONGEST_SECONDS,
        "containers": [container],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "labels": {
                **_others(template["metadata"].get("labels")),
                "app.kubernetes.io/name": names.SINGULAR,
                "app.kubernetes.io/instance": job.metadata.name,
                "app.kubernetes.io/component": role,
            },
            "annotations": dict(template["metadata"].get("annotations") or {}),
            "ownerReferences": [
                {
                    "apiVersion": names.API_VERSION,
                    "kind": names.KIND,
                    "name": job.metadata.name,
                    "uid": job.metadata.uid,
                }
            ],
        },
        "spec": spec,
    }
    return pod, container


def _others(labels: Mapping[str, str] | None) -> dict[str, str]:
    """Labels but for those that make a pod the job's: the administrator's own, such as a mesh's."""
    own = (f"{names.GROUP}/", "app.kubernetes.io/", "batch.kubernetes.io/", "kueue.x-k8s.io/")
    return {
        name: value
        for name, value in (labels or {}).items()
        if not name.startswith(own) and name not in ("controller-uid", "job-name")
    }
