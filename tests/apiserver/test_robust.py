"""What the operator does when the API server, the network or the operator itself fails."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from urllib3.exceptions import HTTPError

from testcluster.client import ApiError
from testcluster.control_plane import ControlPlane
from testcluster.errors import ClusterError
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


# --- everything dies, over and over


class Player:
    """Plays the queue and the kubelets of a namespace from a thread, whatever of the cluster is away.

    What it does follows from what it reads, so that a write whose answer was lost does no harm. Of a job with number n,
    n % 3 attempts fail, and where n % 5 is 0, its queue takes the first one out.
    """

    RUNS = 2.0
    """Seconds for which ranks run."""
    ROOM = 15
    """Jobs that the queue lets in at a time."""

    def __init__(self, kubelet: Any, namespace: str) -> None:
        self.kubelet, self.client, self.namespace = kubelet, kubelet.client, namespace
        self.fails: dict[str, set[str]] = {}
        """By the job's name: the attempts that fail."""
        self.evicted: set[str] = set()
        """The names of jobs that the queue has taken out."""
        self.since: dict[str, float] = {}
        """When pods began to run, by uid."""

    @contextmanager
    def playing(self) -> Iterator[None]:
        """While in the block."""
        done = threading.Event()

        def work() -> None:
            while not done.wait(0.1):
                # Away is what this is about; a test that hangs says what stands still.
                with suppress(ApiError, ClusterError, HTTPError):
                    self._play()

        thread = threading.Thread(target=work, name="queue and kubelets")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _play(self) -> None:
        gangs = self.client.items(f"/apis/batch/v1/namespaces/{self.namespace}/jobs")
        open_gangs = [each for each in gangs if not _is_over(each)]
        room = self.ROOM - sum(not each["spec"]["suspend"] for each in open_gangs)
        for gang in open_gangs:
            job, _ = _whose(gang)
            suspended, goes = gang["spec"]["suspend"], _is_taken_out(gang)
            if suspended and room > 0 and not (goes and job in self.evicted):
                self._suspend(gang, suspend=False)
                room -= 1
            elif goes and not suspended and (job in self.evicted or gang["status"].get("ready") == 2):
                self.evicted.add(job)
                self._suspend(gang, suspend=True)
        for pod in self.client.items(f"/api/v1/namespaces/{self.namespace}/pods"):
            with suppress(ApiError):  # gone, or another is being made
                self._play_pod(pod)

    def _suspend(self, gang: dict[str, Any], *, suspend: bool) -> None:
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs/{gang['metadata']['name']}"
        same = {"uid": gang["metadata"]["uid"]}
        self.client.patch(path, {"metadata": same, "spec": {"suspend": suspend}})

    def _play_pod(self, pod: dict[str, Any]) -> None:
        job, attempt = _whose(pod)
        if pod["metadata"].get("deletionTimestamp"):
            self.kubelet.finish_termination(pod, exit_code=50 if _is_taken_out(pod) else 143)
            return
        phase = pod["status"].get("phase")
        if phase == "Pending":
            self.kubelet.running(pod)
        if phase != "Running" or _is_taken_out(pod):
            return
        since = self.since.setdefault(pod["metadata"]["uid"], time.monotonic())
        if time.monotonic() - since < self.RUNS:
            return
        fails = self.fails.setdefault(job, set())
        if attempt in fails or len(fails) < _number(job) % 3:
            fails.add(attempt)
            if pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] == "1":
                self.kubelet.failed(pod, 1)
        else:
            self.kubelet.succeeded(pod)


def _whose(child: dict[str, Any]) -> tuple[str, str]:
    labels = child["metadata"]["labels"]
    return labels["qlora.dev/job-name"], labels["qlora.dev/attempt"]


def _is_taken_out(child: dict[str, Any]) -> bool:
    """Whether it is of an attempt that its queue takes out."""
    job, attempt = _whose(child)
    return _number(job) % 5 == 0 and attempt == "0"


def _number(job: str) -> int:
    return int(job.removeprefix("job"))


def _is_over(gang: dict[str, Any]) -> bool:
    kinds = {each["type"] for each in gang["status"].get("conditions", [])}
    return bool(kinds & {"Complete", "Failed", "SuccessCriteriaMet", "FailureTarget"}) or bool(
        gang["metadata"].get("deletionTimestamp")
    )


IN_FLIGHT = int(os.environ.get("SOAK_JOBS", "50"))
ALL_KILLS = int(os.environ.get("SOAK_KILLS", "500"))
VICTIMS = ("operator", "kube-apiserver", "etcd", "kube-controller-manager")
DRAINED = 1800
"""Seconds in which the last jobs end on a busy machine."""


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_no_job_is_lost_or_doubled_whatever_dies(
    new_operator: Callable[..., Any],
    control_plane: ControlPlane,
    kubelet: Any,
    make_job: Callable[..., Any],
    witness: Witness,
    namespace: str,
) -> None:
    """500 kills of operator, API server, etcd and controller manager, with 50 jobs in flight under a queue: every job
    succeeds, with one gang at a time, one Job for each attempt, and just the restarts that its failures cost."""
    rng = random.Random(int(os.environ.get("SOAK_SEED", "0")))
    operator = new_operator("--namespace", namespace)
    operator.start()
    jobs: dict[str, Any] = {}
    ended = created = 0

    def settle(more: bool) -> bool:
        """Judge and delete what has ended, and make as many anew; whether none is left."""
        nonlocal ended, created
        for name, job in list(jobs.items()):
            status = job.status
            if status.get("phase") in ("Succeeded", "Failed"):
                _judge(player, name, status)
                job.delete()
                del jobs[name]
                ended += 1
        while more and len(jobs) < IN_FLIGHT:
            name = f"job{created}"
            jobs[name] = make_job(name, scheduling={"queueName": "team"}, backoffLimit=5)
            created += 1
        witness.look()
        return not jobs

    player = Player(kubelet, namespace)
    with restarting(operator), player.playing():
        settle(more=True)
        for _ in range(ALL_KILLS):
            victim = rng.choice(VICTIMS)
            time.sleep(rng.uniform(0, 2))
            if victim == "operator":
                operator.process.kill()  # and started again, like whatever gives up
                continue
            witness.look()
            control_plane.end(victim)
            time.sleep(rng.uniform(0, 2))
            control_plane.begin(victim)
            if victim != "kube-controller-manager":
                witness.look_anew()
            settle(more=True)
        wait_for(lambda: settle(more=False), DRAINED, or_else=lambda: _stands(jobs), every=1)
    print(f"{ALL_KILLS} kills, {ended} jobs, {sum(map(len, player.fails.values()))} failures")
    assert ended == created
    assert witness.faults == []
    assert all(len(gangs) == 1 for gangs in witness.jobs.values()), witness.jobs


def _judge(player: Player, name: str, status: dict[str, Any]) -> None:
    """That a job has succeeded, and paid for what failed and for nothing else."""
    assert status["phase"] == "Succeeded", (name, status)
    assert status["restarts"] == {"user": _number(name) % 3, "infrastructure": 0}, (name, status)
    assert len(player.fails.get(name, ())) == _number(name) % 3
    reasons = [attempt.get("reason") for attempt in status["attempts"]]
    assert reasons.count("Requeued") == (1 if _number(name) % 5 == 0 else 0), (name, reasons)
    assert len(status["attempts"]) == 1 + _number(name) % 3 + reasons.count("Requeued"), (name, reasons)


def _stands(jobs: dict[str, Any]) -> str:
    return str({name: (job.status.get("phase"), job.status.get("message")) for name, job in jobs.items()})
