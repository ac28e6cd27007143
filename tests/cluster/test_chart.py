"""The helper that renders and installs the project's chart."""

import pytest

from testcluster.chart import RELEASE, SYSTEM, HelmError, find, helm, installed, operator_role, render
from testcluster.errors import ClusterError


def test_what_is_installed_has_the_operators_role() -> None:
    """manifests/install.yaml brings a namespace, the definition, an operator and what it may do."""
    objects = installed()

    assert find(objects, "Namespace")["metadata"]["name"] == SYSTEM
    assert find(objects, "Deployment", RELEASE)
    assert find(objects, "CustomResourceDefinition")
    assert {"pods", "jobs"} <= {
        resource for rule in operator_role()["rules"] for resource in rule["resources"]
    }


@pytest.mark.parametrize("name", [None, "other"], ids=["several", "none"])
def test_an_object_that_is_not_the_one(name: str | None) -> None:
    """Of several objects, or none, none is found, and the error says how many there were."""
    with pytest.raises(ClusterError, match=r"^[0-9]+ objects of kind ClusterRole"):
        find(installed(), "ClusterRole", name)


@pytest.mark.cluster
def test_a_rendering_is_of_its_release_and_namespace() -> None:
    """Objects are named and placed as asked."""
    service = find(render({"fullnameOverride": "x"}, release="r", namespace="n"), "Service")["metadata"]

    assert (service["name"], service["namespace"], service["labels"]["app.kubernetes.io/instance"]) == (
        "x",
        "n",
        "r",
    )


@pytest.mark.cluster
def test_helm_that_fails_is_an_error() -> None:
    """What helm says is in the error."""
    with pytest.raises(HelmError, match="unknown command") as failed:
        helm("hlep")
    assert "hlep" in failed.value.text
