"""What becomes of jobs while the operator's release changes, goes and comes back."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from testcluster.chart import CHART, RELEASE, SYSTEM, Releases
from testcluster.cluster import Cluster
from testcluster.nodes import NodeCluster
from testcluster.waiting import wait_for

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(1200)]

Object = dict[str, Any]
DEFINITION = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qlorajobs.qlora.dev"


@pytest.fixture
def releases(operator: Cluster, values: Object, settle: Callable[[], None]) -> Iterator[Releases]:
    """The operator's, which is as it was when the test has ended."""
    made = Releases(operator, SYSTEM)
    yield made
    made.install(values)
    settle()


def newer_chart(folder: Path) -> Path:
    """The chart as a next version might have it: a definition with one more field, and another version."""
    chart = folder / "chart"
    shutil.copytree(CHART, chart)
    metadata = yaml.safe_load((chart / "Chart.yaml").read_text())
    (chart / "Chart.yaml").write_text(yaml.safe_dump({**metadata, "version": "99.0.0"}))
    definition = chart / "templates" / "crd.yaml"
    text = definition.read_text()
    before, field, after = text.partition("observedGeneration:\n")  # the status' own
    indent = before.rpartition("\n")[2]
    added = f"ofTheNextVersion:\n{indent}  type: string\n{indent}"
    definition.write_text(before + added + field + after)
    return chart


def test_a_job_outlives_every_change_of_the_release(
    operator: Cluster,
    releases: Releases,
    values: Object,
    settle: Callable[[], None],
    small_job: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Upgrade with a new definition, rollback, a killed operator, uninstall and installation anew, all while one job
    trains: it keeps its one attempt and its pods."""
    job = small_job("unmoved", training={"maxSteps": 8000})
    job.until_step(20)
    pods = [pod["metadata"]["uid"] for pod in job.pods()]

    def unmoved(step: int) -> None:
        job.until_step(step)
        assert [pod["metadata"]["uid"] for pod in job.pods()] == pods
        assert job.status["restarts"] == {"user": 0, "infrastructure": 0}

    chart = newer_chart(tmp_path)
    releases("upgrade", RELEASE, str(chart), values={**values, "timing": {"sweepSeconds": 30}})
    settle()
    assert "ofTheNextVersion" in str(operator.client.get(DEFINITION))
    unmoved(job.status["progress"]["step"] + 10)

    releases("rollback", RELEASE)
    settle()
    wait_for(lambda: "ofTheNextVersion" not in str(operator.client.get(DEFINITION)), 30)
    unmoved(job.status["progress"]["step"] + 10)

    operator.kubectl("-n", SYSTEM, "delete", "pod", "-l", "app.kubernetes.io/name=qlora-operator", "--force")
    settle()
    unmoved(job.status["progress"]["step"] + 10)

    releases("uninstall", RELEASE, "--wait")
    assert job.status["phase"] == "Running", "the definition and the job are kept"
    releases.install(values, "--take-ownership")
    settle()
    unmoved(job.status["progress"]["step"] + 10)

    assert len(job.status["attempts"]) == 1
    assert job.status["phase"] == "Running"


def test_helm_test_runs_a_job(
    operator: Cluster, releases: Releases, values: Object, settle: Callable[[], None]
) -> None:
    """With a claim, `helm test` trains a tiny job to its end, and leaves nothing of it."""
    if not isinstance(operator, NodeCluster):
        pytest.skip("a cluster that exists has no claim of which this test could know")
    folder = operator.shared_volume(SYSTEM, "helm-test")
    releases.install({**values, "test": {"claim": "helm-test"}})
    settle()

    said = releases("test", RELEASE, "--logs", "--timeout", "15m")

    print(said)
    assert "Succeeded" in said
    assert operator.client.items(f"/apis/qlora.dev/v1alpha1/namespaces/{SYSTEM}/qlorajobs") == []
    assert list((folder / "qlora-helm-test").iterdir()) == []
