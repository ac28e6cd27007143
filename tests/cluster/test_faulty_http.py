"""The wire that misbehaves does what each of its faults says."""

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from testcluster.faulty_http import Fault, FaultyHttp, answer, cut, spoil, stall
from testcluster.remote import until

BODY = bytes(range(256)) * 400


class Echo(BaseHTTPRequestHandler):
    """Answers with BODY, and tells the request's body in a header."""

    def do_POST(self) -> None:
        """Answer."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.send_header("X-Asked", f"{self.path} {body.decode()}")
        self.end_headers()
        self.wfile.write(BODY)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@pytest.fixture
def wire() -> Iterator[FaultyHttp]:
    """Before a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        with FaultyHttp(server.server_port) as made:
            yield made
        server.shutdown()
        thread.join()


def ask(
    wire: FaultyHttp, path: str = "/x", method: str = "GET", body: str = ""
) -> tuple[int, bytes, dict[str, str]]:
    """(status, as much of the body as came, headers)."""
    connection = http.client.HTTPConnection(wire.url.partition("//")[2])
    connection.request(method, path, body)
    response = connection.getresponse()
    try:
        got = response.read()
    except http.client.IncompleteRead as error:
        got = error.partial
    finally:
        connection.close()
    return response.status, got, dict(response.getheaders())


def test_requests_pass(wire: FaultyHttp) -> None:
    """Both ways, and each is recorded."""
    status, body, headers = ask(wire, "/a?b", "POST", "hello")

    assert (status, body, headers["X-Asked"]) == (200, BODY, "/a?b hello")
    until(lambda: wire.passed[0].sent == len(BODY))
    assert (wire.passed[0].method, wire.passed[0].path, wire.passed[0].status) == ("POST", "/a?b", 200)


def test_whole_addresses_are_for_a_proxy(wire: FaultyHttp) -> None:
    """Whatever the host, the server behind the wire answers."""
    assert ask(wire, "http://somewhere.invalid/a")[2]["X-Asked"] == "/a "


def test_an_answer_of_the_wires_own(wire: FaultyHttp) -> None:
    """Status, headers and body; the server hears nothing."""
    wire.fault(answer(429, b"later", Retry_After="3"))
    status, body, headers = ask(wire)

    assert (status, body, headers["Retry-After"]) == (429, b"later", "3")
    assert "X-Asked" not in headers


@pytest.mark.parametrize("after", [0, 1, 1000, 20_000])
def test_a_connection_is_cut(wire: FaultyHttp, after: int) -> None:
    """After so many bytes of what was promised."""
    wire.fault(cut(after) if after else Fault(change=lambda _: iter(())))

    assert ask(wire)[1] == BODY[:after]


def test_bytes_are_spoilt(wire: FaultyHttp) -> None:
    """Every one, and as many."""
    wire.fault(spoil())

    assert ask(wire)[1] == bytes(255 - byte for byte in BODY)


def test_an_answer_stalls(wire: FaultyHttp) -> None:
    """Nothing comes beyond the byte, until the event."""
    event = threading.Event()
    wire.fault(stall(30_000, event))
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(ask(wire)[1]))
    thread.start()
    until(lambda: wire.sent("/x") == 30_000)
    assert not got
    event.set()
    thread.join()

    assert got == [BODY]


def test_faults_are_for_some_requests(wire: FaultyHttp) -> None:
    """By path, method and turn."""
    wire.fault(answer(500), path="/b", skip=1, times=2)
    wire.fault(answer(403), method="POST", times=-1)

    assert [ask(wire, path)[0] for path in ("/a", "/b", "/b", "/b", "/b")] == [200, 200, 500, 500, 200]
    assert [ask(wire, "/b", "POST")[0] for _ in range(3)] == [403] * 3
    wire.heal()
    assert ask(wire, "/b", "POST")[0] == 200
