"""Events about a job, for `kubectl describe`."""

import uuid
from datetime import datetime
from typing import Any

from qlora_contract.units import rfc3339
from qlora_operator.api.names import API_VERSION, COMPONENT, KIND
from qlora_operator.api.v1alpha1 import QLoRAJob

MAX_MESSAGE = 1024
"""Characters: the API server takes no more."""


def event(job: QLoRAJob, uid: str, kind: str, reason: str, message: str, now: datetime) -> dict[str, Any]:
    """A core/v1 Event."""
    metadata = job.metadata
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata.name}.{uuid.uuid4().hex[:16]}", "namespace": metadata.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": metadata.name,
            "namespace": metadata.namespace,
            "uid": uid,
        },
        "type": kind,
        "reason": reason,
        "message": message[:MAX_MESSAGE],
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": COMPONENT,
        "firstTimestamp": rfc3339(now),
        "lastTimestamp": rfc3339(now),
        "count": 1,
    }
