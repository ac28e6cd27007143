"""The adapter to its destination: whole or not seen, once, and by the attempt that has the job."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.errors import ConfigurationError, Fenced, TransferFailed, TransferRefused
from qlora_trainer.transfer import s3
from qlora_trainer.transfer.publish import publish
from qlora_trainer.transfer.retry import Retrier
from testcluster.faulty_http import Fault, answer
from testcluster.remote import BUCKET, HUB_TOKEN, Remotes, Transfers

# huggingface_hub's upload uses httpx's older words.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ADAPTER = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": bytes(range(256)) * 4000,
    "README.md": b"---\nbase_model: org/name\n---\n# j\n",
}
S3 = {"output": {"destination": f"s3://{BUCKET}/adapters/j"}}
HUB = {"output": {"destination": "hf://org/adapter"}}


def write_adapter(folder: Path, files: dict[str, bytes]) -> bytes:
    """A published adapter, and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    (folder / "manifest.json").write_text(json.dumps({"sha256": "0", "files": hashes}))
    return (folder / "manifest.json").read_bytes()


@pytest.fixture
def manifest(transfers: Transfers) -> bytes:
    """That of the job's adapter."""
    return write_adapter(transfers.job() / "adapter", ADAPTER)


@pytest.fixture
def send(transfers: Transfers, here: dict[str, str], manifest: bytes) -> Callable[..., str]:
    """Publish the job's adapter, in this process."""
    transfers.credentials("output", token=HUB_TOKEN, AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret")
    environ = here | {"QLORA_CREDENTIALS": str(transfers.folder / "credentials")}

    def do(
        count: Callable[[int, int], None] = lambda done, total: None, limit: float = 20, **more: Any
    ) -> str:
        config = transfers.config("publish", **more)
        return publish(config, {"claim": transfers.folder / "claim"}, environ, Retrier(limit), count)

    return do


def objects(remotes: Remotes) -> dict[str, bytes]:
    """What is in the bucket."""
    return {key: remotes.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in remotes.list_keys()}


def test_s3_gets_all_files(send: Callable[..., str], sound: Remotes, manifest: bytes) -> None:
    """Directly at the destination."""
    assert send(**S3) == f"s3://{BUCKET}/adapters/j"
    assert objects(sound) == {
        f"adapters/j/{n}": d for n, d in (ADAPTER | {"manifest.json": manifest}).items()
    }


def test_a_whole_bucket_may_be_the_destination(send: Callable[..., str], sound: Remotes) -> None:
    """Then there is no path."""
    assert send(output={"destination": f"s3://{BUCKET}"}) == f"s3://{BUCKET}"
    assert "manifest.json" in sound.list_keys()


def test_the_manifest_comes_last(send: Callable[..., str], sound: Remotes) -> None:
    """Who finds it finds all that it names."""
    send(**S3)
    puts = [each.path.partition("?")[0] for each in sound.s3_wire.passed if each.method == "PUT"]

    assert puts[-1] == f"/{BUCKET}/adapters/j/manifest.json"
    assert len(puts) == len(ADAPTER) + 1


def test_an_older_copy_is_not_whole_meanwhile(
    send: Callable[..., str], transfers: Transfers, sound: Remotes
) -> None:
    """Its manifest goes first, so that nobody takes new files for old ones."""
    send(**S3)
    write_adapter(transfers.job() / "adapter", ADAPTER | {"README.md": b"new"})
    sound.s3_wire.fault(answer(403), path="/adapters/j/adapter_model.safetensors", method="PUT")
    with pytest.raises(TransferRefused):
        send(**S3)
    assert "adapters/j/manifest.json" not in sound.list_keys()

    send(**S3)
    assert objects(sound)["adapters/j/README.md"] == b"new"


def test_the_same_twice_is_sent_once(send: Callable[..., str], sound: Remotes) -> None:
    """To either; the answer is the same."""
    first = send(**S3), send(**HUB)
    for wire in (sound.s3_wire, sound.hub_wire):
        wire.passed.clear()

    assert (send(**S3), send(**HUB)) == first
    assert {each.method for each in sound.s3_wire.passed} == {"GET"}
    assert not any(each.method == "PUT" or "/commit/" in each.path for each in sound.hub_wire.passed)


def test_the_hub_gets_one_commit(send: Callable[..., str], sound: Remotes, manifest: bytes) -> None:
    """In a new repository, which is private; the URI names the commit."""
    uri = send(**HUB)
    repository = sound.hub.repositories["models", "org/adapter"]

    assert uri == f"hf://org/adapter@{repository.branches['main']}"
    assert repository.private
    assert len(repository.files) == 2  # the empty one, and ours
    there = repository.files[repository.branches["main"]]
    assert {name: there[name] for name in (*ADAPTER, "manifest.json")} == ADAPTER | {
        "manifest.json": manifest
    }


def test_a_repository_that_is_there_is_used(send: Callable[..., str], sound: Remotes) -> None:
    """What it holds besides stays, and so does its being public."""
    sound.hub.commit("org/adapter", {"notes.txt": b"mine"})
    send(**HUB)
    repository = sound.hub.repositories["models", "org/adapter"]

    assert repository.files[repository.branches["main"]]["notes.txt"] == b"mine"
    assert not repository.private


@pytest.mark.parametrize("destination", [S3, HUB], ids=["s3", "hub"])
def test_what_may_pass_is_tried_again(
    send: Callable[..., str], sound: Remotes, destination: dict[str, Any]
) -> None:
    """Wherever it happens."""
    for method, path in (("PUT", "/adapters/j/README.md"), ("PUT", "/adapters/j/manifest.json")):
        sound.s3_wire.fault(answer(503), path=path, method=method)
    for method, path in (
        ("POST", "/create"),
        ("POST", "/preupload/"),
        ("PUT", "/lfs/"),
        ("POST", "/commit/"),
    ):
        sound.hub_wire.fault(answer(503, b"{}"), path=path, method=method)

    assert send(**destination)


def test_a_lost_answer_makes_no_second_commit(send: Callable[..., str], sound: Remotes) -> None:
    """The Hub had committed when the connection broke."""
    sound.hub_wire.fault(Fault(change=lambda chunks: iter(())), path="/commit/", method="POST")
    send(**HUB)

    assert len(sound.hub.repositories["models", "org/adapter"].files) == 2


REFUSALS = {
    "bucket": ("s3://another/x", "s3://another/x: HTTP 404 (NoSuchBucket): there is no bucket another"),
    "reader": (
        "hf://org/adapter",
        "hf://org/adapter: HTTP 403: the token in output.credentialsSecret lacks the permission",
    ),
}


@pytest.mark.parametrize(("destination", "said"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_final(
    send: Callable[..., str], transfers: Transfers, sound: Remotes, destination: str, said: str
) -> None:
    """The sentence names the destination and the remedy."""
    transfers.credentials("output", token="hf_reader")
    sound.hub.tokens["hf_reader"] = "read"
    with pytest.raises(TransferRefused) as refused:
        send(output={"destination": destination})

    assert said in str(refused.value)


WRONG_CARDS = {
    "base_model: /volumes/claim/model": '"base_model" with value ".*" is not valid',
    "base_model: a b": '"base_model" with value ".*" is not valid',
    "license: my-own-terms": '"license" must be one of ',
    "license: mit\nlicense_name: mit": '"license_name" is only for',
    "datasets: [./data.jsonl, org/data]": '"datasets" with value "./data.jsonl" is not valid',
    "datasets: org/data": '"datasets" must be an array',
    "tags: [1]": '"tags" must be strings',
}


@pytest.mark.parametrize(("front", "said"), WRONG_CARDS.items())
def test_a_card_that_the_hub_refuses_is_refused_at_once(
    send: Callable[..., str], transfers: Transfers, sound: Remotes, front: str, said: str
) -> None:
    """In the Hub's words, before anything is sent: trying again would change nothing."""
    write_adapter(transfers.job() / "adapter", {**ADAPTER, "README.md": f"---\n{front}\n---\n".encode()})
    with pytest.raises(TransferRefused, match=f"hf://org/adapter: .*{said}"):
        send(**HUB)

    assert len(sound.hub.repositories["models", "org/adapter"].files) == 1


def test_a_server_that_stays_away_is_given_up(send: Callable[..., str], sound: Remotes) -> None:
    """After the limit."""
    sound.s3_wire.fault(answer(503), method="PUT", times=-1)
    with pytest.raises(TransferFailed, match="HTTP 503; gave up"):
        send(limit=1, **S3)


@pytest.mark.parametrize("damage", ["adapter_model.safetensors", "manifest.json"])
def test_an_adapter_that_is_not_whole_is_not_sent(
    send: Callable[..., str], transfers: Transfers, sound: Remotes, damage: str
) -> None:
    """Every byte is compared with its manifest before."""
    (transfers.job() / "adapter" / damage).write_bytes(b"{}")
    with pytest.raises(ConfigurationError, match="is not a complete adapter; run the job to its end first"):
        send(**S3)

    assert sound.list_keys() == []


def test_without_a_destination_there_is_nothing_to_do(send: Callable[..., str]) -> None:
    """Nobody should have asked."""
    with pytest.raises(ConfigurationError, match=r"output\.destination is not set"):
        send()


@pytest.mark.parametrize("destination", [S3, HUB], ids=["s3", "hub"])
def test_who_lost_the_job_publishes_nothing(
    send: Callable[..., str], transfers: Transfers, sound: Remotes, destination: dict[str, Any]
) -> None:
    """Neither at the start, nor when another attempt takes over in the middle."""
    fence = transfers.job() / "fence.json"
    fence.write_text(json.dumps({"uid": "u", "attempt": 1000}))
    with pytest.raises(Fenced):
        send(**destination)
    assert sound.s3_wire.passed == sound.hub_wire.passed == []
    fence.unlink()

    def take_over(done: int, total: int) -> None:
        fence.write_text(json.dumps({"uid": "u", "attempt": 1001}))

    with pytest.raises(Fenced):
        send(count=take_over, **destination)
    assert "adapters/j/manifest.json" not in sound.list_keys()
    assert all(
        set(r.files[c]) <= {".gitattributes"} for r in sound.hub.repositories.values() for c in r.files
    )


def test_bytes_are_counted(send: Callable[..., str], manifest: bytes) -> None:
    """All that there is, and all that was sent."""
    whole = sum(map(len, ADAPTER.values())) + len(manifest)
    for destination in (S3, HUB):
        sums = [0, 0]

        def count(done: int, total: int, sums: list[int] = sums) -> None:
            sums[0] += done
            sums[1] += total

        send(count=count, **destination)
        assert sums == [whole, whole]


PART = 5 << 20
LARGE = ADAPTER | {"adapter_model.safetensors": bytes(range(256)) * 48_000}
"""Three parts, the last of them smaller."""


@pytest.fixture
def large(transfers: Transfers, manifest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that goes to S3 in parts, which are as small as S3 allows."""
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    write_adapter(transfers.job() / "adapter", LARGE)


def test_a_large_file_is_sent_in_parts(send: Callable[..., str], large: None, sound: Remotes) -> None:
    """A part that fails is sent again by itself."""
    path = "/adapters/j/adapter_model.safetensors"
    sound.s3_wire.fault(answer(503), path=f"{path}?partNumber=2", method="PUT")
    sent: list[int] = []
    send(count=lambda done, total: sent.append(done), **S3)

    parts = [each for each in sound.s3_wire.passed if each.path.startswith(f"/{BUCKET}{path}?partNumber")]
    assert [each.path.partition("partNumber=")[2][0] for each in parts] == ["1", "2", "2", "3"]
    assert objects(sound)["adapters/j/adapter_model.safetensors"] == LARGE["adapter_model.safetensors"]
    assert sent.count(PART) == 2


@pytest.mark.parametrize("lost", [True, False], ids=["lost-answer", "never-arrived"])
def test_parts_become_one_object_whatever_happens_to_the_answer(
    send: Callable[..., str], large: None, sound: Remotes, lost: bool
) -> None:
    """When S3 had put them together before the connection broke, nothing is sent again."""
    fault = Fault(change=lambda chunks: iter(())) if lost else answer(503)
    sound.s3_wire.fault(fault, path="uploadId=", method="POST")
    send(**S3)

    assert objects(sound)["adapters/j/adapter_model.safetensors"] == LARGE["adapter_model.safetensors"]
    assert sum("partNumber" in each.path for each in sound.s3_wire.passed) == 3


def test_parts_of_a_failed_upload_are_removed(send: Callable[..., str], large: None, sound: Remotes) -> None:
    """Nobody would see them, and somebody pays for them."""
    sound.s3_wire.fault(answer(403), path="partNumber=3", method="PUT")
    with pytest.raises(TransferRefused, match="HTTP 403"):
        send(**S3)

    assert "Uploads" not in sound.s3.list_multipart_uploads(Bucket=BUCKET)


MERGED = {"model.safetensors": b"merged", "config.json": b"{}"}
WITH_MERGED = {"formats": ["adapter", "merged"]}


def write_export(folder: Path, adapter_sha256: str) -> None:
    """A complete export of the adapter with that hash."""
    write_adapter(folder, MERGED)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "adapter_sha256": adapter_sha256}))


@pytest.mark.parametrize("destination", ["s3", "hub"])
def test_exports_go_along_in_folders_of_their_own(
    destination: str, send: Callable[..., str], transfers: Transfers, sound: Remotes
) -> None:
    """Before the adapter, so that whoever finds that finds them, and the URI of a Hub's commit has all of it."""
    write_export(transfers.job() / "exports" / "merged", "0")

    uri = send(output={**(S3 if destination == "s3" else HUB)["output"], **WITH_MERGED})

    if destination == "s3":
        assert objects(sound)["adapters/j/exports/merged/model.safetensors"] == b"merged"
        assert "adapters/j/exports/merged/manifest.json" in sound.list_keys()
        puts = [each.path.partition("?")[0] for each in sound.s3_wire.passed if each.method == "PUT"]
        assert puts[-1] == f"/{BUCKET}/adapters/j/manifest.json"
    else:
        repository = sound.hub.repositories["models", "org/adapter"]
        assert uri == f"hf://org/adapter@{repository.branches['main']}"
        files = repository.files[repository.branches["main"]]
        assert {"exports/merged/model.safetensors", "adapter_model.safetensors"} <= set(files)


@pytest.mark.parametrize(
    "sha256", [pytest.param(None, id="missing"), pytest.param("1", id="of another adapter")]
)
def test_an_export_that_is_not_complete_is_not_left_out(
    sha256: str | None, send: Callable[..., str], transfers: Transfers, sound: Remotes
) -> None:
    """The job asked for it."""
    if sha256 is not None:
        write_export(transfers.job() / "exports" / "merged", sha256)

    with pytest.raises(ConfigurationError, match="merged is not a complete export of the adapter"):
        send(output={**S3["output"], **WITH_MERGED})
    assert sound.list_keys() == []
