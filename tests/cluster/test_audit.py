"""The audit log of a control plane."""

import pytest

from testcluster.audit import granted, permission, requests
from testcluster.client import ApiError, Client
from testcluster.control_plane import ControlPlane

pytestmark = pytest.mark.cluster


def test_requests_are_told(control_plane: ControlPlane, namespace: str) -> None:
    """A user's requests are told with what each needs, the refused ones too, and nobody else's."""
    client = Client(control_plane.kubeconfig_for("default", namespace))
    with pytest.raises(ApiError, match="cannot list resource"):
        client.get(f"/api/v1/namespaces/{namespace}/secrets")
    with pytest.raises(ApiError, match="cannot patch resource"):
        client.patch(f"/apis/batch/v1/namespaces/{namespace}/jobs/x/status", {})
    client.close()

    found = requests(control_plane, f"system:serviceaccount:{namespace}:default")
    assert [permission(entry) for entry in found] == [
        ("list", "", "secrets"),
        ("patch", "batch", "jobs/status"),
    ]


def test_a_role_in_permissions() -> None:
    """Each rule allows each of its verbs for each of its resources."""
    rule = {"apiGroups": ["batch"], "resources": ["jobs", "jobs/status"], "verbs": ["get", "list"]}

    assert granted({"rules": [rule]}) == {
        ("get", "batch", "jobs"),
        ("list", "batch", "jobs"),
        ("get", "batch", "jobs/status"),
        ("list", "batch", "jobs/status"),
    }
