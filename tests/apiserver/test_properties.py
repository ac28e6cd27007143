"""Whatever a user may write, the API server takes: the job, and what it renders to."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_contract.run_config import ISA_TIERS
from qlora_operator.api import names
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired.attempt_job import attempt_job
from qlora_operator.desired.network import network_policy
from qlora_operator.desired.service import ranks_service
from testcluster.client import Client
from testcluster.cluster import Cluster
from testcluster.fixtures import fresh_namespace

pytestmark = pytest.mark.cluster

UID = "0f8fad5b-d9cb-469f-a165-70867728950e"


def _strategies() -> ModuleType:
    """The random jobs and settings that the renderers are tested with."""
    path = Path(__file__).parents[1] / "qlora_operator" / "desired" / "conftest.py"
    spec = importlib.util.spec_from_file_location("strategies", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RANDOM = _strategies()


@pytest.fixture(scope="module")
def restricted(api_cluster: Cluster, crd: None) -> Any:
    """A namespace that enforces Pod Security restricted."""
    with fresh_namespace(api_cluster, "properties") as name:
        yield name


def dry_run(client: Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the API server would make of it; raises ApiError when it refuses."""
    return client.post(f"{path}?dryRun=All&fieldValidation=Strict", body)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=RANDOM.names_of_jobs,
    spec=RANDOM.specs,
    isa=st.sampled_from(ISA_TIERS),
    attempt=st.integers(0, 999_999),
    admins=RANDOM.random_settings,
)
def test_random_jobs_are_taken(
    api_cluster: Cluster,
    restricted: str,
    name: str,
    spec: dict[str, Any],
    isa: Any,
    attempt: int,
    admins: Any,
) -> None:
    """A random job that the models take is taken by the API server, and so are its children; its pods are
    admitted where Pod Security restricted is enforced."""
    client, core = api_cluster.client, f"/api/v1/namespaces/{restricted}"
    body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "spec": spec}
    body["metadata"] = {"name": name, "namespace": restricted}

    taken = dry_run(client, f"/apis/qlora.dev/v1alpha1/namespaces/{restricted}/qlorajobs", body)

    job = QLoRAJob.model_validate(taken)
    gang = attempt_job(
        job, uid=UID, attempt=attempt, isa=isa, image="registry.example/trainer:1", settings=admins
    )
    dry_run(client, f"/apis/batch/v1/namespaces/{restricted}/jobs", gang)
    dry_run(client, f"{core}/services", ranks_service(job, uid=UID))
    policies = f"/apis/networking.k8s.io/v1/namespaces/{restricted}/networkpolicies"
    dry_run(client, policies, network_policy(job, uid=UID, settings=admins))
    # Pods are judged when they are made, and a PriorityClass must be there by then.
    template = gang["spec"]["template"]
    pod = {key: value for key, value in template["spec"].items() if key != "priorityClassName"}
    metadata = {**template["metadata"], "generateName": f"{gang['metadata']['name']}-0-"}
    dry_run(client, f"{core}/pods", {"metadata": metadata, "spec": pod})
