"""The operator's metrics, and the server that shows them and answers the kubelet's probes.

Labels are bounded: namespaces, phases, documented reasons, verbs and resources that the operator itself uses;
series of single jobs are limited to JOBS_SHOWN.
"""

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
"""The name under which the jobs beyond JOBS_SHOWN are summed; no job can have it."""
CLOSE_SECONDS = 1.0
"""What an answer under way gets when the operator stops."""

Probe = Callable[[], str | None]
"""Says what is wrong, in a sentence; None when nothing is."""


@dataclass(frozen=True)
class Figures:
    """What is known of a job."""

    phase: Phase
    tokens_per_second: float | None = None
    """Of all ranks, while it trains."""
    loss: float | None = None
    """Of the last step, while it trains."""


class Jobs(Collector):
    """The jobs there are. Metrics are derived from them when they are asked for, so none outlives its job."""

    def __init__(self) -> None:
        self._figures: dict[tuple[str, str], Figures] = {}

    def put(self, namespace: str, name: str, figures: Figures) -> None:
        """Say how a job is now."""
        self._figures[namespace, name] = figures

    def drop(self, namespace: str, name: str) -> None:
        """A job is gone. Saying so twice does no harm."""
        self._figures.pop((namespace, name), None)

    def collect(self) -> Iterator[Metric]:
        """Jobs by phase; speed and loss of those that train."""
        figures = dict(self._figures)
        yield _by_phase(figures)
        running = {job: each for job, each in figures.items() if each.phase is Phase.RUNNING}
        yield _speeds(running)
        yield _losses(running)


def _by_phase(figures: dict[tuple[str, str], Figures]) -> Metric:
    family = GaugeMetricFamily("qlora_jobs", "Jobs by phase", labels=["namespace", "phase"])
    counts = Count((namespace, each.phase.value) for (namespace, _), each in figures.items())
    for labels, count in sorted(counts.items()):
        family.add_metric(labels, count)
    return family


def _speeds(running: dict[tuple[str, str], Figures]) -> Metric:
    family = GaugeMetricFamily(
        "qlora_job_tokens_per_second",
        f"Tokens of all ranks of a running job per second; the jobs beyond {JOBS_SHOWN} are summed as {OTHERS}",
        labels=["namespace", "name"],
    )
    known = [
        (job, each.tokens_per_second) for job, each in running.items() if each.tokens_per_second is not None
    ]
    for job, speed in known[:JOBS_SHOWN]:
        family.add_metric(job, speed)
    if len(known) > JOBS_SHOWN:
        family.add_metric(("", OTHERS), sum(speed for _, speed in known[JOBS_SHOWN:]))
    return family


def _losses(running: dict[tuple[str, str], Figures]) -> Metric:
    family = GaugeMetricFamily(
        "qlora_job_loss",
        f"Mean loss per supervised token of a running job's last step; of {JOBS_SHOWN} jobs at most",
        labels=["namespace", "name"],
    )
    known = [(job, each.loss) for job, each in running.items() if each.loss is not None]
    for job, loss in known[:JOBS_SHOWN]:
        family.add_metric(job, loss)
    return family


class Metrics:
    """All metrics of one operator, in a registry of its own."""

    def __init__(self, registry: CollectorRegistry, version: str) -> None:
        self.registry = registry
        self.jobs = Jobs()
        registry.register(self.jobs)
        self.attempts_started = Counter(
            "qlora_attempts_started", "Attempts whose Job was created", registry=registry
        )
        self.jobs_finished = Counter(
            "qlora_jobs_finished",
            "Jobs that ended while this operator ran; phase: Succeeded or Failed",
            ["namespace", "phase"],
            registry=registry,
        )
        self.restarts = Counter(
            "qlora_restarts",
            "Attempts that ended early and are followed by another; budget: user, infrastructure or none",
            ["reason", "budget"],
            registry=registry,
        )
        self.reconcile_seconds = Histogram(
            "qlora_reconcile_duration_seconds", "One reconciliation of one job", registry=registry
        )
        self.reconcile_errors = Counter(
            "qlora_reconcile_errors", "Reconciliations that ended with an error", registry=registry
        )
        self.api_requests = Counter(
            "qlora_api_requests",
            "Requests to the API server; code: the HTTP status, or `none` without an answer",
            ["verb", "resource", "code"],
            registry=registry,
        )
        self.api_seconds = Histogram(
            "qlora_api_request_duration_seconds",
            "Requests to the API server, watches left out",
            ["verb", "resource"],
            registry=registry,
        )
        self.queue_depth = Gauge("qlora_queue_depth", "Jobs that wait to be reconciled", registry=registry)
        self.workers_busy = Gauge("qlora_workers_busy", "Reconciliations at work", registry=registry)
        self.sweep_time = Gauge(
            "qlora_last_successful_sweep_timestamp_seconds",
            "When all jobs were last looked at, in seconds since 1970; 0: not yet",
            registry=registry,
        )
        Info("qlora_operator_build", "The operator", registry=registry).info({"version": version})

    def api_request(self, verb: str, resource: str, code: int | None, seconds: float) -> None:
        """Count a request to the API server; `code` is None when no answer came."""
        self.api_requests.labels(verb, resource, "none" if code is None else str(code)).inc()
        self.api_seconds.labels(verb, resource).observe(seconds)


async def serve(
    registry: CollectorRegistry, port: int, liveness: Probe, readiness: Probe, host: str | None = None
) -> web.AppRunner:
    """Answer `GET /metrics`, `/healthz` (liveness) and `/readyz` (readiness) until the runner's cleanup().

    Args:
        registry: what /metrics shows.
        port: 0 takes a free one, which the runner's `addresses` tell.
        liveness: asked at each /healthz.
        readiness: asked at each /readyz.
        host: address to listen at; all of them unless given.

    Raises:
        OSError: the port is taken.
    """
    app = web.Application()
    app.router.add_get("/metrics", _metrics(registry))
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


def _metrics(registry: CollectorRegistry) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return answer


def _probe(probe: Probe) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        wrong = probe()
        return web.Response(text=f"{wrong or 'ok'}\n", status=503 if wrong else 200)

    return answer
