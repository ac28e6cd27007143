"""What the operator does when the API server, the network or the operator itself fails."""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from testcluster.control_plane import ControlPlane
from testcluster.faulty import (
    Exchange,
    FaultyProxy,
    after,
    answer,
    before,
    cut,
    gone,
    hold,
    lose_answer,
    silence,
)
from testcluster.waiting import wait_for
from testcluster.witness import Witness

pytestmark = pytest.mark.cluster

MINE = "qlora-operator"
"""The User-Agent of the operator's own requests; kopf's have another."""
PATIENCE = 60
"""Seconds that a test waits for what takes back-offs, or several starts on a busy machine."""


@pytest.fixture
def make_operator(
    new_operator: Callable[..., Any], proxy: FaultyProxy, account: Path, namespace: str
) -> Callable[..., Any]:
    """make(**settings) -> an operator for the test's namespace, behind the proxy; not started."""

    def make(kubeconfig: Path = account, **settings: Any) -> Any:
        made = new_operator("--namespace", namespace, **settings)
        made.kubeconfig = proxy.kubeconfig(kubeconfig)
        return made

    return make


@pytest.fixture
def operator(make_operator: Callable[..., Any]) -> Any:
    """One that runs."""
    made = make_operator()
    made.start()
    return made


def mine(call: Any) -> bool:
    """Whether a request is one of the operator's own, not of kopf's."""
    return bool(call.agent == MINE)


def runs(job: Any, attempt: int) -> list[Any]:
    """Pods of the attempt, which runs; patient."""
    selector = f"qlora.dev/job-name={job.name},qlora.dev/attempt={attempt}"
    pods = job.kubelet.pods(job.namespace, selector, 2, seconds=PATIENCE)
    pods = [job.kubelet.running(pod) for pod in pods]
    job.until(lambda status: status.get("phase") == "Running" and status.get("attempt") == attempt, PATIENCE)
    return pods


def live_with_one_failure(job: Any) -> None:
    """A life: attempt 0 fails, attempt 1 succeeds, the job is deleted."""
    pods = runs(job, 0)
    job.kubelet.failed(pods[1], 1)
    job.succeed(runs(job, 1), PATIENCE)
    assert job.status["restarts"] == {"user": 1, "infrastructure": 0}
    assert [attempt["attempt"] for attempt in job.status["attempts"]] == [0, 1]
    job.delete()
    wait_for(lambda: not job.children(), PATIENCE, or_else="the end of all children")


def check(witness: Witness, attempts: int) -> None:
    """Never two gangs at a time, and one Job for each attempt."""
    witness.look()
    assert witness.faults == []
    assert sorted(attempt for _, attempt in witness.jobs) == [str(number) for number in range(attempts)]
    assert all(len(jobs) == 1 for jobs in witness.jobs.values()), witness.jobs


# --- the operator dies


class Kills:
    """A fault that kills the operator at random requests of its own, and starts it again as a kubelet does."""

    def __init__(self, operator: Any, seed: int, count: int) -> None:
        self.operator, self.left, self.random = operator, count, random.Random(seed)
        self.lock = threading.Lock()
        self._draw()

    def _draw(self) -> None:
        self.wait = self.random.randint(1, 10)

    async def __call__(self, exchange: Exchange) -> Any:
        """Pass, or kill: before the request is carried out, or after."""
        self.wait -= 1
        if self.wait > 0 or not self.left:
            return await exchange.forward()
        self.left -= 1
        self._draw()
        return await self.random.choice([before, after])(self._restart)(exchange)

    def _restart(self) -> None:
        with self.lock:  # two requests may be under way
            self.operator.kill()
            self.operator.start(wait=False)


KILLS = 4
"""In each life."""


@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(100, 175))]
)
def test_an_operator_killed_between_any_two_requests_makes_nothing_twice(
    seed: int,
    operator: Any,
    proxy: FaultyProxy,
    make_job: Callable[..., Any],
    witness: Witness,
    terminations: None,
) -> None:
    """Killed at 20 random requests, and at 300 in the soak: one gang at a time, one Job per attempt, no orphan,
    one restart paid."""
    kills = Kills(operator, seed, KILLS)
    with proxy.fault(kills, matches=mine):
        live_with_one_failure(make_job())
    assert kills.left == 0
    check(witness, attempts=2)


