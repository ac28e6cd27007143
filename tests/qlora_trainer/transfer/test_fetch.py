"""Sources into a workspace: once for all jobs, at the revision that a job keeps."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.paths import resolve
from qlora_contract.run_config import ResolvedRevisions
from qlora_trainer.errors import ConfigurationError, StorageFull, TransferFailed, TransferRefused
from qlora_trainer.transfer.fetch import SourceFetcher
from qlora_trainer.transfer.retry import Retrier
from qlora_trainer.transfer.revisions import with_pinned_revisions
from testcluster.faulty_http import answer, cut, spoil, stall
from testcluster.remote import BUCKET, HUB_TOKEN, Remotes, Transfers, part_bytes, until

WEIGHTS = os.urandom(3_000_000)
MODEL = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"x",
}
DATA = b'{"prompt": "a", "completion": "b"}\n' * 30_000
HUB = {"model": {"source": "hf://org/name"}}
S3 = {"dataset": {"source": f"s3://{BUCKET}/sets/train.jsonl"}}


@pytest.fixture
def commit(sound: Remotes) -> str:
    """The commit of a model."""
    return sound.hub.commit("org/name", MODEL)


@pytest.fixture
def fetch(transfers: Transfers, here: dict[str, str]) -> Callable[..., ResolvedRevisions]:
    """Fetch for a job, in this process."""
    (transfers.folder / "claim").mkdir(exist_ok=True)
    keys = {"AWS_ACCESS_KEY_ID": "planted-key", "AWS_SECRET_ACCESS_KEY": "planted-secret"}
    for role in ("model", "dataset", "adapter-initialadapter"):
        transfers.credentials(role, token=HUB_TOKEN, **keys)
    environ = here | {"QLORA_CREDENTIALS": str(transfers.folder / "credentials")}

    def do(
        limit: float = 20, count: Callable[[int, int], None] = lambda done, total: None, **more: Any
    ) -> ResolvedRevisions:
        config = transfers.config("fetch", **more)
        volumes = {"claim": transfers.folder / "claim"}
        return SourceFetcher(config, volumes, environ, Retrier(limit), count).fetch_all()

    return do


def tree(folder: Path) -> dict[str, bytes]:
    """Files below a folder but those that are not the sources' own."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path: path.relative_to(folder) for path in files}
    return {
        str(name): path.read_bytes()
        for path, name in names.items()
        if not any(p.startswith(".") for p in name.parts)
    }


def test_a_model_and_a_dataset_are_fetched(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, sound: Remotes, commit: str
) -> None:
    """Real files, where run.json says that they are; what training does not read is left where it is."""
    sound.put("sets/train.jsonl", DATA)
    fetched = fetch(**HUB, **S3)

    assert fetched.model == commit
    wanted = {name: data for name, data in MODEL.items() if not name.endswith(".bin")}
    expected = {f"hf/org/name/{commit}/{name}": data for name, data in wanted.items()}
    assert tree(transfers.sources) == expected | {f"s3/{BUCKET}/{fetched.dataset}/sets/train.jsonl": DATA}
    assert not any(path.is_symlink() for path in transfers.sources.rglob("*"))
    run = transfers.config("train", fetched=fetched, **HUB, **S3)
    volumes = {"claim": transfers.folder / "claim"}
    assert resolve(run.dataset_uris[0], volumes).read_bytes() == DATA
    assert (resolve(run.model_uri, volumes) / "config.json").read_bytes() == b"{}"


ADAPTER = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"A" * 1000}


