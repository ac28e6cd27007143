"""Files that a crash, a full disk or a second writer cannot leave half done."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_contract import places
from qlora_contract.run import RunConfig
from qlora_trainer import storage
from qlora_trainer.errors import ConfigurationError, Fenced, OutOfMemory, StorageFull
from qlora_trainer.storage import JobFolder

FIELDS: dict[str, Any] = {
    "job": {"name": "smollm2", "uid": "u-1", "attempt": 3},
    "workspace": "pvc://data/work",
    "model": {"source": "pvc://data/model"},
    "dataset": {"source": "pvc://data/train.jsonl"},
    "training": {"epochs": 1},
    "layout": {"memoryPerRank": 2**30},
    "isa": "avx2",
}


def job_folder(path: Path, attempt: int = 3, uid: str = "u-1", **changes: Any) -> JobFolder:
    """The job's folder as one attempt sees it."""
    job = {"name": "smollm2", "uid": uid, "attempt": attempt}
    return JobFolder(path, RunConfig.model_validate({**FIELDS, "job": job, **changes}))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True, text=True, check=False
    ) if shutil.which("mount") else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip() if mounted else 'no mount'}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


# --- single files


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """The new text is there, and nothing beside it."""
    for text in ("old", "new"):
        storage.write_atomically(tmp_path / "file", text)

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "new")]


def test_a_full_disk_leaves_the_old_file(tiny_disk: Path) -> None:
    """Text that does not fit changes nothing, and the error names the file."""
    path = tiny_disk / "file"
    storage.write_atomically(path, "old")

    with pytest.raises(StorageFull, match=f"no space left while writing {path}"):
        storage.write_atomically(path, "x" * 100_000)
    assert path.read_text() == "old"
    assert list(tiny_disk.iterdir()) == [path]


def test_tensors_are_written_as_they_are(tmp_path: Path) -> None:
    """Transposed views and all come back equal."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(3, dtype=torch.bfloat16)}
    storage.save_tensors(tensors, tmp_path / "t", {"format": "pt"})
    loaded = load_file(tmp_path / "t")

    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_do_not_fit_are_a_full_disk(tiny_disk: Path) -> None:
    """safetensors' own error is told apart: the job fails as storage full, not as something unforeseen."""
    with (
        pytest.raises(StorageFull, match=r"no space left while saving: .*/t "),
        storage.storing("saving"),
    ):
        storage.save_tensors({"a": torch.ones(100_000)}, tiny_disk / "t")


@pytest.mark.parametrize(
    ("number", "kind"),
    [(28, StorageFull), (122, StorageFull), (12, OutOfMemory), (5, OSError), (13, PermissionError)],
    ids=["ENOSPC", "EDQUOT", "ENOMEM", "EIO", "EACCES"],
)
def test_only_foreseen_errors_are_renamed(number: int, kind: type[Exception]) -> None:
    """A full disk and no memory get their own kinds; what else the system says stays as it is."""
    with pytest.raises(kind) as raised, storage.storing("saving"):
        raise OSError(number, "text")
    assert type(raised.value) is kind


def test_a_digest_is_that_of_sha256sum(tmp_path: Path) -> None:
    """Users can check it with coreutils."""
    (tmp_path / "f").write_text("abc")

    assert storage.sha256(tmp_path / "f").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")


# --- whole folders


def published(folder: Path, text: str = "text") -> Path:
    """A folder with a file and its manifest."""
    folder.mkdir()
    (folder / "file").write_text(text)
    storage.publish_folder(folder, {"step": 4})
    return folder


def test_a_manifest_lists_every_file(tmp_path: Path) -> None:
    """What it holds is given back when all is as it was written."""
    manifest = storage.read_manifest(published(tmp_path / "a"))

    assert manifest == {"step": 4, "files": {"file": storage.sha256(tmp_path / "a" / "file")}}


def test_a_folder_can_be_published_again(tmp_path: Path) -> None:
    """The manifest never counts itself."""
    storage.publish_folder(published(tmp_path / "a"), {"step": 5})

    assert storage.read_manifest(tmp_path / "a") is not None


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "{}"),
        *('{"files": null}', '{"files": ["file"]}', '{"files": {"file": 1}}', '{"files": {"gone": "x"}}'),
    ],
)
def test_a_damaged_manifest_is_no_manifest(tmp_path: Path, content: str) -> None:
    """Whatever stands in it, a folder is either whole or not; nothing is raised."""
    folder = published(tmp_path / "a")
    (folder / places.MANIFEST).write_text(content)

    assert storage.read_manifest(folder) is None


