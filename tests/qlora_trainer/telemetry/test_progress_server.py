"""The progress server, asked over HTTP."""

import json
import math
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qlora_contract.env import PROGRESS_PORT, PROGRESS_PORT_ENV
from qlora_contract.progress import CheckpointRef, ProgressReport
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.telemetry import progress_server
from qlora_trainer.telemetry.progress import Progress
from qlora_trainer.telemetry.progress_server import ProgressServer, port_from_environ

START = ProgressReport(
    job_uid="u",
    attempt=2,
    stage="Starting",
    step=0,
    total_steps=400,
    epoch=0.0,
    updated_time="2026-01-01T00:00:00Z",
)


@pytest.fixture
def live() -> Progress:
    """Progress of a run that has just started."""
    return Progress(START)


@pytest.fixture
def server(live: Progress) -> Iterator[ProgressServer]:
    """A server on a free port of this machine."""
    made = ProgressServer(live, "127.0.0.1", 0)
    yield made
    made.close()


def ask(server: ProgressServer, path: str, method: str = "GET") -> tuple[int, str, bytes]:
    """Status, content type and body."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()


def metrics(server: ProgressServer) -> dict[str, float]:
    """Name -> value."""
    families = text_string_to_metric_families(ask(server, "/metrics")[2].decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_progress_is_the_newest_report(live: Progress, server: ProgressServer) -> None:
    """What training last said is what the operator reads, camelCase, newly stamped."""
    live.update(
        stage="Training", step=3, loss=1.5, checkpoint=CheckpointRef(step=2, time="t", uri="pvc://c/p")
    )
    status, content_type, body = ask(server, "/progress")
    answer = json.loads(body)

    assert (status, content_type) == (200, "application/json")
    assert ProgressReport.model_validate_json(body) == live.report
    assert (answer["totalSteps"], answer["loss"], answer["checkpoint"]["step"]) == (400, 1.5, 2)
    assert answer["updatedTime"] > START.updated_time


def test_a_loss_that_is_no_number_is_still_json(live: Progress, server: ProgressServer) -> None:
    """A diverged loss does not make a body that no parser reads."""
    live.update(loss=math.nan, eval_loss=math.inf)

    answer = json.loads(ask(server, "/progress")[2], parse_constant=pytest.fail)
    assert (answer["loss"], answer["evalLoss"]) == (None, None)


def test_metrics_tell_what_is_known(live: Progress, server: ProgressServer) -> None:
    """Before the first step there is no loss; afterwards each number has its own metric."""
    before = metrics(server)
    live.update(
        step=3, epoch=0.5, loss=1.5, eval_loss=2.0, tokens_per_second=412.0, eta_seconds=9.0,
        memory_peak=1 << 30, checkpoint=CheckpointRef(step=2, time="t", uri="u"),
    )  # fmt: skip
    live.count_tokens(8000)
    live.count_tokens(192)

    assert before == {"qlora_step": 0, "qlora_total_steps": 400, "qlora_epoch": 0, "qlora_tokens_total": 0}
    assert metrics(server) == {
        "qlora_step": 3,
        "qlora_total_steps": 400,
        "qlora_epoch": 0.5,
        "qlora_loss": 1.5,
        "qlora_eval_loss": 2.0,
        "qlora_tokens_per_second": 412.0,
        "qlora_eta_seconds": 9.0,
        "qlora_memory_peak_bytes": 1 << 30,
        "qlora_checkpoint_step": 2,
        "qlora_tokens_total": 8192,
    }


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        pytest.param("GET", "/healthz", 200, b"ok\n", id="health"),
        pytest.param("HEAD", "/progress", 200, b"", id="head-has-no-body"),
        pytest.param("GET", "/progress?x=1", 200, None, id="query-ignored"),
        pytest.param("GET", "/", 404, None, id="root"),
        pytest.param("GET", "/progress/../etc/passwd", 404, None, id="no-files"),
        pytest.param("POST", "/progress", 501, None, id="no-writing"),
        pytest.param("DELETE", "/metrics", 501, None, id="no-deleting"),
    ],
)
def test_nothing_else_is_served(
    server: ProgressServer, method: str, path: str, status: int, body: bytes | None
) -> None:
    """Three paths, read only."""
    got_status, _, got_body = ask(server, path, method)

    assert got_status == status
    assert body is None or got_body == body


def test_clients_that_stall_or_dribble_are_cut_off(
    live: Progress, server: ProgressServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that fill every place without asking lose it, and others are answered again."""
    monkeypatch.setattr(progress_server, "_REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(progress_server, "_MAX_CLIENTS", 4)
    address = ("127.0.0.1", server.port)
    slow = [socket.create_connection(address, timeout=60) for _ in range(4)]
    for client in slow[:2]:
        client.sendall(b"GET /prog")
    answered = False
    end = time.monotonic() + 60
    while not answered and time.monotonic() < end:
        answered = can_ask(server)
        time.sleep(0.05)
    cut_off = [client.recv(10_000) for client in slow]
    for client in slow:
        client.close()

    assert answered
    assert cut_off == [b""] * 4 or all(b"200 OK" not in received for received in cut_off)


def can_ask(server: ProgressServer) -> bool:
    """Whether there is an answer."""
    try:
        return ask(server, "/progress")[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_all_addresses_are_ipv4_and_ipv6(live: Progress, address: str) -> None:
    """A cluster may have one of both alone."""
    server = ProgressServer(live, "", 0)
    try:
        with socket.create_connection((address, server.port), timeout=5) as client:
            client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert b"200 OK" in client.recv(1000)
    finally:
        server.close()


def test_a_taken_port_is_named(live: Progress, server: ProgressServer) -> None:
    """Which port could not be had is said."""
    with pytest.raises(OSError, match=rf"progress port {server.port} on 127.0.0.1: .*in use"):
        ProgressServer(live, "127.0.0.1", server.port)


@pytest.mark.parametrize(
    ("environ", "port"), [({}, PROGRESS_PORT), ({PROGRESS_PORT_ENV: "0"}, 0), ({PROGRESS_PORT_ENV: "81"}, 81)]
)
def test_the_port_comes_from_the_environment(environ: dict[str, str], port: int) -> None:
    """The contract's port, unless another is set; 0 is a free one."""
    assert port_from_environ(environ) == port


@pytest.mark.parametrize("text", ["65536", "-1", "http", "8470.0"])
def test_a_bad_port_is_refused(text: str) -> None:
    """A port that is none is refused by its variable's name."""
    with pytest.raises(ConfigurationError, match=PROGRESS_PORT_ENV):
        port_from_environ({PROGRESS_PORT_ENV: text})
