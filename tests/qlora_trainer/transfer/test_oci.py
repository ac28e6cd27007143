"""The adapter to a registry: the reference one, which asks for a login, behind a wire that breaks."""

import base64
import contextlib
import hashlib
import json
import os
import socket
import socketserver
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from qlora_contract.remote import parse_remote
from qlora_trainer.errors import Fenced, TransferFailed, TransferRefused
from qlora_trainer.transfer.credentials import DOCKER_CONFIG, Credentials, redact
from qlora_trainer.transfer.oci import Oci, login_of, manifest_of
from qlora_trainer.transfer.publish import publish
from qlora_trainer.transfer.retry import Retrier
from testcluster import binaries
from testcluster.remote import Transfers

PASSWORD = "pass-word-1"
HTPASSWD = "user:$2a$04$oZC3jACn4vbQgyW4gS.HZ.aygP.mJo0X3ujH2u6W2qbapNSJUbMhK\n"
"""Of the user `user` with PASSWORD, by bcrypt."""
WEIGHTS = os.urandom(3_000_000)
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS, "empty.txt": b""}


def docker_config(registry: str, password: str = PASSWORD) -> str:
    """What a Secret of type kubernetes.io/dockerconfigjson holds."""
    login = base64.b64encode(f"user:{password}".encode()).decode()
    return json.dumps({"auths": {registry: {"auth": login}}})


# --- without a registry

LOGIN = base64.b64encode(b"user:word").decode()
CONFIGS = {
    "a login in base64": ({"host:5000": {"auth": LOGIN}}, LOGIN),
    "a name and a password": ({"host:5000": {"username": "user", "password": "word"}}, LOGIN),
    "an address": ({"https://host:5000": {"auth": LOGIN}}, LOGIN),
    "of another registry": ({"host": {"auth": LOGIN}}, None),
    "none": ({}, None),
}


@pytest.mark.parametrize(("auths", "login"), CONFIGS.values(), ids=CONFIGS)
def test_the_login_for_a_registry(auths: dict[str, Any], login: str | None) -> None:
    """As Docker finds it: by the host with its port."""
    credentials = Credentials("output", {DOCKER_CONFIG: json.dumps({"auths": auths})})

    assert login_of("host:5000", credentials, {}) == login


@pytest.mark.parametrize(
    "text", ["", "[]", '{"auths": {"host": {"auth": "no base64"}}}', '{"auths": {"host": 3}}']
)
def test_what_is_no_docker_configuration_is_refused_unquoted(text: str) -> None:
    """The message names the field, and nothing of what it holds."""
    with pytest.raises(
        TransferRefused, match=r"output.credentialsSecret is no Docker configuration"
    ) as refused:
        login_of("host", Credentials("output", {DOCKER_CONFIG: text}), {})
    assert "no base64" not in str(refused.value)


def test_passwords_of_a_docker_configuration_are_blotted_out(tmp_path: Path) -> None:
    """Also where they stand only within base64."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / DOCKER_CONFIG).write_text(docker_config("host"))
    (tmp_path / "output" / "..data").mkdir()

    said = redact(f"sent user:{PASSWORD} as {LOGIN}", {"QLORA_CREDENTIALS": str(tmp_path)})

    assert PASSWORD not in said


def test_a_manifest_depends_on_the_files_alone() -> None:
    """In whatever order they were sent."""
    from qlora_trainer.transfer.oci import blob_of

    one, other = {"a": blob_of(b"1"), "b": blob_of(b"2")}, {"b": blob_of(b"2"), "a": blob_of(b"1")}

    assert manifest_of(one) == manifest_of(other)


@pytest.mark.parametrize(
    "elsewhere", ["http://10.0.0.1/x", "http://registry.example/v2/x", "ftp://registry.example/x"]
)
def test_uploads_go_nowhere_without_tls(elsewhere: str, tmp_path: Path) -> None:
    """A registry may keep blobs elsewhere, but sends nobody's login or adapter over the network in plain text."""
    asked: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(f"{request.method} {request.url}")
        if request.method == "HEAD":
            return httpx2.Response(404)
        return httpx2.Response(202, headers={"Location": elsewhere})

    (tmp_path / "a").write_bytes(b"weights")
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    registry = Oci(parse_remote("oci://registry.example/team/a:v1"), Credentials("output"), {"HOME": "/"}, 1)
    registry._client = httpx2.Client(transport=httpx2.MockTransport(answer))

    with pytest.raises(TransferRefused, match="without TLS"):
        registry.upload(tmp_path, ["a"], lambda: None, lambda _: None, Retrier(1))

    assert [line.split("/v2/")[0] for line in asked] == [
        "HEAD https://registry.example",
        "POST https://registry.example",
    ]


