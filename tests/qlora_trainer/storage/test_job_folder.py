"""The folder of a job: whose it is, and who may write to it."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from builders import OMIT, a_run
from qlora_contract import job_folder as names
from qlora_trainer.errors import ConfigurationError, Fenced, StorageFull
from qlora_trainer.storage import atomic
from qlora_trainer.storage.job_folder import JobFolder


def job_folder(path: Path, attempt: int = 3, uid: str = "u-1", **changes: Any) -> JobFolder:
    """The job's folder as one attempt sees it."""
    return JobFolder(path, a_run(job={"uid": uid, "attempt": attempt}, **changes))


def sealed(folder: Path) -> None:
    """Make a complete folder of one file."""
    folder.mkdir()
    (folder / "file").write_text("text")
    atomic.seal_folder(folder, {})


def test_a_first_attempt_makes_the_folder(tmp_path: Path) -> None:
    """Folder, identity and fence are there once it is acquired."""
    folder = job_folder(tmp_path / "jobs" / "smollm2")
    folder.acquire()
    folder.check_fence()

    assert folder.checkpoints.is_dir()
    assert json.loads((folder.path / names.FENCE).read_text()) == {"uid": "u-1", "attempt": 3}


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
    """An attempt may acquire the folder unless the fence names a higher one of the same job."""
    folder = job_folder(tmp_path)
    (tmp_path / names.FENCE).write_text(fence)

    if gives_way:
        folder.acquire()
        folder.check_fence()
    else:
        with pytest.raises(Fenced, match="attempt 4 has taken over; this is attempt 3"):
            folder.acquire()
        assert (tmp_path / names.FENCE).read_text() == fence


def test_two_jobs_do_not_take_a_folder_from_each_other_in_turn(tmp_path: Path) -> None:
    """One that is created again goes on where the last one was; that one does not take it back when it is retried."""
    job_folder(tmp_path).acquire()
    fence = json.loads((tmp_path / names.FENCE).read_text())
    (tmp_path / names.FENCE).write_text(json.dumps(fence | {"uid": "u-0"}))  # of the job before
    job_folder(tmp_path).acquire()

    assert json.loads((tmp_path / names.FENCE).read_text())["before"] == ["u-0"]

    (tmp_path / names.FENCE).write_text('{"uid": "u-2", "attempt": 0, "before": ["u-0", "u-1"]}')
    with pytest.raises(ConfigurationError, match=r"taken over from this job by another one .*uid u-2"):
        job_folder(tmp_path).acquire()
    assert json.loads((tmp_path / names.FENCE).read_text())["uid"] == "u-2"


@pytest.mark.parametrize(
    ("fence", "says"),
    [
        pytest.param('{"uid": "u-1", "attempt": 4}', "belongs to attempt 4 of job u-1", id="a-newer-attempt"),
        pytest.param(
            '{"uid": "u-1", "attempt": 2}', "belongs to attempt 2 of job u-1", id="an-older-attempt"
        ),
        pytest.param('{"uid": "u-2", "attempt": 3}', "belongs to attempt 3 of job u-2", id="another-job"),
        pytest.param("[3]", "has no readable fence", id="damaged"),
        pytest.param(None, "has no readable fence", id="gone"),
    ],
)
def test_nothing_is_published_past_another_s_fence(tmp_path: Path, fence: str | None, says: str) -> None:
    """Only the very attempt that the fence names may publish; without a fence nobody may."""
    folder = job_folder(tmp_path)
    folder.acquire()
    (tmp_path / names.FENCE).unlink()
    if fence is not None:
        (tmp_path / names.FENCE).write_text(fence)

    with pytest.raises(Fenced, match=says):
        folder.check_fence()


def test_an_attempt_cleans_up_after_those_before_it(tmp_path: Path) -> None:
    """What killed attempts left half written does not fill the disk."""
    folder = job_folder(tmp_path)
    folder.acquire()
    sealed(folder.checkpoints / ".step-00000002.u-1-2.tmp")
    sealed(tmp_path / ".adapter.u-1-2.tmp")
    folder.acquire()

    assert list(folder.checkpoints.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        names.BEGAN,
        names.CHECKPOINTS,
        names.FENCE,
        names.IDENTITY,
    ]


def test_equal_specs_share_the_folder(tmp_path: Path) -> None:
    """What does not shape the result may change between attempts: layout, checkpoints, memory knobs."""
    job_folder(tmp_path).acquire()
    training = {"epochs": 1, "microBatchTokens": 2048, "gradientCheckpointing": "full"}
    layout = {"pods": 4, "memoryPerRank": 2**31}

    job_folder(tmp_path, training=training, layout=layout, checkpoint={"keep": 5}).acquire()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"training": {"epochs": 1, "seed": 7}}, "training.seed: 0, now 7", id="a-field"),
        pytest.param(
            {"training": {"epochs": OMIT, "maxSteps": 9}},
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
    job_folder(tmp_path).acquire()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    with pytest.raises(ConfigurationError) as raised:
        job_folder(tmp_path, attempt=4, **changes).acquire()
    assert f"({says})" in str(raised.value)
    assert "choose another metadata.name, or remove the folder" in str(raised.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_damaged_identity_is_named(tmp_path: Path, content: str) -> None:
    """Nobody knows whose results these are: the user decides."""
    folder = job_folder(tmp_path)
    (tmp_path / names.IDENTITY).write_text(content)

    with pytest.raises(ConfigurationError, match=f"identity.json is damaged; remove {tmp_path}"):
        folder.acquire()


@pytest.mark.process
def test_a_full_disk_is_found_at_the_start(tiny_disk: Path) -> None:
    """Not even the folder fits: the job fails as storage full before hours are spent."""
    blob = tiny_disk / "blob"
    with contextlib.suppress(OSError), blob.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)

    with pytest.raises(StorageFull):
        job_folder(tiny_disk / "jobs" / "smollm2").acquire()


@pytest.mark.process
def test_space_is_looked_at_before_the_training(tiny_disk: Path) -> None:
    """What checkpoints and adapter will need is compared with what is free, and both are said."""
    folder = job_folder(tiny_disk)
    folder.check_space(1024)

    with pytest.raises(StorageFull, match=r"KiB free; checkpoints and the adapter need 10.0 MiB"):
        folder.check_space(10 * 2**20)


def test_a_job_is_finished_when_adapter_and_report_are_there(tmp_path: Path) -> None:
    """Neither a whole adapter without its report, nor a report beside a damaged adapter, is the end."""
    folder = job_folder(tmp_path)
    states = [folder.finished()]
    sealed(folder.adapter)
    states.append(folder.finished())
    (tmp_path / names.TRAINING_REPORT).write_text('{"steps": 4}')
    states.append(folder.finished())
    report = folder.report()
    (folder.adapter / "file").write_text("tex1")
    states.append(folder.finished())

    assert states == [False, False, True, False]
    assert report == {"steps": 4}


def test_a_job_knows_when_its_first_attempt_began(tmp_path: Path) -> None:
    """Later attempts find the time of the first; a damaged mark is written anew."""
    first = job_folder(tmp_path, attempt=0)
    first.acquire()
    began = first.began()
    later = job_folder(tmp_path, attempt=1)
    later.acquire()

    assert later.began() == began
    (tmp_path / names.BEGAN).write_text("{")
    later.acquire()
    assert later.began() > began
    assert later.began() == later.began()
