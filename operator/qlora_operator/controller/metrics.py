"""The operator's metrics, and the HTTP server for them and for the kubelet's probes.

Labels are bounded: namespaces, phases, documented reasons, verbs and resources that the operator itself uses;
series of single jobs are limited to JOBS_SHOWN.
"""

import time
from collections import Counter as Count
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qlora_operator.api.names import Phase

JOBS_SHOWN = 1000
"""Jobs with series of their own."""
OTHERS = "_others"
"""Name of the series that sums the jobs beyond JOBS_SHOWN; not a valid job name."""
PAGE_SECONDS = 1.0
"""How long one page of metrics serves all who ask."""
CLOSE_SECONDS = 1.0
"""Grace of responses under way when the operator stops."""

Probe = Callable[[], str | None]
"""Returns what is wrong, in a sentence; None: healthy."""


@dataclass(frozen=True)
class JobSample:
    """What the metrics show of a job."""

    phase: Phase
    tokens_per_second: float | None = None
    """Of all ranks, while it trains."""
    loss: float | None = None
    """Of the last step, while it trains."""
    waiting_since: float | None = None
    """Unix time since which it has wanted ranks that do not all run; None while they run, or it wants none."""


class JobsCollector(Collector):
    """Derives the metrics of jobs at each scrape, so that no series outlives its job."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str], JobSample] = {}

    def set(self, namespace: str, name: str, sample: JobSample) -> None:
        """Show this sample of a job from now on."""
        self._samples[namespace, name] = sample

    def remove(self, namespace: str, name: str) -> None:
        """Stop showing a job; idempotent."""
        self._samples.pop((namespace, name), None)

    def collect(self) -> Iterator[Metric]:
        """Jobs by phase; speed and loss of those that train."""
        samples = dict(self._samples)
        phases = GaugeMetricFamily("qlora_jobs", "Jobs by phase", labels=["namespace", "phase"])
        counts = Count((namespace, sample.phase.value) for (namespace, _), sample in samples.items())
        for labels, count in sorted(counts.items()):
            phases.add_metric(labels, count)
        yield phases
        yield _waiting(samples)
        running = [(job, sample) for job, sample in samples.items() if sample.phase is Phase.RUNNING]
        speeds = GaugeMetricFamily(
            "qlora_job_tokens_per_second",
            f"Tokens per second of a running job, all ranks; the jobs beyond {JOBS_SHOWN} are summed as {OTHERS}",
            labels=["namespace", "name"],
        )
        measured = [
            (job, sample.tokens_per_second) for job, sample in running if sample.tokens_per_second is not None
        ]
        for job, speed in measured[:JOBS_SHOWN]:
            speeds.add_metric(job, speed)
        if len(measured) > JOBS_SHOWN:
            speeds.add_metric(("", OTHERS), sum(speed for _, speed in measured[JOBS_SHOWN:]))
        yield speeds
        losses = GaugeMetricFamily(
            "qlora_job_loss",
            f"Mean loss per supervised token in the last step of a running job; at most {JOBS_SHOWN} jobs",
            labels=["namespace", "name"],
        )
        known = [(job, sample.loss) for job, sample in running if sample.loss is not None]
        for job, loss in known[:JOBS_SHOWN]:
            losses.add_metric(job, loss)
        yield losses


def _waiting(samples: dict[tuple[str, str], JobSample]) -> Metric:
    """The oldest of the jobs that wait: how many there are says nothing of how long each has waited."""
    oldest: dict[tuple[str, str], float] = {}
    for (namespace, _), sample in samples.items():
        if sample.waiting_since is not None:
            labels = namespace, sample.phase.value
            oldest[labels] = min(sample.waiting_since, oldest.get(labels, sample.waiting_since))
    family = GaugeMetricFamily(
        "qlora_jobs_waiting_since_timestamp_seconds",
        "Unix time since which the job of this phase that has waited longest waits for all of its ranks to run",
        labels=["namespace", "phase"],
    )
    for labels, since in sorted(oldest.items()):
        family.add_metric(labels, since)
    return family


class Metrics:
    """All metrics of one operator, in a registry of its own."""

    def __init__(self, registry: CollectorRegistry, version: str) -> None:
        self.registry = registry
        self.jobs = JobsCollector()
        registry.register(self.jobs)
        self.attempts_started = Counter("qlora_attempts_started", "Attempts started", registry=registry)
        self.jobs_finished = Counter(
            "qlora_jobs_finished",
            "Jobs finished since the operator started; phase: Succeeded or Failed",
            ["namespace", "phase"],
            registry=registry,
        )
        self.restarts = Counter(
            "qlora_restarts",
            "Attempts that ended early and were followed by another; budget: user, infrastructure or none",
            ["reason", "budget"],
            registry=registry,
        )
        self.leader = Gauge(
            "qlora_operator_leader",
            "1: this copy of the operator starts and ends attempts; 0: it waits for another to stop",
            registry=registry,
        )
        self.core_hours = Counter(
            "qlora_core_hours",
            "CPUs times hours of training attempts that ended since the operator started",
            ["namespace"],
            registry=registry,
        )
        self.cost = Counter(
            "qlora_cost",
            "Core-hours of these attempts times the price in the operator's settings",
            ["namespace", "currency"],
            registry=registry,
        )
        self.queue_seconds = Counter(
            "qlora_queue_seconds",
            "Seconds that these attempts waited until all of their ranks were up",
            ["namespace"],
            registry=registry,
        )
        self.lost_steps = Counter(
            "qlora_lost_steps",
            "Optimizer steps of attempts that ended early, which the next attempt made again",
            ["namespace"],
            registry=registry,
        )
        self.energy = Counter(
            "qlora_energy_kwh",
            "Energy of jobs that were trained since the operator started, of those whose processors tell",
            ["namespace"],
            registry=registry,
        )
        self.exports = Counter(
            "qlora_exports",
            "Exports of adapters since the operator started, by form: merged, gguf-q8_0",
            ["namespace", "form"],
            registry=registry,
        )
        self.notifications = Counter(
            "qlora_notifications",
            "Tries to notify the receiver in the operator's settings; result: delivered or failed",
            ["result"],
            registry=registry,
        )
        self.reconcile_seconds = Histogram(
            "qlora_reconcile_duration_seconds", "Duration of one reconciliation of one job", registry=registry
        )
        self.reconcile_errors = Counter(
            "qlora_reconcile_errors", "Reconciliations that failed", registry=registry
        )
        self.api_requests = Counter(
            "qlora_api_requests",
            "Requests to the API server; code: the HTTP status, or none without a response",
            ["verb", "resource", "code"],
            registry=registry,
        )
        self.api_seconds = Histogram(
            "qlora_api_request_duration_seconds",
            "Duration of requests to the API server, watches excluded",
            ["verb", "resource"],
            registry=registry,
        )
        self.queue_depth = Gauge("qlora_queue_depth", "Jobs waiting to be reconciled", registry=registry)
        self.workers_busy = Gauge("qlora_workers_busy", "Reconciliations in progress", registry=registry)
        self.sweep_time = Gauge(
            "qlora_last_successful_sweep_timestamp_seconds",
            "Unix time of the last complete resync of all jobs; 0: none yet",
            registry=registry,
        )
        self.namespaces_refused = Gauge(
            "qlora_namespaces_refused",
            "Namespaces to serve whose lists the API server refused in the last resync",
            registry=registry,
        )
        Info("qlora_operator_build", "Build of the operator", registry=registry).info({"version": version})

    def api_request(self, verb: str, resource: str, code: int | None, seconds: float) -> None:
        """Count a request to the API server; `code` is None without a response."""
        self.api_requests.labels(verb, resource, "none" if code is None else str(code)).inc()
        self.api_seconds.labels(verb, resource).observe(seconds)


async def serve(
    registry: CollectorRegistry, port: int, liveness: Probe, readiness: Probe, host: str | None = None
) -> web.AppRunner:
    """Serve `GET /metrics`, `/healthz` (liveness) and `/readyz` (readiness) until the runner's cleanup().

    Args:
        registry: of /metrics.
        port: 0 takes a free one; see the runner's `addresses`.
        liveness: called at each /healthz.
        readiness: called at each /readyz.
        host: address to listen on; default: all.

    Raises:
        OSError: the port is in use.
    """
    app = web.Application()

    made, page = 0.0, b""

    async def metrics(_: web.Request) -> web.Response:
        # Whoever reaches the port may ask without end, and the page is made in the loop that reconciles.
        nonlocal made, page
        if not page or time.monotonic() - made >= PAGE_SECONDS:
            made, page = time.monotonic(), generate_latest(registry)
        return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.router.add_get("/metrics", metrics)
    app.router.add_get("/healthz", _probe(liveness))
    app.router.add_get("/readyz", _probe(readiness))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_SECONDS)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError:
        await runner.cleanup()
        raise
    return runner


def _probe(probe: Probe) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        wrong = probe()
        return web.Response(text=f"{wrong or 'ok'}\n", status=503 if wrong else 200)

    return answer
