"""A destination is asked before training."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qlora_operator.cli.destination_check import check_destination
from qlora_operator.errors import CommandError

ROLES = {"good": "write", "reader": "read"}


class Server(BaseHTTPRequestHandler):
    """A Hub that knows two tokens, and an S3 that has one bucket."""

    def do_GET(self) -> None:
        """`whoami`."""
        token = self.headers["Authorization"].removeprefix("Bearer ")
        self.send_response(200 if token in ROLES else 401)
        self.end_headers()
        if token in ROLES:
            self.wfile.write(json.dumps({"auth": {"accessToken": {"role": ROLES[token]}}}).encode())

    def do_HEAD(self) -> None:
        """A bucket."""
        self.send_response(403 if self.path == "/there" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


@pytest.fixture
def address() -> Iterator[str]:
    """Of the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("uri", "token", "message"),
    [
        ("hf://a/b", "good", None),
        ("hf://a/b", "bad", "the token is not valid"),
        ("hf://a/b", "reader", "the token may only read"),
        ("hf://a/b", "", "there is no token"),
        ("s3://there/x", "", None),
        ("s3://gone/x", "", "there is no such bucket"),
    ],
)
def test_a_destination_that_will_refuse_is_found_out(
    uri: str, token: str, message: str | None, address: str
) -> None:
    """With the code that the upload would end with."""
    environ = {
        "HF_ENDPOINT": address,
        "AWS_ENDPOINT_URL": address,
        "HF_TOKEN": token,
        "HF_HOME": "/no/such/folder",
    }
    if message is None:
        assert check_destination(uri, environ) is None
        return
    with pytest.raises(CommandError, match=message) as refused:
        check_destination(uri, environ)
    assert refused.value.code == 17


def test_a_server_that_does_not_answer_keeps_nobody_from_training() -> None:
    """The reason is told."""
    said = check_destination("hf://a/b", {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "x"})

    assert said is not None
    assert "Connection refused" in said
