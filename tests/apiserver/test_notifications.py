"""A receiver of notifications, and an operator that is killed before and after it tells."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from testcluster.http_server import HttpServer
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster


class Receiver(HttpServer):
    """Keeps what it is sent, and refuses as long as it is told to."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.refuses = False
        super().__init__("127.0.0.1", type("_Handler", (Handler,), {"receiver": self}))

    @property
    def url(self) -> str:
        """For notifications.url."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/events"

    def types(self) -> list[str]:
        """Of the events, in the order of their arrival."""
        return [event["type"].rpartition(".")[2] for event in self.events]


class Handler(BaseHTTPRequestHandler):
    """One delivery."""

    receiver: Receiver

    def do_POST(self) -> None:
        """Take it."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.receiver.refuses:
            self.receiver.events.append(body)
        self.send_response(503 if self.receiver.refuses else 202)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def test_a_jobs_life_is_told_once_though_the_operator_dies(
    new_operator: Callable[..., Any], make_job: Callable[..., Any], namespace: str
) -> None:
    """What the receiver refused before the operator was killed, the next one tells; what it took is not told again."""
    with Receiver() as receiver:
        operator = new_operator("--namespace", namespace, notifications={"url": receiver.url})
        operator.start()
        job = make_job(topology={"pods": 1})
        pods = [job.kubelet.running(pod) for pod in job.pods(0, 1)]
        wait_for(lambda: receiver.types() == ["started"], 20, every=0.1)
        job.until(lambda status: status.get("notified"))

        receiver.refuses = True
        job.succeed(pods)
        operator.kill()
        receiver.refuses = False
        operator.start()

        wait_for(lambda: receiver.types() == ["started", "succeeded"], 20, every=0.1)
        status = job.until(lambda status: len(status["notified"]) == 2)
        operator.kill()
        operator.start()
        job.until(lambda status: status["phase"] == "Succeeded")
        assert receiver.types() == ["started", "succeeded"]

    first, last = receiver.events
    assert first["id"] != last["id"]
    assert last["source"] == f"/apis/qlora.dev/v1alpha1/namespaces/{namespace}/qlorajobs/job"
    assert last["data"]["phase"] == "Succeeded"
    assert status["phase"] == "Succeeded"