def test_an_initial_adapter_is_fetched_and_pinned_as_a_model_is(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, sound: Remotes
) -> None:
    """From the Hub at a tag; the job keeps the commit, whatever the tag becomes."""
    commit = sound.hub.commit("org/tuned", {**ADAPTER, "README.md": b"a card"}, branch="v1")
    named = {"adapter": {"initialAdapter": "hf://org/tuned", "initialAdapterRevision": "v1"}}
    fetched = fetch(**named)

    assert fetched == ResolvedRevisions(adapter=commit)
    assert tree(transfers.sources) == {
        f"hf/org/tuned/{commit}/{name}": data for name, data in ADAPTER.items()
    }
    run = transfers.config("train", fetched=fetched, **named)
    volumes = {"claim": transfers.folder / "claim"}
    assert (resolve(run.initial_adapter_uri or "", volumes) / "adapter_config.json").is_file()
    sound.hub.commit("org/tuned", {**ADAPTER, "adapter_config.json": b"{}"}, branch="v1")
    assert fetch(**named) == fetched
    assert with_pinned_revisions(transfers.config("train", **named), volumes).fetched == fetched


def test_an_initial_adapter_of_a_bucket_is_fetched(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, sound: Remotes
) -> None:
    """As jobs send theirs there."""
    for name, data in ADAPTER.items():
        sound.put(f"adapters/first/{name}", data)
    fetched = fetch(adapter={"initialAdapter": f"s3://{BUCKET}/adapters/first"})

    assert tree(transfers.sources) == {
        f"s3/{BUCKET}/{fetched.adapter}/adapters/first/{name}": data for name, data in ADAPTER.items()
    }


@pytest.mark.parametrize("first", ["model", "adapter"])
def test_a_repository_that_is_a_model_and_an_adapter_is_fetched_as_either(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, sound: Remotes, first: str
) -> None:
    """That the files of the one are there does not mean that those of the other are."""
    sound.hub.commit("org/both", {**MODEL, **ADAPTER})
    asked = {
        "model": {"model": {"source": "hf://org/both"}},
        "adapter": {"adapter": {"initialAdapter": "hf://org/both"}},
    }
    second = "adapter" if first == "model" else "model"
    fetch(name="one", **asked[first])
    fetch(name="two", **asked[second])

    names = {Path(name).name for name in tree(transfers.sources)}
    assert names >= {"model.safetensors", "config.json", *ADAPTER}


def test_sources_on_claims_are_left_alone(fetch: Callable[..., ResolvedRevisions], sound: Remotes) -> None:
    """There is nothing to ask anybody."""
    assert fetch() == ResolvedRevisions()
    assert sound.hub_wire.passed == sound.s3_wire.passed == []


def test_what_is_there_is_not_asked_for(
    fetch: Callable[..., ResolvedRevisions], sound: Remotes, commit: str
) -> None:
    """The same job need not even reach the servers."""
    sound.put("sets/train.jsonl", DATA)
    fetched = fetch(**HUB, **S3)
    for wire in (sound.hub_wire, sound.s3_wire):
        wire.fault(answer(500), times=-1)

    assert fetch(**HUB, **S3) == fetched


def test_jobs_share(fetch: Callable[..., ResolvedRevisions], sound: Remotes, commit: str) -> None:
    """Another job asks for the revision, and finds its files there."""
    fetch(**HUB)
    sent = sound.hub_wire.sent("/cdn/")
    assert fetch(name="other", **HUB).model == commit
    assert sound.hub_wire.sent("/cdn/") == sent == len(WEIGHTS)


@pytest.mark.parametrize("how", ["other bytes", "a link elsewhere", "a missing entry of the manifest"])
def test_what_another_job_left_is_hashed_once_for_each_job(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, sound: Remotes, commit: str, how: str
) -> None:
    """Whoever may write the workspace could else give a job other weights under the name of the commit."""
    before = fetch(**HUB)
    folder = transfers.sources / f"hf/org/name/{commit}"
    weights = next(folder.glob("*.safetensors"))
    poison = bytes(len(weights.read_bytes()))
    if how == "a link elsewhere":
        weights.unlink()
        (transfers.sources / "elsewhere").write_bytes(poison)
        weights.symlink_to(transfers.sources / "elsewhere")
    else:
        weights.write_bytes(poison)
    if how == "a missing entry of the manifest":
        (manifest,) = (folder.parent / f".{commit}").glob("manifest-*.json")
        known = json.loads(manifest.read_text())
        del known["files"][weights.name]
        manifest.write_text(json.dumps(known))

    assert fetch(name="other", **HUB) == before
    assert weights.read_bytes() == MODEL[weights.name]
    assert not weights.is_symlink()