@pytest.mark.parametrize("code", [0, 1], ids=["done", "failed"])
def test_an_attempt_that_ends_while_no_operator_runs_is_judged_later(
    code: int, operator: Any, make_job: Callable[..., Any], witness: Witness, terminations: None
) -> None:
    """What came of an attempt while no operator ran is found out when one does."""
    job = make_job()
    pods = runs(job, 0)
    operator.kill()
    for pod in pods if code == 0 else pods[:1]:
        job.kubelet.succeeded(pod) if code == 0 else job.kubelet.failed(pod, code)
    kinds = {"Complete", "Failed"}
    wait_for(lambda: any(c["type"] in kinds for c in job.gangs()[0]["status"].get("conditions", [])))
    operator.start()
    if code:
        job.succeed(runs(job, 1), PATIENCE)
    status = job.until_phase("Succeeded")
    assert status["restarts"] == {"user": code, "infrastructure": 0}
    check(witness, attempts=1 + code)


def test_a_second_operator_is_harmless(
    make_operator: Callable[..., Any], make_job: Callable[..., Any], witness: Witness, terminations: None
) -> None:
    """A second operator is harmless: one gang, each attempt once, each failure paid for once."""
    both = [make_operator(), make_operator()]
    for each in both:
        each.start()
    live_with_one_failure(make_job())
    check(witness, attempts=2)
    assert [each.process.poll() for each in both] == [None, None]


def test_an_operator_asked_to_stop_finishes_what_it_began(
    operator: Any, proxy: FaultyProxy, make_job: Callable[..., Any]
) -> None:
    """Asked to stop in the middle of starting an attempt, the operator ends with 0 once that is done."""
    with proxy.fault(hold(2), verb="create", resource="jobs") as rule:
        job = make_job()
        wait_for(lambda: rule.hits)
        assert operator.kill(signal.SIGTERM) == 0
    assert [gang["metadata"]["name"] for gang in job.gangs()] == ["job-a0"]
    assert "Traceback" not in operator.log.read_text()
    assert "never" not in operator.log.read_text(), "a coroutine or a task was left behind"
    operator.start()
    runs(job, 0)


def test_an_operator_asked_to_stop_leaves_a_running_job_alone(
    operator: Any, make_job: Callable[..., Any]
) -> None:
    """Asked to stop while a job runs, the operator ends with 0, and leaves the job alone."""
    job = make_job()
    runs(job, 0)
    assert operator.kill(signal.SIGTERM) == 0
    assert "Traceback" not in operator.log.read_text()
    assert job.status["phase"] == "Running"


WEBHOOK = 'failed calling webhook "jobs.example": connection refused'


@pytest.mark.parametrize(
    ("verb", "resource"),
    [("create", "jobs"), ("create", "services"), ("create", "networkpolicies"), ("list", "nodes")],
)
def test_what_the_api_server_fails_at_is_told(
    operator: Any, proxy: FaultyProxy, make_job: Callable[..., Any], verb: str, resource: str
) -> None:
    """A webhook that is down fails every request, with 500: the job says so in the server's words, and goes on by
    itself."""
    fails = answer(500, "InternalError", message=WEBHOOK)
    with proxy.fault(fails, verb=verb, resource=resource):
        job = make_job()
        status = job.until(lambda status: WEBHOOK in (status.get("message") or ""), 20)
        said = {condition["type"]: condition for condition in status["conditions"]}["Initialized"]
        assert (said["status"], said["reason"]) == ("False", "ApiServerError")
        assert WEBHOOK in said["message"]
        # The Event comes after the status.
        wait_for(lambda: "ApiServerError" in [event["reason"] for event in job.events()], or_else="the Event")
        assert [event["reason"] for event in job.events()].count("ApiServerError") == 1
    job.succeed(runs(job, 0), PATIENCE)


