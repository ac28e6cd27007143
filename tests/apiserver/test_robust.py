"""What the operator does when the API server, the network or the operator itself fails."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from testcluster.control_plane import ControlPlane
from testcluster.faulty import FaultyProxy, lose_answer

pytestmark = pytest.mark.cluster

MINE = "qlora-operator"
"""The User-Agent of the operator's own requests; kopf's have another."""
PATIENCE = 60
"""Seconds that a test waits for what needs a back-off, or a start on a busy machine."""


@pytest.fixture
def proxy(control_plane: ControlPlane) -> Iterator[FaultyProxy]:
    """Between the operator and the API server."""
    with FaultyProxy(control_plane) as made:
        yield made


@pytest.fixture
def operator(new_operator: Callable[..., Any], proxy: FaultyProxy, account: Path, namespace: str) -> Any:
    """A running operator for the test's namespace, behind the proxy."""
    made = new_operator("--namespace", namespace)
    made.kubeconfig = proxy.kubeconfig(account)
    made.start()
    return made


@pytest.fixture
def terminations(control_plane: ControlPlane, kubelet: Any, namespace: str) -> Iterator[None]:
    """Pods that are deleted end, as a kubelet sees to."""
    with kubelet.finish_terminations(namespace):
        yield


def test_lost_answers(operator: Any, proxy: FaultyProxy, make_job: Callable[..., Any]) -> None:
    """Whatever was created or saved while its answer got lost is found again: nothing is made twice."""
    with proxy.fault(lose_answer, matches=lambda call: call.writes and call.agent == MINE, times=6) as rule:
        job = make_job()
        job.run()
    assert len(rule.hits) == 6
    assert len(job.gangs()) == 1
    assert job.status["restarts"] == {"user": 0, "infrastructure": 0}
