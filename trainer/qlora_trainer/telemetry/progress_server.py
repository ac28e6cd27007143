"""The HTTP server on rank 0, or in a transfer, that serves live progress and metrics.

Written by hand on http.server: prometheus_client's own server has no place for `/progress`, and neither limits how
many clients there are or how long each may take, which keeps a slow or hostile client away from training.
"""

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qlora_contract.env import PROGRESS_PORT, PROGRESS_PORT_ENV
from qlora_contract.progress import ProgressReport
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.telemetry.progress import Progress

_REQUEST_SECONDS = 5.0
"""A client that has not sent its request and read the answer within this time is disconnected."""
_MAX_CLIENTS = 16
_CHECK_SECONDS = 0.2
"""How often clients are checked against _REQUEST_SECONDS."""

_GAUGES: dict[str, tuple[str, str]] = {
    "step": ("qlora_step", "Optimizer steps completed"),
    "total_steps": ("qlora_total_steps", "Optimizer steps of the whole run"),
    "epoch": ("qlora_epoch", "Epochs of the training data completed, with the fraction of the current one"),
    "loss": ("qlora_loss", "Mean loss per supervised token of the last step"),
    "eval_loss": ("qlora_eval_loss", "Loss of the latest evaluation"),
    "tokens_per_second": (
        "qlora_tokens_per_second",
        "Tokens of all ranks per second, averaged over the last steps",
    ),
    "eta_seconds": (
        "qlora_eta_seconds",
        "Estimated seconds until the last step, from the steps of this attempt",
    ),
    "memory_peak": ("qlora_memory_peak_bytes", "Largest peak memory of any rank"),
}
"""Field of the report -> metric name and help."""


class ProgressServer:
    """`GET /progress`, `/metrics` and `/healthz`, answered in daemon threads.

    Slow clients are disconnected and more than a few at once are refused, so that neither disturbs training.
    """

    def __init__(self, progress: Progress, host: str, port: int) -> None:
        """Start to listen. Port 0 takes a free one. Raises OSError, naming the port, when it is taken."""
        try:
            self._server = _Server(progress, host, port)
        except OSError as error:
            raise OSError(
                error.errno, f"progress port {port} on {host or 'all addresses'}: {error.strerror}"
            ) from error
        self.port = int(self._server.server_address[1])
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(_CHECK_SECONDS,), name="progress", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def port_from_environ(environ: Mapping[str, str]) -> int:
    """The progress port: QLORA_PROGRESS_PORT, else the contract's. Raises ConfigurationError."""
    text = environ.get(PROGRESS_PORT_ENV) or str(PROGRESS_PORT)
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise ConfigurationError(f"{PROGRESS_PORT_ENV} is {text!r}; it must be a port from 0 to 65535")
    return int(text)


def metrics(report: ProgressReport, tokens: int) -> Iterator[Metric]:
    """The metrics of a report; fields that are not known yet are left out.

    Args:
        report: the newest report.
        tokens: of all ranks in this attempt.
    """
    for field, (name, text) in _GAUGES.items():
        if (value := getattr(report, field)) is not None:
            yield GaugeMetricFamily(name, text, value=value)
    if report.checkpoint is not None:
        yield GaugeMetricFamily(
            "qlora_checkpoint_step", "Step of the latest checkpoint", value=report.checkpoint.step
        )
    yield CounterMetricFamily("qlora_tokens", "Tokens processed by all ranks in this attempt", value=tokens)


class _Collector(Collector):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def collect(self) -> Iterator[Metric]:
        return metrics(self._progress.report, self._progress.tokens)


class _Server(socketserver.ThreadingTCPServer):
    # Not http.server's HTTPServer: that looks up its own name in the DNS, which can take long.
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, progress: Progress, host: str, port: int) -> None:
        self.progress = progress
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Collector(progress))
        self._open: dict[Any, float] = {}
        # Without a host, IPv4 and IPv6: a cluster may have either alone.
        self._both = not host and socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if ":" in host or self._both else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        if self._both:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002 - socketserver's
        return len(self._open) < _MAX_CLIENTS

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Disconnect clients whose time is up."""
        now = time.monotonic()
        for request, since in list(self._open.items()):
            if now - since > _REQUEST_SECONDS:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect early."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _REQUEST_SECONDS
    server_version = "qlora"
    sys_version = ""

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/progress":
                body = self.server.progress.report.model_dump_json(by_alias=True).encode()
                content_type = "application/json"
            case "/metrics":
                body, content_type = generate_latest(self.server.registry), CONTENT_TYPE_LATEST
            case "/healthz":
                body, content_type = b"ok\n", "text/plain"
            case _:
                self.send_error(404)
                return
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        """Do not log requests: the operator polls every few seconds."""
