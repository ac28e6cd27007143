"""What the operators of all tests before these asked the API server for; the last file of the folder, by its name.

The audit log is that of the session's API server: of a run of this file alone, it tells of one job.
"""

from collections.abc import Callable
from typing import Any

import pytest

from testcluster.audit import granted, permission, requests
from testcluster.chart import operator_role
from testcluster.control_plane import ControlPlane

pytestmark = pytest.mark.cluster

USER = "system:serviceaccount:qlora-system:qlora-operator"
NEVER = {"secrets", "configmaps", "serviceaccounts", "persistentvolumeclaims", "roles", "rolebindings"}
"""What jobs name, or what would give an operator more than it has."""


@pytest.fixture
def ran(operator: Any, make_job: Callable[..., Any], control_plane: ControlPlane) -> list[Any]:
    """The operator's requests of the whole session, of at least one job's life."""
    job = make_job()
    job.succeed(job.run())
    return requests(control_plane, USER)


def test_what_is_used_is_granted(ran: list[Any]) -> None:
    """The operator asks for nothing that its role does not grant."""
    assert {permission(entry) for entry in ran} - granted(operator_role()) == set()


def test_secrets_are_not_looked_at(ran: list[Any]) -> None:
    """No operator ever asked for a Secret, or for anything else that a job only names; nor may it."""
    asked = {entry["objectRef"]["resource"] for entry in ran}
    may = {resource for _, _, resource in granted(operator_role())}

    assert "qlorajobs" in asked
    assert not NEVER & (asked | may)
    assert "*" not in may
