"""Plays rank 0's progress server, on a loopback address that a played pod then has as its own."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from qlora_contract.env import PROGRESS_PORT


class RankZero:
    """What `GET /progress` answers, and how often it did."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.asked = 0
        self._report: dict[str, Any] | None = None

    def tell(self, job_uid: str, attempt: int = 0, **fields: Any) -> None:
        """Answer with this report from now on; `fields` are those of ProgressReport, in camelCase."""
        told = {"jobUid": job_uid, "attempt": attempt, "updatedTime": _now(), **fields}
        told = {"stage": "Training", "step": 1, "totalSteps": 10, "epoch": 0.1, **told}
        self._report = told

    def answer(self) -> bytes | None:
        """The body; None as long as there is nothing to tell."""
        self.asked += 1
        return None if self._report is None else json.dumps(self._report).encode()


@contextmanager
def rank_zero() -> Iterator[RankZero]:
    """A progress server, until the end of the block."""
    told: RankZero

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = told.answer() if self.path == "/progress" else None
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: Any) -> None:
            """Nobody reads it."""

    server = _server(Handler)
    told = RankZero(str(server.server_address[0]))
    thread = Thread(target=server.serve_forever, args=(0.05,), name=f"rank 0 on {told.address}")
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _server(handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """On an address that nobody else has: tests may run side by side."""
    for _ in range(10):
        address = ".".join(["127", *(str(random.randint(1, 250)) for _ in range(3))])
        try:
            return ThreadingHTTPServer((address, PROGRESS_PORT), handler)
        except OSError:
            continue
    raise OSError(f"ten loopback addresses whose port {PROGRESS_PORT} is taken")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
