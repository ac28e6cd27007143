"""A control plane of its own: releases bring and take the definition that other tests rely on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testcluster.chart import Releases
from testcluster.client import ApiError
from testcluster.control_plane import ControlPlane, down
from testcluster.fixtures import fresh_namespace
from testcluster.waiting import wait_for

DEFINITION_GONE_SECONDS = 120
"""The API server deletes a definition's objects first, and tries again after ever longer whiles when it was not yet
ready to serve them: on a busy machine half a minute is not enough."""
CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qlorajobs.qlora.dev"


@pytest.fixture(scope="session")
def chart_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane without nodes, where the kinds of the Prometheus operator are known."""
    started = ControlPlane.start(tmp_path_factory.mktemp("chart-cluster") / "cluster")
    monitoring = str(Path(__file__).parent / "monitoring.yaml")
    started.kubectl("apply", "-f", monitoring)
    started.kubectl("wait", "--for=condition=Established", "-f", monitoring)
    yield started
    started.stop()
    down(started.folder)


@pytest.fixture
def new_namespace(chart_cluster: ControlPlane, request: pytest.FixtureRequest) -> Iterator[Callable[[], str]]:
    """make() -> a namespace that enforces Pod Security restricted."""
    made = []

    def make() -> str:
        made.append(fresh_namespace(chart_cluster, request.node.name))
        return made[-1].__enter__()

    yield make
    for namespace in made:
        namespace.__exit__(None, None, None)


@pytest.fixture
def new_releases(
    chart_cluster: ControlPlane, new_namespace: Callable[[], str]
) -> Iterator[Callable[[], Releases]]:
    """make() -> helm in a namespace of its own. Every release goes with the test, and so does the definition."""
    made: list[Releases] = []

    def make() -> Releases:
        made.append(Releases(chart_cluster, new_namespace()))
        return made[-1]

    yield make
    for releases in made:
        for name in releases("list", "--short").split():
            releases("uninstall", name)
    if definition(chart_cluster):
        chart_cluster.client.delete(CRD)
    wait_for(
        lambda: not definition(chart_cluster), DEFINITION_GONE_SECONDS, or_else="the end of the definition"
    )


@pytest.fixture
def has_definition(chart_cluster: ControlPlane) -> Callable[[], bool]:
    """Whether the definition of QLoRAJobs is there."""
    return lambda: definition(chart_cluster)


def definition(cluster: ControlPlane) -> bool:
    """Whether the definition of QLoRAJobs is there."""
    try:
        cluster.client.get(CRD)
    except ApiError as error:
        if error.code == 404:
            return False
        raise
    return True
