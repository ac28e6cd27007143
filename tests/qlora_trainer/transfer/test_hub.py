"""The Hub, by its protocol: what is listed and read, and what each refusal means."""

import hashlib
import ssl
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_contract.remote import parse_remote
from qlora_trainer.errors import ConfigurationError, ModelError, TransferFailed, TransferRefused
from qlora_trainer.plan import fetch_config
from qlora_trainer.transfer.credentials import Credentials
from qlora_trainer.transfer.hub import Hub
from qlora_trainer.transfer.remote_files import Digest, RemoteFile
from qlora_trainer.transfer.retry import TransientError
from testcluster.certificates import issue, make_authority
from testcluster.faulty_http import FaultyHttp, answer, cut
from testcluster.hub import SIGNATURE, git_sha1
from testcluster.remote import HUB_TOKEN, Remotes

WEIGHTS = bytes(range(256)) * 8192
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "sub/extra.json": b"[]"}


def hub(environ: dict[str, str], uri: str = "hf://org/name", token: str = "", role: str = "model") -> Hub:
    """A repository of the Hub, shown a token or nothing."""
    return Hub(parse_remote(uri), Credentials(role, {"token": token} if token else {}), environ, 10)


def listed(server: Hub, revision: str = "main") -> tuple[str, list[RemoteFile]]:
    """All files."""
    return server.list_files(revision, lambda files: sorted(files, key=lambda file: file.name))


@pytest.fixture
def commit(sound: Remotes) -> str:
    """The commit of a model."""
    return sound.hub.commit("org/name", FILES)


def test_a_listing_has_the_commit_and_the_hashes(here: dict[str, str], commit: str) -> None:
    """The commit that the branch stands for; sha256 for large files and git's sha1 for small ones."""
    assert listed(hub(here)) == (
        commit,
        [
            RemoteFile("config.json", 2, Digest("git-sha1", git_sha1(b"{}"))),
            RemoteFile(
                "model.safetensors", len(WEIGHTS), Digest("sha256", hashlib.sha256(WEIGHTS).hexdigest())
            ),
        ],
    )


@pytest.mark.parametrize("revision", ["main", "v1", "commit"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(
    here: dict[str, str], sound: Remotes, commit: str, revision: str
) -> None:
    """Whatever it is, the answer is its commit."""
    sound.hub.repositories["models", "org/name"].branches["v1"] = commit
    asked = commit if revision == "commit" else revision

    assert listed(hub(here), asked)[0] == commit


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        pytest.param("", ["top.jsonl"], id="whole"),
        pytest.param("/en", ["en/a.jsonl", "en/b.jsonl"], id="folder"),
        pytest.param("/en/a.jsonl", ["en/a.jsonl", "en/b.jsonl"], id="file-beside-others"),
        pytest.param("/hub", ["hub/README.md", "hub/data/t.parquet"], id="hubs-layout"),
    ],
)
def test_a_dataset_is_listed_where_it_is(
    here: dict[str, str], sound: Remotes, path: str, expected: list[str]
) -> None:
    """Only the folder that matters is asked for."""
    files = {"top.jsonl": b"1", "en/a.jsonl": b"2", "en/b.jsonl": b"3", "de/c.jsonl": b"4"}
    files |= {"hub/README.md": b"5", "hub/data/t.parquet": b"6", "hub/data/old/u.parquet": b"7"}
    sound.hub.commit("org/name", files, "datasets")

    assert [file.name for file in listed(hub(here, f"hf://datasets/org/name{path}"))[1]] == expected


@pytest.mark.parametrize("offset", [0, 1, len(WEIGHTS) - 1])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
def test_bytes_come_from_an_offset_on(
    here: dict[str, str], sound: Remotes, commit: str, offset: int, ranges: bool
) -> None:
    """Also from a server that sends the whole file whatever it is asked."""
    sound.hub.ranges = ranges
    try:
        read = b"".join(hub(here).read(commit, RemoteFile("model.safetensors", len(WEIGHTS)), offset))
    finally:
        sound.hub.ranges = True
    assert read == WEIGHTS[offset:]


def test_the_token_goes_to_the_hub_alone(here: dict[str, str], sound: Remotes, commit: str) -> None:
    """Large files are read from another host, which gets a signature and must not see the token."""
    sound.hub.repositories["models", "org/name"].private = True
    server = hub(here, token=HUB_TOKEN)
    assert b"".join(server.read(commit, RemoteFile("model.safetensors", 1), 0)) == WEIGHTS

    seen = {each.path.partition("?")[0]: each.header("Authorization") for each in sound.hub_wire.passed}
    assert seen.pop(next(path for path in seen if path.startswith("/cdn/"))) == ""
    assert set(seen.values()) == {f"Bearer {HUB_TOKEN}"}


