"""Two real copies of the operator, of which one writes: who dies, hangs or is stopped is followed by the other."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from testcluster.chart import RELEASE, SYSTEM
from testcluster.client import ApiError
from testcluster.control_plane import ControlPlane
from testcluster.faulty import FaultyProxy, after
from testcluster.waiting import wait_for
from testcluster.witness import Witness

pytestmark = pytest.mark.cluster

LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/{RELEASE}"
TAKE_OVER_SECONDS = 15
JOBS = 4


class Copy:
    """One of the two, and what it asks of the API server."""

    def __init__(self, operator: Any, proxy: FaultyProxy) -> None:
        self.operator, self.proxy = operator, proxy

    @property
    def leads(self) -> bool:
        """As its metrics say."""
        return "qlora_operator_leader 1.0" in self.operator.get("/metrics")[1]

    def writes(self, since: float = 0.0) -> list[str]:
        """What it asked to change since then, the Lease apart."""
        return [
            f"{call.verb} {call.resource}"
            for call in list(self.proxy.calls)
            if call.writes and call.resource != "leases" and call.time >= since
        ]


@pytest.fixture
def copies(
    new_operator: Callable[..., Any], control_plane: ControlPlane, account: Path, namespace: str
) -> Iterator[tuple[Copy, Copy]]:
    """One that leads, and one that waits."""
    with suppress(ApiError):  # of another test's operators, which are dead
        control_plane.client.delete(LEASE)
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            proxy = stack.enter_context(FaultyProxy(control_plane))
            operator = new_operator("--namespace", namespace, "--lease", f"{SYSTEM}/{RELEASE}")
            operator.kubeconfig = proxy.kubeconfig(account)
            operator.start()
            made.append(Copy(operator, proxy))
            wait_for(lambda: made[0].leads)
        yield made[0], made[1]


def begins(job: Any, attempt: int, seconds: float) -> None:
    """The attempt's pods are up."""
    pods = job.kubelet.pods(
        job.namespace, f"qlora.dev/job-name={job.name},qlora.dev/attempt={attempt}", 2, seconds=seconds
    )
    for pod in pods:
        job.kubelet.running(pod)
    job.until(lambda status: (status.get("phase"), status.get("attempt")) == ("Running", attempt), seconds)


def test_a_leader_that_is_killed_is_followed_within_fifteen_seconds(
    copies: tuple[Copy, Copy],
    make_job: Callable[..., Any],
    witness: Witness,
    terminations: None,
) -> None:
    """Killed in the middle of starting jobs: the other starts the rest, and nothing twice."""
    first, second = copies
    killed: list[float] = []

    def kill() -> None:
        killed.append(time.monotonic())
        first.operator.kill()

    with first.proxy.fault(after(kill), verb="create", resource="jobs", skip=1, times=1):
        jobs = [make_job(f"job-{number}") for number in range(JOBS)]
        wait_for(lambda: killed, or_else="the second job's Job")
    assert second.writes() == [], "it waits"
    assert (second.operator.get("/readyz")[0], second.operator.get("/healthz")[0]) == (200, 200)
    wait_for(lambda: second.leads, TAKE_OVER_SECONDS, or_else="another leader")
    assert time.monotonic() - killed[0] <= TAKE_OVER_SECONDS
    for job in jobs:
        begins(job, 0, 30)
    jobs[0].kubelet.failed(jobs[0].pods(0)[1], 1)
    begins(jobs[0], 1, 60)
    assert [job.status["restarts"]["user"] for job in jobs] == [1, 0, 0, 0]
    witness.look()
    assert witness.faults == []
    assert len(witness.jobs) == JOBS + 1
    assert all(len(made) == 1 for made in witness.jobs.values())


def test_a_leader_that_hung_writes_nothing_when_it_goes_on(
    copies: tuple[Copy, Copy],
    make_job: Callable[..., Any],
    control_plane: ControlPlane,
    witness: Witness,
    terminations: None,
) -> None:
    """Stopped for longer than the Lease lasts: the other does its work meanwhile, and it ends when it goes on."""
    first, second = copies
    job = make_job()
    begins(job, 0, 30)
    first.operator.process.send_signal(signal.SIGSTOP)
    try:
        job.kubelet.failed(job.pods(0)[1], 1)
        other = make_job("other")
        wait_for(lambda: second.leads, TAKE_OVER_SECONDS, or_else="another leader")
        begins(other, 0, 30)
        begins(job, 1, 60)
    finally:
        begun = time.monotonic()
        first.operator.process.send_signal(signal.SIGCONT)
    assert first.operator.process.wait(30) == 0
    assert first.writes(begun) == []
    assert "another operator leads" in first.operator.log.read_text()
    first.operator.start()
    assert (first.leads, second.leads) == (False, True)
    assert control_plane.client.get(LEASE)["spec"]["leaseTransitions"] == 2
    witness.look()
    assert witness.faults == []
    assert {attempt: len(made) for (_, attempt), made in witness.jobs.items()} == {"0": 1, "1": 1}


def test_a_leader_that_is_stopped_hands_over_at_once(
    copies: tuple[Copy, Copy], make_job: Callable[..., Any]
) -> None:
    """It gives the Lease back, so nobody waits for the Lease's end."""
    first, second = copies
    assert first.operator.kill(signal.SIGTERM) == 0
    wait_for(lambda: second.leads, 5, or_else="another leader")
    begins(make_job(), 0, 30)
    assert first.writes() == []