def test_a_moved_branch_does_not_move_a_job(
    fetch: Callable[..., ResolvedRevisions], sound: Remotes, commit: str
) -> None:
    """It keeps the commit of its first fetch, also in a workspace that lost the files; a new job gets the new one."""
    fetch(**HUB)
    moved = sound.hub.commit("org/name", MODEL | {"config.json": b"[]"})

    assert fetch(**HUB).model == commit
    assert fetch(name="new", **HUB).model == moved


def test_a_lost_source_is_fetched_again_as_it_was(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, sound: Remotes, commit: str
) -> None:
    """The commit is still there, though the branch has moved."""
    fetch(**HUB)
    sound.hub.commit("org/name", MODEL | {"config.json": b"[]"})
    (transfers.sources / f"hf/org/name/{commit}/config.json").unlink()

    assert fetch(**HUB).model == commit
    assert (transfers.sources / f"hf/org/name/{commit}/config.json").read_bytes() == b"{}"


def test_the_commit_that_run_json_names_is_fetched(
    fetch: Callable[..., ResolvedRevisions], sound: Remotes, commit: str
) -> None:
    """An attempt gets what the one before it got, whatever the job's folder says."""
    sound.hub.commit("org/name", MODEL | {"config.json": b"[]"})

    assert fetch(fetched={"model": commit}, **HUB).model == commit


def test_a_bucket_that_changed_is_refused(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, sound: Remotes
) -> None:
    """Its old content cannot be had; a job that needs it is not given another."""
    sound.put("sets/train.jsonl", DATA)
    first = fetch(**S3).dataset
    sound.put("sets/train.jsonl", DATA + DATA)
    assert fetch(**S3).dataset == first

    (transfers.sources / f"s3/{BUCKET}/{first}/sets/train.jsonl").unlink()
    with pytest.raises(
        TransferRefused, match=f"has changed since this job first fetched it: it was {first} and is now"
    ):
        fetch(**S3)
    assert fetch(name="new", **S3).dataset != first


def test_another_source_under_the_same_name_is_another_matter(
    fetch: Callable[..., ResolvedRevisions], sound: Remotes, commit: str
) -> None:
    """What the folder keeps is for the source and the revision that were asked for."""
    fetch(**HUB)
    tag = sound.hub.commit("org/name", MODEL | {"config.json": b"[]"}, branch="v2")

    assert fetch(model={"source": "hf://org/name", "revision": "v2"}).model == tag


def test_half_a_file_is_resumed(fetch: Callable[..., ResolvedRevisions], sound: Remotes, commit: str) -> None:
    """Not a byte of it is sent twice."""
    for _ in range(2):
        sound.hub_wire.fault(cut(1_000_000), path="/cdn/")
    fetch(**HUB)

    assert sound.hub_wire.sent("/cdn/") == len(WEIGHTS)
    assert [each.sent for each in sound.hub_wire.passed if "/cdn/" in each.path] == [1_000_000] * 3


def test_half_an_object_is_resumed(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, sound: Remotes
) -> None:
    """Not a byte of it is sent twice."""
    sound.put("sets/train.jsonl", WEIGHTS)
    sound.s3_wire.fault(cut(2_000_000), path="/sets/train.jsonl")
    fetched = fetch(**S3)

    assert (transfers.sources / f"s3/{BUCKET}/{fetched.dataset}/sets/train.jsonl").read_bytes() == WEIGHTS
    assert sound.s3_wire.sent("/sets/train.jsonl") == len(WEIGHTS)


