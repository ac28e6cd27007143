"""A wire that misbehaves on demand: an HTTP proxy before any HTTP server.

    with FaultyHttp(server.port) as wire:
        wire.fault(cut(after=1000), path="/model.safetensors")

Requests pass unless a fault matches; every request is recorded, with the bytes of the answer that the client got.
"""

import http.client
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from testcluster.http_server import HttpServer

CHUNK = 1 << 14


@dataclass
class Passed:
    """A request, and what was sent back."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0
    """Bytes of the body."""

    def header(self, name: str) -> str:
        """A header of the request, however it is spelled; empty without one."""
        return next((value for key, value in self.headers.items() if key.lower() == name.lower()), "")


@dataclass
class Fault:
    """What happens to an answer."""

    status: int = 0
    """Answered instead of the server, when it is not 0."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    change: Callable[[Iterator[bytes]], Iterator[bytes]] = lambda chunks: chunks
    """Of the body. Where it ends early, the connection is cut."""


def answer(status: int, body: bytes = b"", **headers: str) -> Fault:
    """This status instead of the server's answer; `Retry_After` for Retry-After."""
    return Fault(status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


def cut(after: int) -> Fault:
    """The connection breaks after so many bytes of the body."""

    def change(chunks: Iterator[bytes]) -> Iterator[bytes]:
        left = after
        for chunk in chunks:
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                return

    return Fault(change=change)


def spoil() -> Fault:
    """Every byte is another one."""
    return Fault(change=lambda chunks: (bytes(byte ^ 0xFF for byte in chunk) for chunk in chunks))


def stall(after: int, until: threading.Event) -> Fault:
    """Nothing comes after so many bytes, until the event."""

    def change(chunks: Iterator[bytes]) -> Iterator[bytes]:
        sent = 0
        for chunk in chunks:
            if sent <= after < sent + len(chunk):
                yield chunk[: after - sent]
                until.wait()
                yield chunk[after - sent :]
            else:
                yield chunk
            sent += len(chunk)

    return Fault(change=change)


@dataclass
class Rule:
    """Which requests a fault meets."""

    fault: Fault
    path: str
    method: str
    skip: int
    times: int

    def takes(self, passed: Passed) -> bool:
        """Whether the fault meets this request; counts it."""
        if self.path not in passed.path or passed.method != self.method or self.times == 0:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class FaultyHttp(HttpServer):
    """The proxy."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        """Stand, at an address, before the server at a port of the loopback interface, which speaks no TLS; we may."""
        self.passed: list[Passed] = []
        self._upstream = port
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        super().__init__(host, type("_Handler", (Handler,), {"wire": self}))
        self._scheme = "https" if tls else "http"
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.server_address[:2]
        return f"{self._scheme}://{host!s}:{port}"

    def fault(self, fault: Fault, path: str = "", method: str = "GET", skip: int = 0, times: int = 1) -> None:
        """Do this to the next requests whose path (with its query) holds `path`; times -1: to all."""
        self._rules.append(Rule(fault, path, method, skip, times))

    def heal(self) -> None:
        """No more faults."""
        self._rules.clear()

    def sent(self, path: str) -> int:
        """Bytes of bodies that clients got from paths that hold `path`."""
        return sum(each.sent for each in self.passed if path in each.path and each.method == "GET")

    def meet(self, passed: Passed) -> Fault:
        """The fault of a request, which is recorded."""
        with self._lock:
            self.passed.append(passed)
            return next((rule.fault for rule in self._rules if rule.takes(passed)), Fault())

    def ask(self, passed: Passed, body: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """The server's answer, not yet read."""
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=60)
        # As a proxy we are asked for whole addresses, whatever their host: the server is this one.
        whole = "://" in passed.path.partition("?")[0]
        path = "/" + passed.path.split("/", 3)[3] if whole else passed.path
        dropped = {
            "connection",
            "transfer-encoding",
            "content-length",
            "expect",
            *(["host"] if whole else []),
        }
        connection.putrequest(passed.method, path, skip_host=not whole, skip_accept_encoding=True)
        for name, value in passed.headers.items():
            if name.lower() not in dropped:
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        return connection, connection.getresponse()


class Handler(BaseHTTPRequestHandler):
    """Passes the requests of one proxy on."""

    wire: FaultyHttp
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer; the other methods are the same."""
        self.close_connection = True
        body = self._body()
        passed = Passed(self.command, self.path, dict(self.headers))
        fault = self.wire.meet(passed)
        if fault.status:
            self._start(passed, fault.status, {**fault.headers, "Content-Length": str(len(fault.body))})
            self.wfile.write(fault.body)
            return
        connection, response = self.wire.ask(passed, body)
        try:
            hop = ("connection", "transfer-encoding")
            headers = {k: v for k, v in response.getheaders() if k.lower() not in hop}
            self._start(passed, response.status, headers)
            self._pass_on(passed, fault.change(iter(lambda: response.read(CHUNK), b"")))
        finally:
            connection.close()

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def _body(self) -> bytes:
        if (self.headers.get("Transfer-Encoding") or "").lower() == "chunked":
            return b"".join(iter(self._chunk, b""))
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline().partition(b";")[0], 16))
        self.rfile.readline()
        return data

    def _start(self, passed: Passed, status: int, headers: dict[str, str]) -> None:
        passed.status = status
        self.send_response_only(status)
        for name, value in {**headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _pass_on(self, passed: Passed, chunks: Iterator[bytes]) -> None:
        with suppress(OSError):
            for chunk in chunks:
                self.wfile.write(chunk)
                self.wfile.flush()
                passed.sent += len(chunk)

    def log_message(self, *_: object) -> None:
        """Be quiet."""
