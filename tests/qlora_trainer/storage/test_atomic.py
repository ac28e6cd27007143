"""Files and folders that a crash or a full disk cannot leave half done."""

from pathlib import Path

import pytest

from qlora_contract import job_folder
from qlora_contract.files import sha256
from qlora_trainer.errors import OutOfMemory, StorageFull
from qlora_trainer.storage import atomic


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """The new text is there, and nothing beside it."""
    for text in ("old", "new"):
        atomic.write_atomically(tmp_path / "file", text)

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "new")]


@pytest.mark.process
def test_a_full_disk_leaves_the_old_file(tiny_disk: Path) -> None:
    """Text that does not fit changes nothing, and the error names the file."""
    path = tiny_disk / "file"
    atomic.write_atomically(path, "old")

    with pytest.raises(StorageFull, match=f"no space left while writing {path}"):
        atomic.write_atomically(path, "x" * 100_000)
    assert path.read_text() == "old"
    assert list(tiny_disk.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(28, StorageFull), (122, StorageFull), (12, OutOfMemory), (5, OSError), (13, PermissionError)],
    ids=["ENOSPC", "EDQUOT", "ENOMEM", "EIO", "EACCES"],
)
def test_only_foreseen_errors_are_renamed(number: int, kind: type[Exception]) -> None:
    """A full disk and no memory get their own kinds; what else the system says stays as it is."""
    with pytest.raises(kind) as raised, atomic.translate_os_errors("saving"):
        raise OSError(number, "text")
    assert type(raised.value) is kind


def test_a_folder_survives_a_crash_right_after_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of it and of its new parents are made durable, each in the folder that it is in; nothing else is."""
    synced: list[Path] = []
    monkeypatch.setattr(atomic.files, "sync_folder", synced.append)
    atomic.make_folder(tmp_path / "jobs" / "name" / "checkpoints")
    atomic.make_folder(tmp_path / "jobs" / "name" / "checkpoints")

    assert synced == [tmp_path / "jobs" / "name", tmp_path / "jobs", tmp_path]


def sealed(folder: Path, text: str = "text") -> Path:
    """A folder with a file and its manifest."""
    folder.mkdir()
    (folder / "file").write_text(text)
    atomic.seal_folder(folder, {"step": 4})
    return folder


def test_a_manifest_lists_every_file(tmp_path: Path) -> None:
    """What it holds is given back when all is as it was written."""
    manifest = job_folder.read_manifest(sealed(tmp_path / "a"))

    assert manifest == {"step": 4, "files": {"file": sha256(tmp_path / "a" / "file")}}


def test_a_folder_can_be_published_again(tmp_path: Path) -> None:
    """The manifest never counts itself."""
    atomic.seal_folder(sealed(tmp_path / "a"), {"step": 5})

    assert job_folder.read_manifest(tmp_path / "a") is not None


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "{}"),
        *('{"files": null}', '{"files": ["file"]}', '{"files": {"file": 1}}', '{"files": {"gone": "x"}}'),
    ],
)
def test_a_damaged_manifest_is_no_manifest(tmp_path: Path, content: str) -> None:
    """Whatever stands in it, a folder is either whole or not; nothing is raised."""
    folder = sealed(tmp_path / "a")
    (folder / job_folder.MANIFEST).write_text(content)

    assert job_folder.read_manifest(folder) is None


@pytest.mark.parametrize("there", [False, True], ids=["nothing-there", "something-there"])
def test_a_folder_takes_a_place(tmp_path: Path, there: bool) -> None:
    """The new folder stands under the name, and what was there is gone."""
    final = tmp_path / "final"
    if there:
        sealed(final, "old")
    atomic.replace_folder(sealed(tmp_path / ".new.tmp", "new"), final)

    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (final / "file").read_text() == "new"


def test_what_was_set_aside_comes_back(tmp_path: Path) -> None:
    """A crash between the two renames of a replacement loses nothing; half-written folders and files go."""
    sealed(tmp_path / f".final{atomic.BACKUP_SUFFIX}", "old")
    sealed(tmp_path / ".final.u-1.tmp", "unfinished")
    (tmp_path / ".fence.json.77.tmp").write_text("{")
    (tmp_path / "logs").mkdir()
    atomic.recover(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "logs"]
    assert (tmp_path / "final" / "file").read_text() == "old"


def test_what_was_set_aside_and_replaced_goes(tmp_path: Path) -> None:
    """A crash after both renames leaves the new folder."""
    sealed(tmp_path / f".final{atomic.BACKUP_SUFFIX}", "old")
    sealed(tmp_path / "final", "new")
    atomic.recover(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "file").read_text() == "new"
