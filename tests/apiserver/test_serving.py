"""The manifests of docs/serving.md, looked at by a real API server."""

from pathlib import Path

import pytest
import yaml

from testcluster import go_modules
from testcluster.cluster import Cluster
from testcluster.control_plane import ControlPlane
from testcluster.errors import ClusterError, KubectlError
from testcluster.fixtures import established
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
SERVING = sorted((ROOT / "manifests" / "serving").glob("*.yaml"))
KSERVE = ROOT / "manifests" / "serving" / "kserve.yaml"
"""The one of a kind that Kubernetes does not bring."""


@pytest.mark.parametrize("path", [each for each in SERVING if each != KSERVE], ids=lambda path: path.stem)
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


@pytest.fixture(scope="module")
def kserve(control_plane: ControlPlane) -> Path:
    """The sources of a KServe whose definitions of services and runtimes the API server has."""
    try:
        sources = go_modules.sources("kserve")
    except ClusterError as error:
        pytest.skip(f"KServe's definitions cannot be had here: {error}")
    for kind in ("inferenceservices", "clusterservingruntimes"):
        definition = sources / "config" / "crd" / "full" / f"serving.kserve.io_{kind}.yaml"
        control_plane.kubectl("apply", "--server-side", "-f", str(definition))
        path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{kind}.serving.kserve.io"
        # 40,000 lines of schema are compiled before they count.
        wait_for(
            lambda path=path: established(control_plane.client.get(path)),
            180,
            or_else=lambda path=path: f"{path}: {control_plane.client.get(path).get('status')}",
        )
    return sources


def test_kserve_accepts_its_manifest(
    kserve: Path, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """With every field known to its definition; a field that it does not know is refused."""
    service = yaml.safe_load(KSERVE.read_text())
    wrong = tmp_path / "wrong.yaml"
    service["spec"]["predictor"]["model"]["storageURI"] = "pvc://team-data/x"
    wrong.write_text(yaml.safe_dump(service))

    def apply(path: Path) -> str:
        return control_plane.kubectl(
            "apply",
            "--server-side",
            "--validate=strict",
            "--dry-run=server",
            "-n",
            namespace,
            "-f",
            str(path),
        )

    def accepted() -> bool:
        try:
            return "serverside-applied" in apply(KSERVE)
        except KubectlError as error:  # an API server tells of a new kind a moment after it serves it
            if "no matches for kind" in str(error):
                return False
            raise

    wait_for(accepted, 30, or_else="the service")
    with pytest.raises(KubectlError, match="storageURI"):
        apply(wrong)


def test_kserve_has_a_runtime_for_the_manifests_model(kserve: Path, control_plane: ControlPlane) -> None:
    """Of its own, chosen by the format's name, with the arguments that the manifest adds to."""
    service = yaml.safe_load(KSERVE.read_text())
    model = service["spec"]["predictor"]["model"]
    path = kserve / "config" / "runtimes" / "kserve-huggingfaceserver.yaml"
    runtime = yaml.safe_load(path.read_text())
    control_plane.kubectl("apply", "--server-side", "--validate=strict", "--dry-run=server", "-f", str(path))
    known = kserve / "python" / "huggingfaceserver" / "huggingfaceserver" / "__main__.py"
    options = {each.partition("=")[0] for each in model["args"]}

    formats = {each["name"] for each in runtime["spec"]["supportedModelFormats"] if each.get("autoSelect")}
    assert model["modelFormat"]["name"] in formats
    assert all(f'"{option}"' in known.read_text() for option in options)


def test_the_page_names_every_manifest() -> None:
    """And no other."""
    page = (ROOT / "docs" / "serving.md").read_text()

    assert SERVING
    assert all(f"manifests/serving/{path.name}" in page for path in SERVING)
