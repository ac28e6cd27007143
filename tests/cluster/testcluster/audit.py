"""What the API server's audit log tells of a user's requests, in the words of RBAC."""

import json
from typing import Any

from testcluster.control_plane import ControlPlane

Object = dict[str, Any]
Permission = tuple[str, str, str]
"""Verb, API group, resource with its subresource."""


def requests(cluster: ControlPlane, user: str) -> list[Object]:
    """The user's requests for resources so far, whether or not they were allowed."""
    lines = cluster.audit_log.read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if entry["user"].get("username") == user and "objectRef" in entry]


def permission(entry: Object) -> Permission:
    """What a request needs."""
    ref = entry["objectRef"]
    resource = f"{ref['resource']}/{ref['subresource']}" if "subresource" in ref else ref["resource"]
    return entry["verb"], ref.get("apiGroup", ""), resource


def granted(role: Object) -> set[Permission]:
    """What a Role or ClusterRole allows."""
    return {
        (verb, group, resource)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