@pytest.mark.parametrize(
    ("fault", "verb", "resource"),
    [
        pytest.param(silence, "create", "jobs", id="a request that is not answered"),
        pytest.param(silence, "list", "nodes", id="a list that is not answered"),
        pytest.param(silence, "list", "qlorajobs jobs", id="a resync that is not answered"),
        pytest.param(answer(500, message=WEBHOOK), "create", "services", id="requests that fail"),
    ],
)
def test_an_operator_asked_to_stop_does_so_soon(
    operator: Any, proxy: FaultyProxy, make_job: Callable[..., Any], fault: Any, verb: str, resource: str
) -> None:
    """Whatever is under way."""
    if "qlorajobs" in resource:
        operator.kill()
        with proxy.fault(fault, verb=verb, resource=resource) as rule:
            operator.start(wait=False)
            wait_for(lambda: rule.hits)
            _stops_soon(operator)
        return
    with proxy.fault(fault, verb=verb, resource=resource) as rule:
        make_job()
        wait_for(lambda: len(rule.hits) >= (1 if fault is silence else 3))
        _stops_soon(operator)


def _stops_soon(operator: Any) -> None:
    begun = time.monotonic()
    assert operator.kill(signal.SIGTERM) == 0
    assert time.monotonic() - begun < 15


# --- watches


@pytest.mark.parametrize(
    "settings",
    [{"sweepSeconds": 1}, {"watchInactivitySeconds": 1, "sweepSeconds": 3600}],
    ids=["the sweep sees it", "the watch is made anew"],
)
def test_a_job_goes_on_although_the_watches_hang(
    settings: dict[str, int],
    make_operator: Callable[..., Any],
    proxy: FaultyProxy,
    make_job: Callable[..., Any],
) -> None:
    """A job goes on although the watches stay open and tell nothing."""
    operator = make_operator(**settings)
    operator.start()
    times = 2 if "watchInactivitySeconds" in settings else None
    with proxy.fault(silence, verb="watch", resource="qlorajobs jobs", times=times) as rule:
        proxy.cut_watches()
        job = make_job()
        job.succeed(runs(job, 0), PATIENCE)
    assert len(rule.hits) >= 2


def test_a_watch_that_is_too_old_begins_anew(
    operator: Any, proxy: FaultyProxy, make_job: Callable[..., Any]
) -> None:
    """A watch that ends with 410 Gone begins anew from a list."""
    with proxy.fault(gone, verb="watch", resource="qlorajobs jobs", times=2) as rule:
        proxy.cut_watches()
        job = make_job()
        job.succeed(runs(job, 0), PATIENCE)
    assert len(rule.hits) == 2


def test_broken_connections_are_made_again(
    operator: Any, proxy: FaultyProxy, make_job: Callable[..., Any]
) -> None:
    """Requests and watches whose connections break are made again."""
    with proxy.fault(cut, matches=mine, skip=2, times=5) as rule:
        job = make_job()
        proxy.cut_watches()
        pods = runs(job, 0)
    proxy.cut_watches()
    job.succeed(pods, PATIENCE)
    assert len(rule.hits) == 5


def test_a_job_goes_on_when_the_api_server_restarts(
    operator: Any, control_plane: ControlPlane, make_job: Callable[..., Any]
) -> None:
    """The API server dies and comes back: the job goes on."""
    job = make_job()
    pods = runs(job, 0)
    control_plane.restart_apiserver()
    job.succeed(pods, PATIENCE)


# --- refusals


def test_nothing_is_made_twice_when_answers_get_lost(
    operator: Any, proxy: FaultyProxy, make_job: Callable[..., Any]
) -> None:
    """Whatever was created or saved while its answer got lost is found again: nothing is made twice."""
    with proxy.fault(lose_answer, matches=lambda call: call.writes and mine(call), times=6) as rule:
        job = make_job()
        runs(job, 0)
    assert len(rule.hits) == 6
    assert len(job.gangs()) == 1
    assert job.status["restarts"] == {"user": 0, "infrastructure": 0}


def test_retry_after_is_waited_for(operator: Any, proxy: FaultyProxy, make_job: Callable[..., Any]) -> None:
    """429 with Retry-After: nothing is asked about that resource before the time is over, then it goes on."""
    refusal = answer(429, "TooManyRequests", retry_after=3)
    with proxy.fault(refusal, verb="create", resource="jobs", times=1) as rule:
        job = make_job()
        runs(job, 0)
    refused = rule.hits[0].time
    later = [call.time - refused for call in proxy.calls if mine(call) and call.resource == "jobs"]
    assert min(seconds for seconds in later if seconds > 0) > 2.9


