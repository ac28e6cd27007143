"""Which connections to a job's pods are allowed."""

from collections.abc import Mapping
from typing import Any

from qlora_contract.env import PROGRESS_PORT
from qlora_operator.api import names
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired.metadata import metadata, pods_of
from qlora_operator.settings import Settings

DNS_PORT = 53


def network_policy(job: QLoRAJob, *, uid: str, settings: Settings) -> dict[str, Any]:
    """A NetworkPolicy: the job's pods accept connections from each other, and from scrapers to the progress port.

    Between ranks every port is open, since gloo listens on ports that the kernel chooses. Where the administrator
    restricts it, they reach each other, DNS and what the settings name.
    """
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(job, uid, names.ranks_network_policy(job.metadata.name), names.Role.ISOLATION),
        "spec": _spec(uid, settings),
    }


def is_network_policy(raw: Mapping[str, Any], settings: Settings) -> bool:
    """Whether a NetworkPolicy from the API is what these settings make: scrapers change, and somebody may open it."""
    return bool(raw["spec"] == _spec(raw["metadata"]["labels"][names.JOB_UID_LABEL], settings))


def _spec(uid: str, settings: Settings) -> dict[str, Any]:
    ingress: list[dict[str, Any]] = [{"from": [{"podSelector": pods_of(uid)}]}]
    if settings.scrapers:  # an empty `from` would mean everyone
        port = {"port": PROGRESS_PORT, "protocol": "TCP"}
        ingress.append({"from": list(settings.scrapers), "ports": [port]})
    spec: dict[str, Any] = {"podSelector": pods_of(uid), "policyTypes": ["Ingress"], "ingress": ingress}
    if settings.egress is not None:
        dns = {"ports": [{"port": DNS_PORT, "protocol": protocol} for protocol in ("UDP", "TCP")]}
        spec["policyTypes"] = ["Ingress", "Egress"]
        spec["egress"] = [{"to": [{"podSelector": pods_of(uid)}]}, dns, *settings.egress]
    return spec