# --- with one


class Wire(socketserver.ThreadingTCPServer):
    """A relay before the registry that breaks each connection of a list once so many bytes went to it."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.target = port
        self.breaks: list[int] = []
        self.lock = threading.Lock()

    @property
    def host(self) -> str:
        """Of URIs."""
        return f"127.0.0.1:{self.server_address[1]}"


class Relay(socketserver.BaseRequestHandler):
    """One connection."""

    server: Wire

    def handle(self) -> None:
        """Pass bytes on, both ways."""
        with socket.create_connection(("127.0.0.1", self.server.target)) as there:
            back = threading.Thread(target=self.pass_on, args=(there, self.request), daemon=True)
            back.start()
            self.pass_on(self.request, there, counted=True)

    def pass_on(self, source: socket.socket, sink: socket.socket, *, counted: bool = False) -> None:
        """Until one side has had enough."""
        passed = 0
        try:
            while data := source.recv(1 << 16):
                passed += len(data)
                with self.server.lock:
                    breaks = counted and self.server.breaks and passed > self.server.breaks[0]
                    if breaks:
                        self.server.breaks.pop(0)
                if breaks:
                    break
                sink.sendall(data)
        except OSError:
            pass
        for side in (source, sink):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


@dataclass
class Registry:
    """The registry, and the wire to it."""

    wire: Wire
    port: int

    def get(self, path: str) -> bytes:
        """Past the wire, with the right login."""
        login = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v2/{path}",
            headers={
                "Authorization": f"Basic {login}",
                "Accept": "application/vnd.oci.image.manifest.v1+json",
            },
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return bytes(answer.read())

    def pull(self, name: str, reference: str) -> dict[str, bytes]:
        """The files of an artifact, as a client of ORAS writes them."""
        manifest = json.loads(self.get(f"{name}/manifests/{reference}"))
        return {
            layer["annotations"]["org.opencontainers.image.title"]: self.get(
                f"{name}/blobs/{layer['digest']}"
            )
            for layer in manifest["layers"]
        }


def listens(port: int) -> bool:
    """Whether somebody does."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry of this module's, with a login."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "htpasswd").write_text(HTPASSWD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": f"127.0.0.1:{port}"},
        "auth": {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    program = binaries.built("registry")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(program), "serve", str(folder / "config.yaml")], stdout=log, stderr=log
        )
    try:
        while not listens(port):
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.02)
        with Wire(port) as wire:
            threading.Thread(target=wire.serve_forever, args=(0.05,), daemon=True).start()
            yield Registry(wire, port)
            wire.shutdown()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def registry(started: Registry) -> Registry:
    """The registry, on a wire that is sound."""
    started.wire.breaks.clear()
    return started


def write(folder: Path, files: dict[str, bytes], **more: str) -> None:
    """A finished folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    (folder / "manifest.json").write_text(json.dumps({"sha256": "0", "files": hashes, **more}))


@pytest.fixture
def send(registry: Registry, tmp_path: Path) -> Callable[..., str]:
    """Publish a job's adapter to `team/NAME:v1`."""
    transfers = Transfers(tmp_path, {})
    write(transfers.job() / "adapter", ADAPTER)

    def do(
        name: str,
        password: str | None = PASSWORD,
        count: Callable[[int, int], None] = lambda *_: None,
        **output: Any,
    ) -> str:
        if password is not None:
            transfers.credentials("output", **{DOCKER_CONFIG: docker_config(registry.wire.host, password)})
        destination = f"oci://{registry.wire.host}/team/{name}:v1"
        config = transfers.config("publish", output={"destination": destination, **output})
        for form in output.get("formats", []):
            write(transfers.job() / "exports" / form, {"model.bin": b"merged"}, adapter_sha256="0")
        environ = {"QLORA_CREDENTIALS": str(tmp_path / "credentials"), "HOME": str(tmp_path)}
        return publish(config, {"claim": tmp_path / "claim"}, environ, Retrier(20), count)

    return do


