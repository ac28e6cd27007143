"""Metrics, and the server of metrics and probes."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from qlora_operator.api.names import Phase
from qlora_operator.controller.metrics import JOBS_SHOWN, OTHERS, JobSample, Metrics, Probe, serve

HOST = "127.0.0.1"
JOB = ("namespace", "name")


@pytest.fixture
def metrics() -> Metrics:
    """Of an operator that has just started."""
    return Metrics(CollectorRegistry(), "1.2.3")


def samples(metrics: Metrics, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """The values of a metric by those of its labels, as a scraper reads them."""
    text = generate_latest(metrics.registry).decode()
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def test_jobs_are_counted_by_phase(metrics: Metrics) -> None:
    """Each job counts once, under its newest phase; a phase that no job has any more is not shown."""
    metrics.jobs.set("team", "a", JobSample(Phase.PENDING))
    metrics.jobs.set("team", "b", JobSample(Phase.RUNNING))
    metrics.jobs.set("other", "a", JobSample(Phase.RUNNING))
    metrics.jobs.set("team", "a", JobSample(Phase.RUNNING))

    assert samples(metrics, "qlora_jobs", "namespace", "phase") == {
        ("team", "Running"): 2,
        ("other", "Running"): 1,
    }


def test_the_job_that_has_waited_longest_is_told(metrics: Metrics) -> None:
    """By namespace and phase: where jobs come and go some job always waits, which says nothing."""
    metrics.jobs.set("team", "new", JobSample(Phase.PENDING, waiting_since=200.0))
    metrics.jobs.set("team", "old", JobSample(Phase.PENDING, waiting_since=100.0))
    metrics.jobs.set("team", "queued", JobSample(Phase.QUEUED, waiting_since=50.0))
    metrics.jobs.set("team", "up", JobSample(Phase.RUNNING))

    name = "qlora_jobs_waiting_since_timestamp_seconds"
    assert samples(metrics, name, "namespace", "phase") == {
        ("team", "Pending"): 100.0,
        ("team", "Queued"): 50.0,
    }


def test_a_job_that_is_gone_leaves_nothing(metrics: Metrics) -> None:
    """Neither its count nor its series stay, and to say twice that it is gone does no harm."""
    metrics.jobs.set("team", "a", JobSample(Phase.RUNNING, 412.0, 1.83))
    metrics.jobs.remove("team", "a")
    metrics.jobs.remove("team", "a")

    assert (
        samples(metrics, "qlora_jobs", "namespace", "phase") == samples(metrics, "qlora_job_loss", *JOB) == {}
    )
    assert samples(metrics, "qlora_job_tokens_per_second", *JOB) == {}


def test_running_jobs_have_speed_and_loss(metrics: Metrics) -> None:
    """Both are shown while the job runs, as soon as they are known."""
    metrics.jobs.set("team", "a", JobSample(Phase.RUNNING, 412.0, 1.83))
    metrics.jobs.set("team", "new", JobSample(Phase.RUNNING))

    assert samples(metrics, "qlora_job_tokens_per_second", *JOB) == {("team", "a"): 412.0}
    assert samples(metrics, "qlora_job_loss", *JOB) == {("team", "a"): 1.83}


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.RUNNING])
def test_other_jobs_have_neither(metrics: Metrics, phase: Phase) -> None:
    """The last figures of a job that has stopped are no current ones."""
    metrics.jobs.set("team", "a", JobSample(phase, 412.0, 1.83))

    assert samples(metrics, "qlora_job_tokens_per_second", *JOB) == {}
    assert samples(metrics, "qlora_job_loss", *JOB) == {}


def test_the_series_of_jobs_are_bounded(metrics: Metrics) -> None:
    """Beyond the limit speeds are summed under one name, so that their sum stays right, and losses left out."""
    for index in range(JOBS_SHOWN + 3):
        metrics.jobs.set("team", f"job-{index}", JobSample(Phase.RUNNING, 2.0, 1.0))

    speeds, losses = (
        samples(metrics, "qlora_job_tokens_per_second", *JOB),
        samples(metrics, "qlora_job_loss", *JOB),
    )
    assert len(speeds) == JOBS_SHOWN + 1
    assert speeds["", OTHERS] == 6.0
    assert sum(speeds.values()) == 2.0 * (JOBS_SHOWN + 3)
    assert len(losses) == JOBS_SHOWN
    assert samples(metrics, "qlora_jobs", "namespace", "phase") == {("team", "Running"): JOBS_SHOWN + 3}


def test_requests_are_counted_and_timed(metrics: Metrics) -> None:
    """By verb, resource and status; one that got no answer has a code of its own."""
    metrics.api_request("create", "jobs", 201, 0.02)
    metrics.api_request("create", "jobs", 201, 0.04)
    metrics.api_request("create", "jobs", None, 30.0)

    assert samples(metrics, "qlora_api_requests_total", "verb", "resource", "code") == {
        ("create", "jobs", "201"): 2,
        ("create", "jobs", "none"): 1,
    }
    assert samples(metrics, "qlora_api_request_duration_seconds_count", "verb", "resource") == {
        ("create", "jobs"): 3
    }
    assert samples(metrics, "qlora_api_request_duration_seconds_sum", "verb", "resource") == {
        ("create", "jobs"): pytest.approx(30.06)
    }


def test_what_the_operator_does_is_counted(metrics: Metrics) -> None:
    """Attempts, restarts by reason and budget, reconciliations, the queue and the sweep have their names."""
    metrics.attempts_started.inc()
    metrics.jobs_finished.labels("team", "Failed").inc()
    metrics.restarts.labels("Preempted", "infrastructure").inc()
    metrics.reconcile_errors.inc()
    metrics.reconcile_seconds.observe(0.2)
    metrics.queue_depth.set(7)
    metrics.workers_busy.inc()
    metrics.sweep_time.set(1e9)

    assert samples(metrics, "qlora_attempts_started_total") == {(): 1}
    assert samples(metrics, "qlora_jobs_finished_total", "namespace", "phase") == {("team", "Failed"): 1}
    assert samples(metrics, "qlora_restarts_total", "reason", "budget") == {
        ("Preempted", "infrastructure"): 1
    }
    assert samples(metrics, "qlora_reconcile_errors_total") == {(): 1}
    assert samples(metrics, "qlora_reconcile_duration_seconds_sum") == {(): 0.2}
    assert samples(metrics, "qlora_queue_depth") == {(): 7}
    assert samples(metrics, "qlora_workers_busy") == {(): 1}
    assert samples(metrics, "qlora_last_successful_sweep_timestamp_seconds") == {(): 1e9}
    assert samples(metrics, "qlora_operator_build_info", "version") == {("1.2.3",): 1}


def test_two_operators_in_one_process_share_nothing(metrics: Metrics) -> None:
    """Each has the registry that it was given."""
    other = Metrics(CollectorRegistry(), "1.2.3")
    other.attempts_started.inc()

    assert samples(metrics, "qlora_attempts_started_total") == {(): 0}


def fine() -> None:
    """Nothing is wrong."""


def answered(metrics: Metrics, path: str, liveness: Probe = fine, readiness: Probe = fine) -> tuple[Any, ...]:
    """Status, content type and text of an answer."""

    async def get(base: str) -> tuple[Any, ...]:
        async with aiohttp.ClientSession() as session, session.get(base + path) as answer:
            return answer.status, answer.headers["Content-Type"], await answer.text()

    return with_server(metrics, get, liveness, readiness)


def with_server(
    metrics: Metrics, use: Callable[[str], Awaitable[Any]], liveness: Probe = fine, readiness: Probe = fine
) -> Any:
    """What `use` makes of a server's address."""

    async def run() -> Any:
        runner = await serve(metrics.registry, 0, liveness, readiness, HOST)
        try:
            return await use(f"http://{HOST}:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_a_page_serves_all_who_ask_within_a_second(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches the port may ask without end, and making a page keeps reconciliation waiting."""
    monkeypatch.setattr("qlora_operator.controller.metrics.PAGE_SECONDS", 0.5)

    async def use(base: str) -> list[str]:
        pages = []
        async with aiohttp.ClientSession() as session:
            for pause in (0.0, 0.0, 0.6):
                await asyncio.sleep(pause)
                metrics.attempts_started.inc()
                async with session.get(f"{base}/metrics") as answer:
                    pages.append(await answer.text())
        return pages

    first, second, third = with_server(metrics, use)

    assert first == second
    assert "qlora_attempts_started_total 3.0" in third


def test_metrics_are_served(metrics: Metrics) -> None:
    """As Prometheus asks for them."""
    status, content_type, text = answered(metrics, "/metrics")

    assert status == 200
    assert content_type.startswith("text/plain; version=")
    assert 'qlora_operator_build_info{version="1.2.3"} 1.0' in text.splitlines()


@pytest.mark.parametrize(
    ("path", "liveness", "readiness", "answer"),
    [
        pytest.param("/healthz", None, "not synced", (200, "ok\n"), id="alive, not ready"),
        pytest.param("/readyz", None, "not synced", (503, "not synced\n"), id="not ready"),
        pytest.param("/healthz", "stuck for 300 s", None, (503, "stuck for 300 s\n"), id="stuck"),
        pytest.param("/readyz", "stuck for 300 s", None, (200, "ok\n"), id="stuck, but ready"),
    ],
)
def test_probes_say_what_is_wrong(
    metrics: Metrics, path: str, liveness: str | None, readiness: str | None, answer: tuple[int, str]
) -> None:
    """Each probe asks its own question; 503 with the sentence if something is wrong."""
    status, _, text = answered(metrics, path, lambda: liveness, lambda: readiness)

    assert (status, text) == answer


def test_probes_are_asked_anew(metrics: Metrics) -> None:
    """An answer tells the state at that moment."""
    states = iter(["not synced", None])

    async def twice(base: str) -> list[int]:
        async with aiohttp.ClientSession() as session:
            return [(await session.get(f"{base}/readyz")).status for _ in range(2)]

    assert with_server(metrics, twice, fine, lambda: next(states)) == [503, 200]


def test_other_paths_are_not_found(metrics: Metrics) -> None:
    """There is nothing else to see."""
    assert answered(metrics, "/")[0] == 404


def test_a_taken_port_is_an_error(metrics: Metrics) -> None:
    """An operator without probes would be killed without a word, so it does not start."""
    with socket.create_server((HOST, 0)) as taken, pytest.raises(OSError, match="in use"):
        asyncio.run(serve(metrics.registry, taken.getsockname()[1], fine, fine, HOST))
