"""What one tenant does, and what the others notice of it: nothing."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from builders import ON_ONE_CLAIM, job_manifest
from testcluster.chart import RBAC, RELEASE, SYSTEM, render
from testcluster.cluster import Cluster
from testcluster.fixtures import fresh_namespace
from testcluster.kubelet import Kubelet
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

GIVES_UP = 60
"""Seconds after which kopf, as it is set by default, ends the operator if a request is refused each time."""


@pytest.fixture
def other(api_cluster: Cluster) -> Iterator[str]:
    """Another tenant's namespace."""
    with fresh_namespace(api_cluster, "other") as name:
        yield name


@pytest.mark.slow
def test_a_namespace_that_takes_its_role_away_stops_no_other(
    new_operator: Callable[..., Any],
    make_job: Callable[..., Any],
    api_cluster: Cluster,
    kubelet: Kubelet,
    namespace: str,
    other: str,
) -> None:
    """The administrators of a namespace may delete the operator's RoleBinding there. Others' jobs start and run; theirs
    go on once it is back."""
    release = "tenants"
    objects = [
        each for each in render({"namespaces": [namespace, other]}, release=release) if each["kind"] in RBAC
    ]
    api_cluster.kubectl("apply", "--server-side", "-f", "-", input=yaml.safe_dump_all(objects))
    account = f"{release}-{RELEASE}"
    binding = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{other}/rolebindings/{account}.{SYSTEM}"
    kept = api_cluster.client.get(binding)
    operator = new_operator("--namespace", namespace, "--namespace", other, sweepSeconds=1)
    operator.kubeconfig = api_cluster.kubeconfig_for(account, SYSTEM)
    operator.start()

    api_cluster.client.delete(binding)
    wait_for(lambda: "qlora_namespaces_refused 1.0" in operator.get("/metrics")[1])
    operator.kill()
    operator.start()
    time.sleep(GIVES_UP)

    assert operator.process.poll() is None
    assert (operator.get("/readyz")[0], operator.get("/healthz")[0]) == (200, 200)
    make_job().run()
    path = f"/apis/qlora.dev/v1alpha1/namespaces/{other}/qlorajobs"
    api_cluster.client.post(path, job_manifest(**ON_ONE_CLAIM))
    fresh = {key: kept["metadata"][key] for key in ("name", "namespace", "labels")}
    api_cluster.client.post(binding.rpartition("/")[0], {**kept, "metadata": fresh})
    wait_for(lambda: api_cluster.client.get(f"{path}/job").get("status", {}).get("phase") == "Starting", 60)