@pytest.mark.parametrize("path", ["/cdn/", "/config.json"])
def test_wrong_bytes_are_never_kept(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, sound: Remotes, commit: str, path: str
) -> None:
    """Once: fetched anew. Again and again: an error, and nothing that a job could take for the model."""
    sound.hub_wire.fault(spoil(), path=path, times=-1)
    with pytest.raises(
        TransferFailed, match="was downloaded 2 times and never matched what its source lists"
    ):
        fetch(**HUB)
    with pytest.raises(ConfigurationError):
        with_pinned_revisions(transfers.config("train", **HUB), {"claim": transfers.folder / "claim"})

    sound.hub_wire.heal()
    sound.hub_wire.fault(spoil(), path=path)
    fetch(**HUB)
    assert (transfers.sources / f"hf/org/name/{commit}/model.safetensors").read_bytes() == WEIGHTS


def test_spoilt_objects_are_never_kept(fetch: Callable[..., ResolvedRevisions], sound: Remotes) -> None:
    """By the etag that S3 told before."""
    sound.put("sets/train.jsonl", DATA)
    sound.s3_wire.fault(spoil(), path="/sets/train.jsonl", times=-1)
    with pytest.raises(TransferFailed, match="its md5 is"):
        fetch(**S3)


@pytest.mark.parametrize("source", [HUB, S3], ids=["hub", "s3"])
def test_too_many_requests_are_waited_for(
    fetch: Callable[..., ResolvedRevisions], sound: Remotes, commit: str, source: dict[str, Any]
) -> None:
    """For as long as the server asks."""
    sound.put("sets/train.jsonl", DATA)
    for wire, path in ((sound.hub_wire, "/cdn/"), (sound.s3_wire, "/sets/train.jsonl")):
        wire.fault(answer(429, Retry_After="1"), path=path, times=2)

    assert fetch(**source) != ResolvedRevisions()


def test_a_server_that_stays_away_is_given_up(
    fetch: Callable[..., ResolvedRevisions], sound: Remotes, commit: str
) -> None:
    """After the limit, with its last word."""
    sound.hub_wire.fault(answer(503), path="/cdn/", times=-1)
    with pytest.raises(TransferFailed, match=r"model\.safetensors of hf://org/name: HTTP 503; gave up"):
        fetch(limit=2, **HUB)


def test_bytes_are_counted(fetch: Callable[..., ResolvedRevisions], sound: Remotes, commit: str) -> None:
    """What is there counts as done; what was thrown away does not."""
    sound.hub_wire.fault(spoil(), path="/cdn/")
    sums = [0, 0]

    def count(done: int, total: int) -> None:
        sums[0] += done
        sums[1] += total

    fetch(count=count, **HUB)
    assert sums == [len(WEIGHTS) + 4, len(WEIGHTS) + 4]


def test_a_traversal_is_refused(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, sound: Remotes
) -> None:
    """A repository with a name that leaves its folder is not fetched at all."""
    sound.hub.commit("org/name", MODEL | {"../../../../jobs/j/evil.json": b"{}"})
    with pytest.raises(TransferRefused, match="leads out of its directory"):
        fetch(**HUB)

    assert not list(transfers.folder.rglob("evil.json"))


def test_two_at_once_download_once(fetch: Callable[..., ResolvedRevisions], sound: Remotes) -> None:
    """The second waits for the first, and uses what the first has fetched."""
    sound.put("sets/train.jsonl", DATA)
    held = threading.Event()
    sound.s3_wire.fault(stall(500_000, held), path="/sets/train.jsonl")
    found: list[str | None] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(fetch(name=n, **S3).dataset)) for n in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    until(lambda: sum(each.method == "HEAD" for each in sound.s3_wire.passed) == 2)  # both have listed
    held.set()
    for thread in threads:
        thread.join()

    assert found[0] == found[1] is not None
    assert sound.s3_wire.sent("/sets/train.jsonl") == len(DATA)


@pytest.mark.process
def test_a_full_disk_is_told(
    fetch: Callable[..., ResolvedRevisions],
    transfers: Transfers,
    sound: Remotes,
    commit: str,
    small_disk: Callable[[Path, int], None],
) -> None:
    """Before a byte is fetched, when the sizes tell that it cannot fit."""
    small_disk(transfers.folder / "claim", 2_000_000)
    with pytest.raises(
        StorageFull, match=r"hf://org/name needs another 2.86 MiB, and the workspace has 1.9\d MiB free"
    ):
        fetch(**HUB)

    assert sound.hub_wire.sent("/cdn/") == 0


