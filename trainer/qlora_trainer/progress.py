"""Live progress: the newest report, and the HTTP server on rank 0 that shows it."""

import contextlib
import socket
import socketserver
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qlora_contract.places import PROGRESS_PORT, PROGRESS_PORT_ENV
from qlora_contract.progress import ProgressReport
from qlora_trainer.errors import ConfigurationError

_REQUEST_SECONDS = 5.0
"""A client that has not sent its request and read the answer by then is cut off."""
_REQUESTS_AT_ONCE = 16
_LOOK_SECONDS = 0.2
"""Between two looks for clients whose time is up."""

_GAUGES: dict[str, tuple[str, str]] = {
    "step": ("qlora_step", "Optimiser steps completed"),
    "total_steps": ("qlora_total_steps", "Optimiser steps of the whole run"),
    "epoch": ("qlora_epoch", "Epochs of the training data seen"),
    "loss": ("qlora_loss", "Mean loss per supervised token of the last step"),
    "eval_loss": ("qlora_eval_loss", "Newest evaluation loss"),
    "tokens_per_second": ("qlora_tokens_per_second", "Tokens of all ranks per second, over the last steps"),
    "eta_seconds": ("qlora_eta_seconds", "Seconds left, from the steps of this attempt"),
    "memory_peak": ("qlora_memory_peak_bytes", "Largest memory peak of any rank"),
}
"""Field of the report -> metric name and help."""


class Rate:
    """Speed over the last steps, and the time left by the steps of this attempt."""

    def __init__(self, window: int = 20) -> None:
        self._last: deque[tuple[int, float]] = deque(maxlen=window)
        self._steps = 0
        self._seconds = 0.0

    def step(self, tokens: int, seconds: float) -> None:
        """Count a step: its tokens over all ranks, and how long it took."""
        self._last.append((tokens, seconds))
        self._steps += 1
        self._seconds += seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Over the window; None before the first step."""
        seconds = sum(each for _, each in self._last)
        return sum(each for each, _ in self._last) / seconds if seconds > 0 else None

    def eta_seconds(self, remaining_steps: int) -> float | None:
        """Remaining steps at this attempt's mean; None before the first step."""
        return remaining_steps * self._seconds / self._steps if self._steps else None


class Progress:
    """The newest report. Safe to change in one thread and to read in others."""

    def __init__(self, report: ProgressReport) -> None:
        self._lock = threading.Lock()
        self._report = report
        self._tokens = 0

    def update(self, **changes: Any) -> None:
        """Change fields of the report, by their snake_case names, and stamp it.

        Raises pydantic.ValidationError for a field or type the report does not have.
        """
        with self._lock:
            fields = {name: getattr(self._report, name) for name in ProgressReport.model_fields}
            self._report = ProgressReport.model_validate(fields | changes | {"updated_time": now()})

    def count_tokens(self, tokens: int) -> None:
        """Add a step's tokens, over all ranks."""
        with self._lock:
            self._tokens += tokens

    @property
    def report(self) -> ProgressReport:
        """The newest report."""
        with self._lock:
            return self._report

    @property
    def tokens(self) -> int:
        """Tokens of all ranks in this attempt."""
        with self._lock:
            return self._tokens


class ProgressServer:
    """`GET /progress`, `/metrics` and `/healthz`, answered in daemon threads.

    A slow client is cut off, and a crowd is refused: neither disturbs training.
    """

    def __init__(self, progress: Progress, host: str, port: int) -> None:
        """Listen at once. Port 0 takes a free one. Raises OSError when the port is taken."""
        try:
            self._server = _Server(progress, host, port)
        except OSError as error:
            raise OSError(
                error.errno, f"progress port {port} on {host or 'all addresses'}: {error.strerror}"
            ) from error
        self.port = int(self._server.server_address[1])
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(_LOOK_SECONDS,), name="progress", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def port_from_environ(environ: Mapping[str, str]) -> int:
    """The progress port, by QLORA_PROGRESS_PORT or the contract's. Raises ConfigurationError."""
    text = environ.get(PROGRESS_PORT_ENV) or str(PROGRESS_PORT)
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise ConfigurationError(f"{PROGRESS_PORT_ENV} is {text!r}; it must be a port, 0 to 65535")
    return int(text)


def metrics(report: ProgressReport, tokens: int) -> Iterator[Metric]:
    """The metrics of a report. What is not known yet is left out."""
    for field, (name, text) in _GAUGES.items():
        if (value := getattr(report, field)) is not None:
            yield GaugeMetricFamily(name, text, value=value)
    if report.checkpoint is not None:
        yield GaugeMetricFamily(
            "qlora_checkpoint_step", "Step of the newest checkpoint", value=report.checkpoint.step
        )
    yield CounterMetricFamily("qlora_tokens", "Tokens of all ranks in this attempt", value=tokens)


class _Collector(Collector):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def collect(self) -> Iterator[Metric]:
        return metrics(self._progress.report, self._progress.tokens)


class _Server(socketserver.ThreadingTCPServer):
    # Not http.server's HTTPServer: that looks its own name up in the DNS, which can take long.
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, progress: Progress, host: str, port: int) -> None:
        self.progress = progress
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Collector(progress))
        self._open: dict[Any, float] = {}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002 - socketserver's
        return len(self._open) < _REQUESTS_AT_ONCE

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut off clients whose time is up."""
        now = time.monotonic()
        for request, since in list(self._open.items()):
            if now - since > _REQUEST_SECONDS:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that breaks off is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _REQUEST_SECONDS
    server_version = "qlora"
    sys_version = ""

    def do_GET(self) -> None:
        body, content_type = self._answer()
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def _answer(self) -> tuple[bytes | None, str]:
        path = self.path.partition("?")[0]
        if path == "/progress":
            return self.server.progress.report.model_dump_json(by_alias=True).encode(), "application/json"
        if path == "/metrics":
            return generate_latest(self.server.registry), CONTENT_TYPE_LATEST
        if path == "/healthz":
            return b"ok\n", "text/plain"
        return None, ""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        """Say nothing: the operator asks every few seconds."""


def now() -> str:
    """The time, as reports have it: RFC 3339, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
