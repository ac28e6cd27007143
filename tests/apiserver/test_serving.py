"""The manifests of docs/serving.md, looked at by a real API server."""

from pathlib import Path

import pytest
import yaml

from testcluster.cluster import Cluster

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
SERVING = sorted((ROOT / "manifests" / "serving").glob("*.yaml"))


@pytest.mark.parametrize("path", SERVING, ids=lambda path: path.stem)
def test_a_manifest_is_accepted(path: Path, api_cluster: Cluster, namespace: str) -> None:
    """With every field known, and its pods admitted under Pod Security *restricted*."""
    client = api_cluster.client
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    client.patch(f"/api/v1/namespaces/{namespace}", {"metadata": {"labels": labels}})
    objects = list(yaml.safe_load_all(path.read_text()))
    created = api_cluster.kubectl("apply", "--validate=strict", "-n", namespace, "-f", str(path))
    template = next(each["spec"]["template"] for each in objects if each["kind"] == "Deployment")
    pod = {"metadata": {"name": "alone", **template["metadata"]}, "spec": template["spec"]}
    client.post(f"/api/v1/namespaces/{namespace}/pods", pod)

    assert created.count("created") == len(objects)


def test_the_page_names_every_manifest() -> None:
    """And no other."""
    page = (ROOT / "docs" / "serving.md").read_text()

    assert SERVING
    assert all(f"manifests/serving/{path.name}" in page for path in SERVING)
