"""Rank 0's progress, read from its port."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qlora_contract.progress import ProgressReport
from qlora_operator.cli.processes import free_port
from qlora_operator.cli.progress_client import fetch_progress


def a_report(**fields: Any) -> ProgressReport:
    """A report of attempt 1 of job u."""
    known = {"job_uid": "u", "attempt": 1, "stage": "Training", "step": 3, "total_steps": 7, "epoch": 0.4}
    return ProgressReport.model_validate({**known, "updated_time": "2026-01-01T00:00:00Z", **fields})


@contextmanager
def served(body: bytes, status: int = 200) -> Iterator[int]:
    """A port at which this is answered."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_rank_0_is_asked_for_its_report() -> None:
    """The report of this very attempt is given."""
    report = a_report(loss=1.5)
    with served(report.model_dump_json(by_alias=True).encode()) as port:
        assert fetch_progress(port, "u", 1) == report


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"<html>", id="no JSON"),
        pytest.param(json.dumps({"version": 1}).encode(), id="no report"),
        pytest.param(a_report(attempt=2).model_dump_json(by_alias=True).encode(), id="another attempt's"),
        pytest.param(a_report(job_uid="v").model_dump_json(by_alias=True).encode(), id="another job's"),
    ],
)
def test_what_is_not_our_report_is_none(body: bytes) -> None:
    """Somebody else may listen at the port before rank 0 does."""
    with served(body) as port:
        assert fetch_progress(port, "u", 1) is None


def test_nobody_at_the_port_is_none() -> None:
    """A refused connection is no error: rank 0 has not come yet, or has gone."""
    assert fetch_progress(free_port(), "u", 1) is None