@pytest.mark.parametrize("there", [False, True], ids=["nothing-there", "something-there"])
def test_a_folder_takes_a_place(tmp_path: Path, there: bool) -> None:
    """The new folder stands under the name, and what was there is gone."""
    final = tmp_path / "final"
    if there:
        published(final, "old")
    storage.replace_folder(published(tmp_path / ".new.tmp", "new"), final)

    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (final / "file").read_text() == "new"


def test_what_was_set_aside_comes_back(tmp_path: Path) -> None:
    """A crash between the two renames of a replacement loses nothing; half-written folders and files go."""
    published(tmp_path / f".final{storage.SET_ASIDE}", "old")
    published(tmp_path / ".final.u-1.tmp", "unfinished")
    (tmp_path / ".fence.json.77.tmp").write_text("{")
    (tmp_path / "logs").mkdir()
    storage.tidy(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "logs"]
    assert (tmp_path / "final" / "file").read_text() == "old"


def test_what_was_set_aside_and_replaced_goes(tmp_path: Path) -> None:
    """A crash after both renames leaves the new folder."""
    published(tmp_path / f".final{storage.SET_ASIDE}", "old")
    published(tmp_path / "final", "new")
    storage.tidy(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "file").read_text() == "new"


# --- the job's folder


def test_a_first_attempt_makes_the_folder(tmp_path: Path) -> None:
    """Folder, identity and fence are there after the claim."""
    folder = job_folder(tmp_path / "jobs" / "smollm2")
    folder.claim()
    folder.check_fence()

    assert folder.checkpoints.is_dir()
    assert json.loads((folder.path / places.FENCE).read_text()) == {"uid": "u-1", "attempt": 3}


@pytest.mark.parametrize(
    ("fence", "gives_way"),
    [
        pytest.param('{"uid": "u-1", "attempt": 2}', True, id="an-older-attempt"),
        pytest.param('{"uid": "u-1", "attempt": 3}', True, id="the-same-attempt"),
        pytest.param('{"uid": "u-1", "attempt": 4}', False, id="a-newer-attempt"),
        pytest.param('{"uid": "u-0", "attempt": 9}', True, id="another-job-of-this-name"),
        pytest.param("", True, id="empty"),
        pytest.param("[]", True, id="not-an-object"),
        pytest.param('{"uid": "u-1", "attempt": null}', True, id="no-attempt"),
        pytest.param("\0\0", True, id="zeros"),
    ],
)
def test_only_a_newer_attempt_keeps_the_folder(tmp_path: Path, fence: str, gives_way: bool) -> None:
    """An attempt may claim the folder unless the fence names a higher one of the same job."""
    folder = job_folder(tmp_path)
    (tmp_path / places.FENCE).write_text(fence)

    if gives_way:
        folder.claim()
        folder.check_fence()
    else:
        with pytest.raises(Fenced, match="attempt 4 has taken over; this is attempt 3"):
            folder.claim()
        assert (tmp_path / places.FENCE).read_text() == fence


@pytest.mark.parametrize(
    ("fence", "says"),
    [
        pytest.param('{"uid": "u-1", "attempt": 4}', "belongs to attempt 4 of job u-1", id="a-newer-attempt"),
        pytest.param(
            '{"uid": "u-1", "attempt": 2}', "belongs to attempt 2 of job u-1", id="an-older-attempt"
        ),
        pytest.param('{"uid": "u-2", "attempt": 3}', "belongs to attempt 3 of job u-2", id="another-job"),
        pytest.param("[3]", "has no fence that can be read", id="damaged"),
        pytest.param(None, "has no fence that can be read", id="gone"),
    ],
)
def test_nothing_is_published_past_another_s_fence(tmp_path: Path, fence: str | None, says: str) -> None:
    """Only the very attempt that the fence names may publish; without a fence nobody may."""
    folder = job_folder(tmp_path)
    folder.claim()
    (tmp_path / places.FENCE).unlink()
    if fence is not None:
        (tmp_path / places.FENCE).write_text(fence)

    with pytest.raises(Fenced, match=says):
        folder.check_fence()


