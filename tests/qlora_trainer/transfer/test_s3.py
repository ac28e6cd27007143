"""S3, by its protocol: what is listed and read, and what each refusal means."""

import base64
import hashlib
import ssl
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.remote import parse_remote
from qlora_trainer.errors import ConfigurationError, TransferFailed, TransferRefused
from qlora_trainer.transfer.credentials import Credentials
from qlora_trainer.transfer.remote_files import Digest, RemoteFile
from qlora_trainer.transfer.retry import TransientError
from qlora_trainer.transfer.s3 import S3, digest_of, fingerprint
from testcluster.certificates import issue, make_authority
from testcluster.faulty_http import FaultyHttp, answer, cut
from testcluster.remote import BUCKET, SECRET_KEY, Remotes

DATA = b'{"prompt": "a", "completion": "b"}\n' * 100_000
KEYS = {"AWS_ACCESS_KEY_ID": "planted-key", "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


def s3(environ: dict[str, str], uri: str = f"s3://{BUCKET}/sets", role: str = "dataset", **keys: str) -> S3:
    """A bucket, shown keys."""
    return S3(parse_remote(uri), Credentials(role, keys or KEYS), environ, 10)


def listed(server: S3) -> tuple[str, list[RemoteFile]]:
    """All files."""
    return server.list_files("main", lambda files: sorted(files, key=lambda file: file.name))


def names(server: S3) -> list[str]:
    """Of all files."""
    return [file.name for file in listed(server)[1]]


@pytest.fixture
def data(sound: Remotes) -> RemoteFile:
    """A file in the bucket."""
    sound.put("sets/train.jsonl", DATA)
    etag = f'"{hashlib.md5(DATA).hexdigest()}"'
    return RemoteFile("sets/train.jsonl", len(DATA), Digest("md5", etag.strip('"')), etag)


def test_a_listing_has_a_fingerprint_and_hashes(here: dict[str, str], data: RemoteFile) -> None:
    """The revision is a hash over names, sizes and etags: equal for equal content."""
    revision, files = listed(s3(here))

    assert files == [data]
    assert revision == fingerprint([data]) == listed(s3(here))[0]
    assert len(revision) == 64


def test_other_content_is_another_revision(here: dict[str, str], sound: Remotes, data: RemoteFile) -> None:
    """Of what is chosen; what is not read does not matter."""
    before = listed(s3(here))[0]
    sound.put("other/x.jsonl", b"1")
    assert listed(s3(here))[0] == before

    sound.put("sets/train.jsonl", DATA[:-1] + b" ")
    assert listed(s3(here))[0] != before


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        pytest.param("", ["top.jsonl"], id="bucket"),
        pytest.param("/", ["top.jsonl"], id="bucket-slash"),
        pytest.param("/sets", ["sets/a.jsonl", "sets/b.txt"], id="folder"),
        pytest.param("/sets/", ["sets/a.jsonl", "sets/b.txt"], id="folder-slash"),
        pytest.param("/sets/a.jsonl", ["sets/a.jsonl"], id="file"),
        pytest.param("/hub", ["hub/README.md", "hub/data/t.parquet"], id="hubs-layout"),
        pytest.param("/set", [], id="half-a-name"),
        pytest.param("/gone", [], id="nothing"),
    ],
)
def test_a_path_is_a_file_or_a_folder(
    here: dict[str, str], sound: Remotes, path: str, expected: list[str]
) -> None:
    """As on a disk, though S3 knows prefixes only; the marks that consoles make for folders are no files."""
    keys = ["top.jsonl", "sets/", "sets/a.jsonl", "sets/b.txt", "sets/deep/c.jsonl"]
    for key in [*keys, "hub/README.md", "hub/data/t.parquet", "hub/data/old/u.parquet"]:
        sound.put(key, b"1")

    assert names(s3(here, f"s3://{BUCKET}{path}")) == expected


def test_many_files_come_in_pages(here: dict[str, str], sound: Remotes) -> None:
    """A thousand a page."""
    for number in range(1001):
        sound.put(f"sets/{number:04}.jsonl", b"1")
    server = s3(here)
    _, files = server.list_files("", lambda there: list(there)[-1:])

    assert [file.name for file in files] == ["sets/1000.jsonl"]


@pytest.mark.parametrize("offset", [0, 1, len(DATA) - 1])
def test_bytes_come_from_an_offset_on(here: dict[str, str], data: RemoteFile, offset: int) -> None:
    """By a range."""
    assert b"".join(s3(here).read("", data, offset)) == DATA[offset:]