def gate(remotes: Remotes) -> None:
    """Close the repository to all who have not accepted its terms."""
    remotes.hub.repositories["models", "org/name"].gated = True


def hide(remotes: Remotes) -> None:
    """Make the repository private."""
    remotes.hub.repositories["models", "org/name"].private = True


def nothing(_: Remotes) -> None:
    """Leave the repository as it is."""


REFUSALS = {
    "private": (
        hide, "", "main", "",
        "hf://org/name: HTTP 401: org/name does not exist, or is private and needs a token with read access in model",
    ),
    "token": (nothing, "hf_wrong", "main", "", "HTTP 401: the token in model.credentialsSecret is not valid"),
    "gated": (
        gate, "", "main", "config.json",
        "config.json of hf://org/name: HTTP 401: org/name is gated; accept its terms at http://127.0.0.1",
    ),
    "gated-token": (
        gate, HUB_TOKEN, "main", "config.json", "with the account that the token in model.credentialsSecret belongs to",
    ),
    "revision": (nothing, "", "v9", "", "HTTP 404: org/name has no such revision; model.revision names"),
    "file": (nothing, "", "main", "no.json", "no.json of hf://org/name: HTTP 404: org/name has no such file"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "token", "revision", "file", "said"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_say_what_would_be_right(
    here: dict[str, str],
    sound: Remotes,
    commit: str,
    change: Callable[[Remotes], None],
    token: str,
    revision: str,
    file: str,
    said: str,
) -> None:
    """Each names the source, the status and the remedy, and is final."""
    change(sound)
    server = hub(here, token=token)
    with pytest.raises(TransferRefused) as refused:
        list(server.read(commit, RemoteFile(file, 1), 0)) if file else listed(server, revision)

    assert said in str(refused.value)


def test_advice_names_the_fields_of_an_initial_adapter(
    here: dict[str, str], sound: Remotes, commit: str
) -> None:
    """Its settings stand beside it, not in a section of its own."""
    role = "adapter.initialAdapter"
    with pytest.raises(TransferRefused, match=r"adapter\.initialAdapterRevision names a branch"):
        listed(hub(here, role=role), "v9")
    with pytest.raises(
        TransferRefused, match=r"the token in adapter\.initialAdapterCredentialsSecret is not"
    ):
        listed(hub(here, role=role, token="hf_wrong"))


def test_a_missing_repository_is_refused(here: dict[str, str], sound: Remotes) -> None:
    """With a token that could see it, too."""
    for token in ("", HUB_TOKEN):
        with pytest.raises(TransferRefused, match=r"hf://org/other: HTTP 40[14]: org/other does not exist"):
            listed(hub(here, "hf://org/other", token=token))


@pytest.mark.parametrize(
    ("status", "wait"),
    [(429, 17), (429, None), (500, None), (502, None), (503, 3), (504, None), (408, None)],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/revision/", "/resolve/", "/cdn/"])
def test_what_may_pass_is_told_apart(
    here: dict[str, str], sound: Remotes, commit: str, status: int, wait: int | None, path: str
) -> None:
    """With the seconds that the server asks to wait."""
    headers = {} if wait is None else {"Retry_After": str(wait)}
    sound.hub_wire.fault(answer(status, b"{}", **headers), path=path)
    server = hub(here)
    with pytest.raises(TransientError) as interrupted:
        listed(server) if path == "/revision/" else list(
            server.read(commit, RemoteFile("model.safetensors", 1), 0)
        )

    assert f"HTTP {status}" in str(interrupted.value)
    assert interrupted.value.retry_after == wait


def test_pages_of_a_listing_are_tried_again(here: dict[str, str], sound: Remotes, commit: str) -> None:
    """By huggingface_hub itself."""
    sound.hub_wire.fault(answer(503, Retry_After="0"), path="/tree/")

    assert listed(hub(here))[0] == commit


@pytest.mark.parametrize("body", [b"<html>sign in</html>", b"[]", b"null", b'{"id": 1}'])
def test_an_answer_that_is_none_is_not_believed(
    here: dict[str, str], sound: Remotes, commit: str, body: bytes
) -> None:
    """A captive portal, say, between us and the Hub."""
    sound.hub_wire.fault(answer(200, body), path="/revision/")
    with pytest.raises((TransientError, TransferFailed)) as ended:
        listed(hub(here))

    assert str(ended.value).startswith("hf://org/name: ")


def test_a_connection_that_breaks_may_pass(here: dict[str, str], sound: Remotes, commit: str) -> None:
    """What has come before is handed on; the signature of the address is not told."""
    sound.hub_wire.fault(cut(1000), path="/cdn/")
    read = bytearray()
    with pytest.raises(TransientError) as interrupted:
        deque(map(read.extend, hub(here).read(commit, RemoteFile("model.safetensors", len(WEIGHTS)), 0)))

    assert read == WEIGHTS[:1000]
    assert SIGNATURE not in str(interrupted.value)


def test_nobody_there_may_pass(here: dict[str, str]) -> None:
    """The sentence names the host."""
    with pytest.raises(TransientError, match=r"hf://org/name: 127.0.0.1: ConnectError \(.*refused"):
        listed(hub(here | {"HF_ENDPOINT": "http://127.0.0.1:1"}))


@pytest.mark.parametrize("endpoint", ["hub.example", "ftp://hub.example", "http://"])
def test_an_endpoint_that_is_no_address_is_refused(here: dict[str, str], endpoint: str) -> None:
    """Before anything is asked."""
    with pytest.raises(ConfigurationError, match=r"HF_ENDPOINT is .*; it must be http"):
        hub(here | {"HF_ENDPOINT": endpoint})


# --- the way there


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority of our own, and a server's certificate."""
    folder = tmp_path_factory.mktemp("tls")
    make_authority(folder)
    issue(folder, "server", "server", addresses=("IP:127.0.0.1",))
    return folder


@pytest.fixture
def secure(sound: Remotes, authority: Path) -> Iterator[FaultyHttp]:
    """The Hub over TLS, with a certificate that nobody trusts by himself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.crt", authority / "server.key")
    with FaultyHttp(sound.hub.port, context) as wire:
        yield wire


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_certificates_to_trust_are_named(
    here: dict[str, str], commit: str, secure: FaultyHttp, authority: Path, name: str
) -> None:
    """By either of the names that administrators set."""
    environ = here | {"HF_ENDPOINT": secure.url, name: str(authority / "ca.crt")}

    assert listed(hub(environ))[0] == commit


def test_a_certificate_of_nobody_is_refused(here: dict[str, str], commit: str, secure: FaultyHttp) -> None:
    """At once, with the variable to set."""
    with pytest.raises(TransferRefused, match=r"the certificate of 127.0.0.1.* set SSL_CERT_FILE"):
        listed(hub(here | {"HF_ENDPOINT": secure.url}))


def test_a_proxy_is_used(
    here: dict[str, str], sound: Remotes, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's name is the proxy's to look up."""
    monkeypatch.setenv("HTTP_PROXY", sound.hub_wire.url)

    assert listed(hub(here | {"HF_ENDPOINT": "http://hub.invalid"}))[0] == commit
    assert sound.hub_wire.passed[0].path.startswith("http://hub.invalid/api/models/org/name")


def test_no_proxy_goes_past_it(here: dict[str, str], commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the hosts that it names."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with pytest.raises(TransientError):
        listed(hub(here))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    assert listed(hub(here))[0] == commit


def test_the_size_of_a_model_costs_its_config_json(
    sound: Remotes, here: dict[str, str], tmp_path: Path
) -> None:
    """Sizes of weights come from the listing; no byte of them is fetched."""
    files = {
        "config.json": b'{"model_type": "llama"}',
        "model-00001-of-00002.safetensors": b"w" * 70,
        "model-00002-of-00002.safetensors": b"w" * 30,
        "tokenizer.json": b"{}",
    }
    sound.hub.commit("org/name", files)
    sound.hub.requests.clear()

    assert fetch_config("hf://org/name", None, tmp_path) == 100
    assert (tmp_path / "config.json").read_bytes() == files["config.json"]
    fetched = {path.rpartition("/")[2] for _, path, _ in sound.hub.requests if "/resolve/" in path}
    assert fetched == {"config.json"}

    sound.hub.commit("org/other", {"README.md": b""})
    with pytest.raises(ModelError, match=r"hf://org/other has no config\.json"):
        fetch_config("hf://org/other", None, tmp_path)