def test_an_attempt_cleans_up_after_those_before_it(tmp_path: Path) -> None:
    """What killed attempts left half written does not fill the disk."""
    folder = job_folder(tmp_path)
    folder.claim()
    published(folder.checkpoints / ".step-00000002.u-1-2.tmp")
    published(tmp_path / ".adapter.u-1-2.tmp")
    folder.claim()

    assert list(folder.checkpoints.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        places.CHECKPOINTS,
        places.FENCE,
        places.IDENTITY,
    ]


def test_equal_specs_share_the_folder(tmp_path: Path) -> None:
    """What does not shape the result may change between attempts: layout, checkpoints, memory knobs."""
    job_folder(tmp_path).claim()
    training = {"epochs": 1, "microBatchTokens": 2048, "gradientCheckpointing": "full"}
    layout = {"pods": 4, "memoryPerRank": 2**31}

    job_folder(tmp_path, training=training, layout=layout, checkpoint={"keep": 5}).claim()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"training": {"epochs": 1, "seed": 7}}, "training.seed: 0, now 7", id="a-field"),
        pytest.param(
            {"training": {"maxSteps": 9}},
            "training.epochs: 1, now null, training.maxSteps: null, now 9",
            id="two-fields",
        ),
        pytest.param(
            {"model": {"source": "pvc://data/m2"}},
            'model.source: "pvc://data/model", now "pvc://data/m2"',
            id="the-model",
        ),
    ],
)  # fmt: skip
def test_another_spec_is_refused_by_what_differs(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """A folder with another spec's results is left alone, and the error names the fields and the way out."""
    job_folder(tmp_path).claim()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    with pytest.raises(ConfigurationError) as raised:
        job_folder(tmp_path, attempt=4, **changes).claim()
    assert f"({says})" in str(raised.value)
    assert "choose another metadata.name, or remove the folder" in str(raised.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_damaged_identity_is_named(tmp_path: Path, content: str) -> None:
    """Nobody knows whose results these are: the user decides."""
    folder = job_folder(tmp_path)
    (tmp_path / places.IDENTITY).write_text(content)

    with pytest.raises(ConfigurationError, match=f"identity.json is damaged; remove {tmp_path}"):
        folder.claim()


def test_a_full_disk_is_found_at_the_start(tiny_disk: Path) -> None:
    """Not even the folder fits: the job fails as storage full before hours are spent."""
    blob = tiny_disk / "blob"
    with contextlib.suppress(OSError), blob.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)

    with pytest.raises(StorageFull):
        job_folder(tiny_disk / "jobs" / "smollm2").claim()


def test_space_is_looked_at_before_the_training(tiny_disk: Path) -> None:
    """What checkpoints and adapter will need is compared with what is free, and both are said."""
    folder = job_folder(tiny_disk)
    folder.check_space(1024)

    with pytest.raises(StorageFull, match="MiB free; checkpoints and adapter need 10 MiB"):
        folder.check_space(10 * 2**20)


def test_a_job_is_finished_when_adapter_and_report_are_there(tmp_path: Path) -> None:
    """Neither a whole adapter without its report, nor a report beside a damaged adapter, is the end."""
    folder = job_folder(tmp_path)
    states = [folder.finished()]
    published(folder.adapter)
    states.append(folder.finished())
    (tmp_path / places.TRAINING_REPORT).write_text('{"steps": 4}')
    states.append(folder.finished())
    report = folder.report()
    (folder.adapter / "file").write_text("tex1")
    states.append(folder.finished())

    assert states == [False, False, True, False]
    assert report == {"steps": 4}


def test_uris_are_made_in_one_place(tmp_path: Path) -> None:
    """They point into the workspace as the user wrote it, whatever slashes end it."""
    run = job_folder(tmp_path, workspace="pvc://data/work/").run

    assert storage.adapter_uri(run) == "pvc://data/work/jobs/smollm2/adapter"
    assert storage.job_uri(run, "checkpoints", "s") == "pvc://data/work/jobs/smollm2/checkpoints/s"