def test_a_conflict_on_the_status_is_judged_again(
    operator: Any, proxy: FaultyProxy, make_job: Callable[..., Any]
) -> None:
    """409 on a status update: the job is read again, and judged again."""
    conflict = answer(409, "Conflict")
    with proxy.fault(conflict, verb="update", resource="qlorajobs/status", times=3) as rule:
        job = make_job()
        runs(job, 0)
    assert len(rule.hits) == 3
    assert any(call.verb == "get" and call.resource == "qlorajobs" for call in proxy.calls)
    assert job.status["attempt"] == 0


@contextmanager
def restarting(operator: Any) -> Iterator[None]:
    """While in the block, the operator is started again whenever it gives up, as a kubelet does."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(0.5):
            if operator.process.poll() is not None:
                operator.start(wait=False)

    thread = threading.Thread(target=work, name="kubelet of the operator")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    "seconds",
    [30, pytest.param(180, marks=pytest.mark.soak)],
    ids=["30 s", "3 min"],
)
def test_all_is_made_good_after_an_api_server_s_errors(
    seconds: int,
    operator: Any,
    proxy: FaultyProxy,
    make_job: Callable[..., Any],
    witness: Witness,
    terminations: None,
) -> None:
    """While every request ends with 500, an attempt fails and a job is created: afterwards all is made good."""
    job = make_job()
    pods = runs(job, 0)
    with restarting(operator):
        with proxy.fault(answer(500, "InternalError")):
            proxy.cut_watches()
            job.kubelet.failed(pods[0], 1)
            other = make_job("other")
            time.sleep(seconds)
        job.succeed(runs(job, 1), PATIENCE)
        other.succeed(runs(other, 0), PATIENCE)
    assert job.status["restarts"] == {"user": 1, "infrastructure": 0}
    witness.look()
    assert witness.faults == []


@pytest.mark.parametrize("late", [False, True], ids=["renewed in time", "renewed late"])
def test_a_refused_token_is_read_anew(
    late: bool,
    operator: Any,
    proxy: FaultyProxy,
    account: Path,
    api_cluster: Any,
    make_job: Callable[..., Any],
) -> None:
    """A token that is refused is read anew from where it came from."""
    job = make_job()
    pods = runs(job, 0)
    old = proxy.calls[-1].token
    fresh = proxy.kubeconfig(api_cluster.kubeconfig_for("qlora-operator", "qlora-system")).read_text()
    with proxy.fault(answer(401, "Unauthorized"), matches=lambda call: call.token == old) as rule:
        if not late:
            operator.kubeconfig.write_text(fresh)
        proxy.cut_watches()
        if late:
            wait_for(lambda: len(rule.hits) > 4)
            operator.kubeconfig.write_text(fresh)
        job.succeed(pods, PATIENCE)
    assert rule.hits
    assert operator.process.poll() is None


# --- probes


def test_liveness_fails_while_a_job_takes_too_long(
    make_operator: Callable[..., Any], proxy: FaultyProxy, make_job: Callable[..., Any]
) -> None:
    """Liveness fails while a job has been worked on for too long, and says so; then it is well again."""
    operator = make_operator(stuckSeconds=1)
    operator.start()
    assert operator.get("/healthz") == (200, "ok\n")
    with proxy.fault(hold(8), verb="update", resource="qlorajobs/status", times=1):
        make_job()
        wait_for(lambda: "reconcil" in operator.get("/healthz")[1])
        assert operator.get("/healthz")[0] == 503
        wait_for(lambda: operator.get("/healthz")[0] == 200)


def test_the_operator_is_ready_once_it_has_looked_at_all_jobs(
    make_operator: Callable[..., Any], proxy: FaultyProxy
) -> None:
    """The operator is not ready before it has looked at all jobs, but alive."""
    operator = make_operator()
    with proxy.fault(answer(500), verb="list", resource="qlorajobs", matches=mine) as rule:
        operator.start(wait=False)
        wait_for(lambda: rule.hits)
        code, text = operator.get("/readyz")
        assert (code, operator.get("/healthz")[0]) == (503, 200)
        assert "the first resync has not completed" in text
    operator.ready()
