"""A file of a web server, by HTTPS."""

import hashlib
import http.server
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.paths import resolve
from qlora_contract.run_config import ResolvedRevisions, RunConfig
from qlora_trainer.errors import TransferFailed, TransferRefused
from qlora_trainer.transfer.fetch import SourceFetcher
from qlora_trainer.transfer.retry import Retrier
from testcluster.certificates import issue, make_authority

pytestmark = pytest.mark.process

DATA = b'{"prompt": "a", "completion": "b"}\n' * 20_000


class Site(http.server.ThreadingHTTPServer):
    """A web server that answers as a test says."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "web.crt", folder / "web.key")
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        """More, and others, of every answer; an empty value takes one away."""
        self.status = 0
        self.ranges = True
        self.breaks_after: list[int] = []
        """Bytes after which the next answers break off."""
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        """Its address."""
        return f"https://localhost:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no error here."""


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Site
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        site = self.server
        path = self.path.partition("?")[0]
        site.asked.append((self.path, dict(self.headers)))
        if site.status:
            self._send(site.status, {"Content-Length": "0"}, b"")
        elif path in site.redirects:
            self._send(302, {"Location": site.redirects[path], "Content-Length": "0"}, b"")
        elif path not in site.files:
            self._send(404, {"Content-Length": "0"}, b"")
        else:
            self._send_file(site.files[path])

    def _send_file(self, data: bytes) -> None:
        site = self.server
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Content-Type": "application/json"}
        asked = self.headers.get("Range") if site.ranges else None
        status = 200
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            status, data = 206, data[start:stop]
        self._send(status, headers | {"Content-Length": str(len(data))}, data)

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in (headers | self.server.headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if len(data) > 1 and self.server.breaks_after:
            self.wfile.write(data[: self.server.breaks_after.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif data:
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the library's
        """Silent."""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and the server's certificate."""
    folder = tmp_path_factory.mktemp("certificates")
    make_authority(folder)
    issue(folder, "web", "localhost", addresses=("DNS:localhost",))
    return folder


@pytest.fixture
def site(certificates: Path) -> Iterator[Site]:
    """A web server with a file."""
    made = Site(certificates)
    made.files["/sets/train.jsonl"] = DATA
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def fetch(site: Site, certificates: Path, tmp_path: Path) -> Callable[..., ResolvedRevisions]:
    """Fetch from the server; `allowed`: patterns of an administrator."""

    def do(
        path: str = "/sets/train.jsonl", allowed: list[str] | None = None, **environ: str
    ) -> ResolvedRevisions:
        known = {"SSL_CERT_FILE": str(certificates / "ca.crt"), "QLORA_CREDENTIALS": str(tmp_path / "none")}
        if allowed is not None:
            known["QLORA_WEB_SOURCES"] = json.dumps(allowed)
        config = run(site, path)
        retrier = Retrier(5, sleep=lambda _: None)
        return SourceFetcher(
            config, {"claim": tmp_path}, {**known, **environ}, retrier, lambda done, total: None
        ).fetch_all()

    return do


def run(site: Site, path: str = "/sets/train.jsonl", **more: Any) -> RunConfig:
    """A job with a file of the server."""
    return RunConfig.model_validate(
        {
            "stage": "fetch",
            "job": {"name": "j", "uid": "u", "attempt": 0},
            "workspace": "pvc://claim/work",
            "model": {"source": "pvc://claim/model"},
            "dataset": {"source": f"{site.url}{path}"},
            "training": {"maxSteps": 1},
            "layout": {"memoryPerRank": 1},
            "isa": "avx2",
            **more,
        }
    )


def content(site: Site, fetched: ResolvedRevisions, tmp_path: Path) -> bytes:
    """What ranks would read."""
    (uri,) = run(site, fetched=fetched).dataset_uris
    return resolve(uri, {"claim": tmp_path}).read_bytes()


def test_a_file_is_fetched_and_its_hash_kept(
    fetch: Callable[..., ResolvedRevisions], site: Site, tmp_path: Path
) -> None:
    """Under its own name, so that its suffix says what it is; no credentials are sent."""
    fetched = fetch()

    assert content(site, fetched, tmp_path) == DATA
    (manifest,) = (tmp_path / "work/sources/https").rglob("manifest-*.json")
    facts = json.loads(manifest.read_text())["files"]
    assert facts == {"sets/train.jsonl": {"size": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest()}}
    assert not any("authorization" in map(str.lower, headers) for _, headers in site.asked)


def test_what_is_there_is_not_asked_for_again(fetch: Callable[..., ResolvedRevisions], site: Site) -> None:
    """The server may even be gone."""
    fetched = fetch()
    site.asked.clear()

    assert fetch() == fetched
    assert site.asked == []


@pytest.mark.parametrize("ranges", [True, False], ids=["by range", "from the start"])
def test_a_download_that_breaks_off_is_resumed(
    fetch: Callable[..., ResolvedRevisions], site: Site, tmp_path: Path, ranges: bool
) -> None:
    """Where it stopped; what a server without ranges sends again is passed over."""
    site.ranges = ranges
    site.breaks_after = [100_000, 300_000]

    assert content(site, fetch(), tmp_path) == DATA
    asked = [headers["Range"] for _, headers in site.asked if "Range" in headers]
    assert asked[0] == "bytes=0-0"
    assert all(int(each.removeprefix("bytes=").rstrip("-")) > 0 for each in asked[1:])
    if ranges:
        assert len(asked) == 3


def test_a_file_that_changes_meanwhile_is_told(fetch: Callable[..., ResolvedRevisions], site: Site) -> None:
    """Half of one and half of another would be neither."""
    site.breaks_after = [100_000]
    serve = site.finish_request

    def change(request: Any, client: Any) -> None:
        if len(site.asked) >= 2:
            site.files["/sets/train.jsonl"] = DATA[:-35] + b'{"prompt": "z", "completion": "b"}\n'
        serve(request, client)

    site.finish_request = change  # type: ignore[method-assign]
    with pytest.raises(TransferFailed, match="was changed while it was being fetched"):
        fetch()


def test_a_file_that_has_changed_is_not_taken_for_the_one_of_before(
    fetch: Callable[..., ResolvedRevisions], site: Site, tmp_path: Path
) -> None:
    """A job keeps what it began with."""
    fetch()
    site.files["/sets/train.jsonl"] = DATA[:700]
    for path in (tmp_path / "work/sources/https").rglob("train.jsonl"):
        path.unlink()

    with pytest.raises(TransferRefused, match="has changed since this job first fetched it"):
        fetch()


def test_redirects_are_followed_where_they_are_allowed(
    fetch: Callable[..., ResolvedRevisions], site: Site, tmp_path: Path
) -> None:
    """A signed address of a content network is followed, and told nowhere."""
    site.files["/cdn/x"] = DATA
    site.redirects["/sets/train.jsonl"] = "/cdn/x?signature=secret"
    allowed = [f"{site.url}/sets/*", f"{site.url}/cdn/*"]

    fetched = fetch(allowed=allowed)

    assert content(site, fetched, tmp_path) == DATA
    kept = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert kept
    assert not any("signature" in text or "secret" in text for text in kept)


REFUSED_REDIRECTS = {
    "another host": (
        "https://elsewhere.example/x?signature=secret",
        "elsewhere.example/x, which is not allowed",
    ),
    "another port": ("https://localhost:1/x", "which is not allowed"),
    "no encryption": ("http://localhost/x", "which is no https:// address"),
    "a password": ("https://user:word@localhost/x", "which is no https:// address without a user"),
    "a file of the node": ("file:///etc/passwd", "which is no https:// address"),
}


@pytest.mark.parametrize(("target", "why"), REFUSED_REDIRECTS.values(), ids=REFUSED_REDIRECTS)
def test_redirects_elsewhere_are_not_followed(
    fetch: Callable[..., ResolvedRevisions], site: Site, target: str, why: str
) -> None:
    """Nothing is asked of where they lead, and what signs an address is not told."""
    site.redirects["/sets/train.jsonl"] = target

    with pytest.raises(TransferRefused, match=why) as caught:
        fetch(allowed=[f"{site.url}/*"])
    assert len(site.asked) == 1
    assert "secret" not in str(caught.value)
    assert "word@" not in str(caught.value)


def test_a_circle_of_redirects_ends(fetch: Callable[..., ResolvedRevisions], site: Site) -> None:
    """After a few."""
    site.redirects["/sets/train.jsonl"] = "/sets/train.jsonl"

    with pytest.raises(TransferRefused, match="redirected more than 5 times"):
        fetch()


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no such file": ({"status": 404}, "HTTP 404: there is no such file"),
    "credentials": (
        {"status": 401},
        "HTTP 401: the file needs credentials, which https:// sources do not have",
    ),
    "not for everybody": ({"status": 403}, "HTTP 403: the server does not give it to everybody"),
    "a web page": ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "answers with a web page"),
    "no length": (
        {"headers": {"Content-Length": "", "Connection": "close"}, "ranges": False},
        "does not say how long",
    ),
    "compressed": ({"headers": {"Content-Encoding": "gzip"}}, "its server compresses what it sends"),
}


@pytest.mark.parametrize(("site_is", "why"), REFUSALS.values(), ids=REFUSALS)
def test_a_file_that_cannot_be_fetched_is_told(
    fetch: Callable[..., ResolvedRevisions], site: Site, site_is: dict[str, Any], why: str
) -> None:
    """In a sentence that says what to do."""
    for name, value in site_is.items():
        setattr(site, name, value)

    with pytest.raises(TransferRefused, match=why):
        fetch()


def test_a_server_that_is_busy_is_asked_again(fetch: Callable[..., ResolvedRevisions], site: Site) -> None:
    """For as long as a job allows."""
    site.status = 503

    with pytest.raises(TransferFailed, match="HTTP 503; gave up"):
        fetch()
    assert len(site.asked) > 1


def test_a_certificate_that_nobody_signed_is_refused(
    fetch: Callable[..., ResolvedRevisions], tmp_path: Path, site: Site
) -> None:
    """The administrator's authorities are those that count."""
    make_authority(tmp_path)

    with pytest.raises(TransferRefused, match="not signed by a trusted authority"):
        fetch(SSL_CERT_FILE=str(tmp_path / "ca.crt"))
