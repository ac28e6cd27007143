"""The Service through which ranks find rank 0."""

from collections.abc import Mapping
from typing import Any

from qlora_contract.env import PROGRESS_PORT, RENDEZVOUS_PORT
from qlora_operator.api import names
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired.metadata import metadata
from qlora_operator.settings import Settings


def has_service(job: QLoRAJob) -> bool:
    """Whether a job's ranks need one: those of a single pod meet on its loopback. Kubernetes writes a Service's
    endpoints several times, and compares each change of a pod with every Service of the namespace."""
    return job.spec.topology.pods > 1


def ranks_service(job: QLoRAJob, *, uid: str) -> dict[str, Any]:
    """A headless Service: rank 0's pod of each attempt has a name in DNS, ready or not.

    Ranks look for it before any of them is ready, and learn of each other there. The other pods are not in the Service:
    for each change of one that is, Kubernetes writes its endpoints anew.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(job, uid, names.ranks_service(job.metadata.name), names.Role.DISCOVERY),
        "spec": _spec(uid),
    }


def is_ranks_service(raw: Mapping[str, Any], _: Settings) -> bool:
    """Whether a Service from the API is as it was made; API servers add fields of their own."""
    found, wanted = raw["spec"], _spec(raw["metadata"]["labels"][names.JOB_UID_LABEL])
    ports = [
        {key: port.get(key) for key in ("name", "port", "protocol")} for port in found.get("ports") or ()
    ]
    return {**{key: found.get(key) for key in wanted}, "ports": ports} == wanted


def _spec(uid: str) -> dict[str, Any]:
    return {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {
            names.JOB_UID_LABEL: uid,
            names.ROLE_LABEL: names.Role.TRAINER.value,
            names.INDEX_LABEL: "0",
        },
        "ports": [
            {"name": "rendezvous", "port": RENDEZVOUS_PORT, "protocol": "TCP"},
            {"name": "progress", "port": PROGRESS_PORT, "protocol": "TCP"},
        ],
    }