@pytest.mark.cluster
def test_an_artifact_holds_the_adapter_and_what_was_made_of_it(
    send: Callable[..., str], registry: Registry
) -> None:
    """A layer for each file, named as it is to be written; the URI has the digest of the manifest."""
    uri = send("whole", formats=["merged"])

    named, _, digest = uri.partition("@")
    assert parse_remote(named).kind == "artifact"
    manifest = registry.get(f"team/whole/manifests/{digest}")
    assert f"sha256:{hashlib.sha256(manifest).hexdigest()}" == digest
    assert registry.get("team/whole/manifests/v1") == manifest
    files = registry.pull("team/whole", "v1")
    assert {name: files[name] for name in ADAPTER} == ADAPTER
    assert files["exports/merged/model.bin"] == b"merged"
    assert {"manifest.json", "exports/merged/manifest.json"} < set(files)


@pytest.mark.cluster
def test_oras_pulls_what_was_published(send: Callable[..., str], registry: Registry, tmp_path: Path) -> None:
    """The package `oras`, a client that is not ours, writes the adapter and its exports into their folders."""
    oras = pytest.importorskip("oras.client", reason="needs oras")
    send("pulled", formats=["merged"])
    client = oras.OrasClient(hostname=f"127.0.0.1:{registry.port}", insecure=True, auth_backend="basic")
    client.auth.set_basic_auth("user", PASSWORD)

    client.pull(target=f"127.0.0.1:{registry.port}/team/pulled:v1", outdir=str(tmp_path / "pulled"))

    assert {name: (tmp_path / "pulled" / name).read_bytes() for name in ADAPTER} == ADAPTER
    assert (tmp_path / "pulled" / "exports" / "merged" / "model.bin").read_bytes() == b"merged"


@pytest.mark.cluster
def test_the_same_twice_is_sent_once(send: Callable[..., str], registry: Registry) -> None:
    """Not a byte goes to the registry again: one small break would show it."""
    first = send("twice")
    registry.wire.breaks.append(100_000)

    assert send("twice") == first
    assert registry.wire.breaks == [100_000]


@pytest.mark.cluster
def test_a_file_whose_connection_breaks_is_sent_anew(send: Callable[..., str], registry: Registry) -> None:
    """And counted once."""
    done = []
    registry.wire.breaks += [1_500_000, 2_500_000]

    send("broken", count=lambda sent, total: done.append((sent, total)))

    assert registry.wire.breaks == []
    assert registry.pull("team/broken", "v1")["adapter_model.safetensors"] == WEIGHTS
    assert sum(sent for sent, _ in done) == sum(total for _, total in done)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("password", "said"),
    [
        pytest.param(None, "wants a login: name a Secret of type kubernetes.io/dockerconfigjson", id="none"),
        pytest.param(
            "wrong-word", r"the login for 127.0.0.1:\d+ in output.credentialsSecret is not valid", id="wrong"
        ),
    ],
)
def test_a_login_that_is_wrong_is_told_at_once(
    send: Callable[..., str], password: str | None, said: str
) -> None:
    """It would be wrong again."""
    with pytest.raises(TransferRefused, match=said) as refused:
        send("refused", password)
    assert "wrong-word" not in str(refused.value)


@pytest.mark.cluster
def test_a_tag_is_set_by_the_attempt_that_has_the_job(
    send: Callable[..., str], registry: Registry, tmp_path: Path
) -> None:
    """One that was overtaken leaves files that nothing names."""
    fence = tmp_path / "claim/work/jobs/j/fence.json"

    def overtake(sent: int, total: int) -> None:
        if sent:
            fence.write_text(json.dumps({"uid": "u", "attempt": 99}))

    with pytest.raises(Fenced):
        send("fenced", count=overtake)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        registry.get("team/fenced/manifests/v1")


@pytest.mark.cluster
def test_a_file_that_changes_on_the_disk_is_not_published(
    send: Callable[..., str], registry: Registry, tmp_path: Path
) -> None:
    """The registry verifies what it gets."""
    weights = tmp_path / "claim/work/jobs/j/adapter/adapter_model.safetensors"

    def spoil(sent: int, total: int) -> None:
        if sent and weights.read_bytes()[-1:] == WEIGHTS[-1:]:
            with weights.open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                stream.write(bytes([WEIGHTS[-1] ^ 1]))

    with pytest.raises(
        TransferFailed, match=r"other bytes of adapter_model.safetensors than its manifest.json names"
    ):
        send("spoiled", count=spoil)