def test_what_was_changed_is_not_read(here: dict[str, str], sound: Remotes, data: RemoteFile) -> None:
    """Half of the old and half of the new would be neither."""
    sound.put("sets/train.jsonl", b"another")
    with pytest.raises(
        TransferFailed, match=r"s3://team/sets/train\.jsonl was changed while it was being fetched"
    ):
        list(s3(here).read("", data, 0))


SHA256 = base64.b64encode(hashlib.sha256(DATA).digest()).decode()
MD5 = hashlib.md5(DATA).hexdigest()


@pytest.mark.parametrize(
    ("facts", "etag", "expected"),
    [
        pytest.param({}, f'"{MD5}"', Digest("md5", MD5), id="one-part"),
        pytest.param({"ServerSideEncryption": "AES256"}, f'"{MD5}"', Digest("md5", MD5), id="sse-s3"),
        pytest.param({"ServerSideEncryption": "aws:kms"}, f'"{MD5}"', None, id="sse-kms"),
        pytest.param({"SSECustomerAlgorithm": "AES256"}, f'"{MD5}"', None, id="sse-c"),
        pytest.param({}, f'"{MD5}-7"', None, id="parts"),
        pytest.param(
            {"ChecksumSHA256": SHA256, "ChecksumType": "FULL_OBJECT"}, f'"{MD5}-7"',
            Digest("sha256", hashlib.sha256(DATA).hexdigest()), id="sha256",
        ),
        pytest.param(
            {"ChecksumSHA256": f"{SHA256}-7", "ChecksumType": "COMPOSITE"}, f'"{MD5}-7"', None, id="sha256-of-parts",
        ),
    ],
)  # fmt: skip
def test_a_hash_is_one_of_all_bytes(facts: dict[str, Any], etag: str, expected: Digest | None) -> None:
    """An etag is one only for what was sent in one piece and is not encrypted with a key of its own."""
    assert digest_of(facts, etag) == expected


def test_a_checksum_that_s3_keeps_is_used(here: dict[str, str], sound: Remotes) -> None:
    """Rather than the etag."""
    sound.put("sets/train.jsonl", DATA, ChecksumAlgorithm="SHA256")

    assert listed(s3(here))[1][0].digest == Digest("sha256", hashlib.sha256(DATA).hexdigest())


def error(code: str) -> bytes:
    """S3's answer that is an error."""
    return (
        f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no: {SECRET_KEY}</Message></Error>".encode()
    )


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (
            403,
            "AccessDenied",
            "s3://team/sets: HTTP 403 (AccessDenied): the keys in dataset.credentialsSecret lack the permission",
        ),
        (403, "InvalidAccessKeyId", "the keys in dataset.credentialsSecret are not valid, or have expired"),
        (403, "SignatureDoesNotMatch", "are not valid"),
        (400, "ExpiredToken", "HTTP 400 (ExpiredToken): the keys in dataset.credentialsSecret are not valid"),
        (404, "NoSuchBucket", "HTTP 404 (NoSuchBucket): there is no bucket team"),
    ],
)
def test_refusals_say_what_would_be_right(
    here: dict[str, str], sound: Remotes, status: int, code: str, said: str
) -> None:
    """Each names the source, the status and the remedy, and not what the server wrote."""
    sound.s3_wire.fault(answer(status, error(code)), times=-1)
    with pytest.raises(TransferRefused) as refused:
        listed(s3(here))

    assert said in str(refused.value)
    assert SECRET_KEY not in str(refused.value)


def test_a_missing_bucket_is_refused(here: dict[str, str], sound: Remotes) -> None:
    """It is not the same as an empty one."""
    with pytest.raises(TransferRefused, match="there is no bucket other"):
        listed(s3(here, "s3://other/x"))


def test_without_keys_requests_are_anonymous(here: dict[str, str], sound: Remotes, data: RemoteFile) -> None:
    """A public bucket answers; of another one, the sentence says what it needs."""
    sound.put("sets/train.jsonl", DATA, ACL="public-read")
    server = S3(parse_remote(f"s3://{BUCKET}/sets"), Credentials("model"), here, 10)
    assert names(server) == ["sets/train.jsonl"]
    assert {each.header("Authorization") for each in sound.s3_wire.passed} == {""}

    sound.s3_wire.fault(answer(403, error("AccessDenied")), times=-1)
    with pytest.raises(
        TransferRefused, match=r"credentials are needed: a Secret with AWS_ACCESS_KEY_ID and .* in model"
    ):
        listed(server)