@pytest.mark.process
def test_a_disk_that_fills_up_is_told(
    fetch: Callable[..., ResolvedRevisions],
    transfers: Transfers,
    sound: Remotes,
    commit: str,
    small_disk: Callable[[Path, int], None],
) -> None:
    """While it is written to; half a file is not left, to take up what others need."""
    small_disk(transfers.folder / "claim", 4_000_000)
    held = threading.Event()
    sound.hub_wire.fault(stall(1_000_000, held), path="/cdn/")

    def fill() -> None:
        until(lambda: part_bytes(transfers.sources) > 500_000)
        (transfers.folder / "claim/others").write_bytes(bytes(2_000_000))
        held.set()

    other = threading.Thread(target=fill)
    other.start()
    with pytest.raises(
        StorageFull, match=r"no space left while fetching model\.safetensors of hf://org/name"
    ):
        fetch(**HUB)
    other.join()

    assert part_bytes(transfers.sources) == 0


def test_what_was_fetched_before_is_found_without_asking(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, sound: Remotes, commit: str
) -> None:
    """By `qlora plan`; what is not there yet is an error that says what gets it."""
    config, volumes = transfers.config("train", **HUB), {"claim": transfers.folder / "claim"}
    with pytest.raises(
        ConfigurationError, match="hf://org/name is not in the workspace yet; fetch it with `qlora fetch`"
    ):
        with_pinned_revisions(config, volumes)
    fetch(**HUB)

    assert with_pinned_revisions(config, volumes).fetched == ResolvedRevisions(model=commit)
    assert with_pinned_revisions(transfers.config("train"), volumes).fetched == ResolvedRevisions()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', '{"model": {"source": "hf://org/name"}}'])
def test_damaged_pins_are_as_if_there_were_none(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, commit: str, text: str
) -> None:
    """They are written anew."""
    transfers.job().mkdir(parents=True)
    (transfers.job() / "fetched.json").write_text(text)

    assert fetch(**HUB).model == commit
    pins = json.loads((transfers.job() / "fetched.json").read_text())
    assert pins["model"] == {"source": "hf://org/name", "revision": "main", "found": commit}


def test_the_manifest_has_the_hashes(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, commit: str
) -> None:
    """Of all that was fetched."""
    fetch(**HUB)
    manifest = json.loads(next((transfers.sources / "hf/org/name").glob(".*/manifest-*.json")).read_text())

    expected = {"size": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest()}
    assert manifest["files"]["model.safetensors"] == expected


MODEL_COMMIT = "ab35140fd3c8641226cda5b7292d1ac77ca93e9b"
SETS = "f46e786a0e33c2295b7fc20f90917be06b7b22549b00879e3b3858128f9b1c2c"
RELEASE_0_1_0 = {
    f"sources/hf/org/name/{MODEL_COMMIT}/config.json": "{}",
    f"sources/hf/org/name/{MODEL_COMMIT}/model.safetensors": "weights",
    f"sources/hf/org/name/.{MODEL_COMMIT}/manifest-cdb4ee2aea69cc6a.json": {
        "source": "hf://org/name",
        "revision": MODEL_COMMIT,
        "files": {
            "config.json": {
                "size": 2,
                "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
            },
            "model.safetensors": {
                "size": 7,
                "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
            },
        },
    },
    f"sources/s3/team/{SETS}/sets/a.jsonl": "{}\n",
    f"sources/s3/team/.{SETS}/manifest-82c6db3dbf4ab471.json": {
        "source": "s3://team/sets",
        "revision": SETS,
        "files": {
            "sets/a.jsonl": {
                "size": 3,
                "sha256": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356",
            },
            "sets/b.jsonl": {
                "size": 3,
                "sha256": "37517e5f3dc66819f61f5a7bb8ace1921282415f10551d2defa5c3eb0985b570",
            },
        },
    },
    f"sources/s3/team/{SETS}/sets/b.jsonl": "[]\n",
    "jobs/j/fetched.json": {
        "model": {"source": "hf://org/name", "revision": "main", "found": MODEL_COMMIT},
        "dataset": {"source": "s3://team/sets", "revision": "main", "found": SETS},
    },
}
"""A workspace as release 0.1.0 left it."""


