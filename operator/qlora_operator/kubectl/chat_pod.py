"""The pod of `kubectl qlora chat`: the trainer's image where the job's ranks run, with the job's workspace, read-only.

It speaks through the API server alone (attach), so that it needs no port, no Service and no network.
"""

import copy
from collections.abc import Mapping
from typing import Any

from qlora_contract import entry_points
from qlora_operator.api import names
from qlora_operator.api.v1alpha1 import QLoRAJob

ROLE = "chat"
LONGEST_SECONDS = 12 * 3600
"""A pod that nobody removes ends then, and it ends when its input does."""
GRACE_SECONDS = 5
KEPT_ENVIRONMENT = ("HOME", "TMPDIR", "HF_HOME", "PYTHONUNBUFFERED")
"""Variables of a rank's container that are no rank's alone."""


def chat_pod(job: QLoRAJob, template: Mapping[str, Any]) -> dict[str, Any]:
    """The pod for a job.

    Image, user, pull secrets, size, node requirements and volumes are those of the job's ranks. Nothing of it counts as
    a pod of the job: the operator waits for those to end. It is deleted with the job.

    Args:
        job: with its uid.
        template: pod template of an attempt of the job that trains; its run.json is the pod's.
    """
    assert job.metadata.uid is not None, "a job of the API server has one"
    spec = copy.deepcopy(dict(template["spec"]))
    container = next(c for c in spec["containers"] if c["name"] == names.TRAINER_CONTAINER)
    claims = {volume["name"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume}
    for unwanted in ("subdomain", "hostname", "topologySpreadConstraints"):
        spec.pop(unwanted, None)
    for unwanted in ("ports", "terminationMessagePath"):
        container.pop(unwanted, None)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": f"{job.metadata.name}-chat-",
            "labels": {
                **_others(template["metadata"].get("labels")),
                "app.kubernetes.io/name": names.SINGULAR,
                "app.kubernetes.io/instance": job.metadata.name,
                "app.kubernetes.io/component": ROLE,
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
        "spec": {
            **spec,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": LONGEST_SECONDS,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "containers": [
                {
                    **container,
                    "command": ["python", "-m", entry_points.CHAT],
                    "env": [e for e in container.get("env", []) if e["name"] in KEPT_ENVIRONMENT],
                    "stdin": True,
                    "stdinOnce": True,
                    "volumeMounts": [
                        {**mount, "readOnly": True} if mount["name"] in claims else mount
                        for mount in container["volumeMounts"]
                    ],
                }
            ],
        },
    }


def _others(labels: Mapping[str, str] | None) -> dict[str, str]:
    """Labels but for those that make a pod the job's: the administrator's own, such as a mesh's."""
    own = (f"{names.GROUP}/", "app.kubernetes.io/", "batch.kubernetes.io/", "kueue.x-k8s.io/")
    return {
        name: value
        for name, value in (labels or {}).items()
        if not name.startswith(own) and name not in ("controller-uid", "job-name")
    }
