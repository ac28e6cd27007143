"""The pod of `kubectl qlora chat`: the trainer's image where the job's ranks run, with the job's workspace, read-only.

It speaks through the API server alone (attach), so that it needs no port, no Service and no network.
"""

from collections.abc import Mapping
from typing import Any

from qlora_contract import entry_points
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.kubectl.own_pod import own_pod

ROLE = "chat"
GRACE_SECONDS = 5


def chat_pod(job: QLoRAJob, template: Mapping[str, Any]) -> dict[str, Any]:
    """The pod for a job, which ends when its input does.

    Args:
        job: with its uid.
        template: pod template of an attempt of the job that trains; its run.json is the pod's.
    """
    pod, container = own_pod(job, template, ROLE)
    claims = {volume["name"] for volume in pod["spec"]["volumes"] if "persistentVolumeClaim" in volume}
    pod["metadata"]["generateName"] = f"{job.metadata.name}-{ROLE}-"
    pod["spec"]["terminationGracePeriodSeconds"] = GRACE_SECONDS
    container.pop("terminationMessagePath", None)
    container |= {
        "command": ["python", "-m", entry_points.CHAT],
        "stdin": True,
        "stdinOnce": True,
        "volumeMounts": [
            {**mount, "readOnly": True} if mount["name"] in claims else mount
            for mount in container["volumeMounts"]
        ],
    }
    return pod