@pytest.fixture
def old_workspace(transfers: Transfers, sound: Remotes) -> dict[str, Any]:
    """The workspace of release 0.1.0, the servers that it was fetched from, and its job's sources."""
    for name, content in RELEASE_0_1_0.items():
        path = transfers.workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    sound.hub.commit("org/name", {"config.json": b"{}", "model.safetensors": b"weights"})
    for name, data in (("a", b"{}\n"), ("b", b"[]\n")):
        sound.put(f"sets/{name}.jsonl", data)
    return {"model": {"source": "hf://org/name"}, "dataset": {"source": "s3://team/sets"}}


def test_what_release_0_1_0_fetched_is_not_fetched_again(
    fetch: Callable[..., ResolvedRevisions], old_workspace: dict[str, Any], sound: Remotes
) -> None:
    """Neither for its job, which need not reach the servers, nor for a new one, which finds the same revisions."""
    expected = ResolvedRevisions(model=MODEL_COMMIT, dataset=SETS)

    assert fetch(**old_workspace) == expected
    assert sound.hub_wire.passed == sound.s3_wire.passed == []
    assert fetch(name="new", **old_workspace) == expected
    asked = [
        each.path for wire in (sound.hub_wire, sound.s3_wire) for each in wire.passed if each.method == "GET"
    ]
    assert all("/api/" in path or "list-type" in path for path in asked)


def test_a_part_of_release_0_1_0_is_resumed(
    fetch: Callable[..., ResolvedRevisions],
    transfers: Transfers,
    old_workspace: dict[str, Any],
    sound: Remotes,
) -> None:
    """A fetch that an upgrade interrupted goes on where it was."""
    (transfers.sources / f"s3/team/{SETS}/sets/a.jsonl").unlink()
    part = transfers.sources / f"s3/team/.{SETS}/parts" / hashlib.sha256(b"sets/a.jsonl").hexdigest()
    part.parent.mkdir()
    part.write_bytes(b"{}")

    assert fetch(**old_workspace).dataset == SETS
    assert sound.s3_wire.sent("/sets/a.jsonl") == 1


def test_several_sources_are_fetched_each_with_its_own_credentials(
    fetch: Callable[..., ResolvedRevisions], transfers: Transfers, sound: Remotes
) -> None:
    """From the Hub and from S3 in one job, with one on a claim between them."""
    commit = sound.hub.commit("org/name", {"train.jsonl": DATA}, "datasets")
    sound.put("sets/train.jsonl", DATA[:70])
    transfers.credentials("dataset-sources-0", token=HUB_TOKEN)
    transfers.credentials("dataset-sources-2", AWS_ACCESS_KEY_ID="planted", AWS_SECRET_ACCESS_KEY="too")
    sources = [
        {"source": "hf://datasets/org/name"},
        {"source": "pvc://claim/more.jsonl"},
        {"source": f"s3://{BUCKET}/sets/train.jsonl"},
    ]

    fetched = fetch(dataset={"sources": sources})

    assert fetched.sources is not None
    assert fetched.sources[:2] == [commit, ""]
    volumes = {"claim": transfers.folder / "claim"}
    run = with_pinned_revisions(transfers.config("train", dataset={"sources": sources}), volumes)
    assert run.fetched == fetched
    folder, claim, file = (resolve(uri, volumes) for uri in run.dataset_uris)
    assert (folder / "train.jsonl").read_bytes() == DATA
    assert claim == transfers.folder / "claim" / "more.jsonl"
    assert file.read_bytes() == DATA[:70]