def test_the_users_own_keys_are_found(
    here: dict[str, str], sound: Remotes, data: RemoteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the AWS tools look for them."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    names(S3(parse_remote(f"s3://{BUCKET}/sets"), Credentials("dataset"), here, 10))

    assert all("planted-key" in each.header("Authorization") for each in sound.s3_wire.passed)


def test_the_region_is_the_administrators(here: dict[str, str], sound: Remotes, data: RemoteFile) -> None:
    """AWS_REGION, which the signature names."""
    names(s3(here))

    assert all("/eu-central-1/s3/" in each.header("Authorization") for each in sound.s3_wire.passed)


@pytest.mark.parametrize(
    ("status", "wait"), [(429, 17), (503, 3), (503, None), (500, None), (502, None), (504, None), (408, None)]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_may_pass_is_told_apart(
    here: dict[str, str], sound: Remotes, data: RemoteFile, status: int, wait: int | None, method: str
) -> None:
    """With the seconds that the server asks to wait."""
    headers = {} if wait is None else {"Retry_After": str(wait)}
    sound.s3_wire.fault(
        answer(status, error("SlowDown") if method == "GET" else b"", **headers), method=method
    )
    with pytest.raises(TransientError) as interrupted:
        listed(s3(here))

    assert f"HTTP {status}" in str(interrupted.value)
    assert interrupted.value.retry_after == wait


def test_a_connection_that_breaks_may_pass(here: dict[str, str], sound: Remotes, data: RemoteFile) -> None:
    """What has arrived before is handed on."""
    sound.s3_wire.fault(cut(3_000_000), path="/sets/train.jsonl")
    read = bytearray()
    with pytest.raises(TransientError):
        deque(map(read.extend, s3(here).read("", data, 0)))

    assert read == DATA[:3_000_000]


@pytest.mark.parametrize("body", [b"<html>sign in", b"sign in", b"{}"])
def test_an_answer_that_is_not_of_s3_may_pass(here: dict[str, str], sound: Remotes, body: bytes) -> None:
    """A captive portal, say, between us and S3."""
    sound.s3_wire.fault(answer(200, body))
    with pytest.raises(TransientError, match=r"s3://team/sets: (HTTP 500|ResponseParserError)"):
        listed(s3(here))


def test_nobody_there_may_pass(here: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may come back."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(TransientError, match="s3://team/sets: EndpointConnectionError"):
        listed(s3(here))


# --- the way there


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority of our own, and a server's certificate."""
    folder = tmp_path_factory.mktemp("tls")
    make_authority(folder)
    issue(folder, "server", "server", addresses=("IP:127.0.0.1",))
    return folder


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", ""])
def test_certificates_to_trust_are_named(
    here: dict[str, str],
    sound: Remotes,
    data: RemoteFile,
    authority: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """By any of the names that administrators set; without one, a certificate of nobody is refused."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.crt", authority / "server.key")
    port = int(sound.s3.meta.endpoint_url.rpartition(":")[2])
    with FaultyHttp(port, context) as secure:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", secure.url)
        server = s3(here | ({name: str(authority / "ca.crt")} if name else {}))
        if name:
            assert names(server) == ["sets/train.jsonl"]
        else:
            with pytest.raises(TransferRefused, match="set AWS_CA_BUNDLE"):
                listed(server)


def test_a_bundle_that_is_not_there_is_an_error(here: dict[str, str]) -> None:
    """Before anything is asked."""
    with pytest.raises(ConfigurationError, match="AWS_CA_BUNDLE is /nowhere"):
        s3(here | {"AWS_CA_BUNDLE": "/nowhere"})


def test_a_proxy_is_used(
    here: dict[str, str], sound: Remotes, data: RemoteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's name is the proxy's to look up; NO_PROXY goes past it."""
    monkeypatch.setenv("HTTP_PROXY", sound.s3_wire.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.invalid")
    assert names(s3(here)) == ["sets/train.jsonl"]
    assert sound.s3_wire.passed[0].path.startswith("http://s3.invalid/team")

    monkeypatch.setenv("NO_PROXY", "s3.invalid")
    with pytest.raises(TransientError):
        listed(s3(here))
