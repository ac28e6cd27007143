"""Where fetched files lie, and when they are all there."""

import json
import os
from pathlib import Path

import pytest

from qlora_contract.paths import resolve
from qlora_contract.remote import fetched_uri, parse_remote
from qlora_trainer.errors import StorageFull
from qlora_trainer.transfer.remote_files import RemoteFile
from qlora_trainer.transfer.source_cache import Snapshot

FILES = [RemoteFile("sub/a.jsonl", 3), RemoteFile("sub/b.jsonl", 5)]


def snapshot(workspace: Path, uri: str = "hf://datasets/org/name/sub") -> Snapshot:
    """A snapshot with its folders."""
    made = Snapshot(workspace, parse_remote(uri), "c0ffee", "dataset")
    made.make_folders()
    return made


def fill(made: Snapshot) -> None:
    """Put the files there, and the manifest."""
    for file in FILES:
        path = made.files / file.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * file.size)
    made.write_manifest({file.name: "0" * 64 for file in FILES}, FILES)


@pytest.mark.parametrize(
    "uri", ["hf://org/name", "hf://datasets/org/name", "hf://datasets/org/name/a/b.jsonl", "s3://team/a/b/"]
)
def test_it_lies_where_run_json_says(tmp_path: Path, uri: str) -> None:
    """The trainer reads by the contract's own function; a file's name is its path in the repository or bucket."""
    made = Snapshot(tmp_path / "work", parse_remote(uri), "c0ffee", "model")
    read = resolve(fetched_uri("pvc://claim/work", parse_remote(uri), "c0ffee"), {"claim": tmp_path})

    assert read == made.files / made.remote.path


def test_without_a_manifest_nothing_is_whole(tmp_path: Path) -> None:
    """It is written last, so whatever lies there before is part of something."""
    made = snapshot(tmp_path)
    assert not made.is_complete()

    fill(made)
    assert made.is_complete()
    made.manifest.unlink()
    assert not made.is_complete()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda made: (made.files / "sub/a.jsonl").unlink(), id="file-gone"),
        pytest.param(lambda made: (made.files / "sub/a.jsonl").write_bytes(b"xx"), id="file-shorter"),
        pytest.param(lambda made: made.manifest.write_text("{"), id="manifest-torn"),
        pytest.param(lambda made: made.manifest.write_text("[]"), id="manifest-of-something-else"),
        pytest.param(
            lambda made: made.manifest.write_text('{"files": {"sub/a.jsonl": 3}}'), id="manifest-old"
        ),
    ],
)
def test_damage_is_seen(tmp_path: Path, damage: object) -> None:
    """By names and sizes: hashes were looked at before."""
    made = snapshot(tmp_path)
    fill(made)
    damage(made)  # type: ignore[operator]

    assert not made.is_complete()


def test_paths_of_one_revision_are_whole_each_by_itself(tmp_path: Path) -> None:
    """Two jobs may read two files of one dataset."""
    one, other = snapshot(tmp_path), snapshot(tmp_path, "hf://datasets/org/name/sub/a.jsonl")
    fill(one)

    assert (one.is_complete(), other.is_complete()) == (True, False)
    assert other.bytes_present(FILES[0]) == 3


def test_parts_count_as_there(tmp_path: Path) -> None:
    """What is missing is what must fit on the disk."""
    made = snapshot(tmp_path)
    made.part(FILES[1]).write_bytes(b"xx")

    assert [made.bytes_present(file) for file in FILES] == [0, 2]


def test_a_link_is_no_file(tmp_path: Path) -> None:
    """Nothing is read, or written, through one."""
    made = snapshot(tmp_path)
    (made.files / "sub").mkdir()
    (tmp_path / "elsewhere").write_bytes(b"xxx")
    (made.files / "sub/a.jsonl").symlink_to(tmp_path / "elsewhere")

    assert not made.contains(FILES[0])


def test_what_cannot_fit_is_not_begun(tmp_path: Path) -> None:
    """The sentence says how much is needed, and how much is there."""
    made = snapshot(tmp_path)
    free = os.statvfs(tmp_path)
    made.check_space(FILES)
    with pytest.raises(
        StorageFull, match=r"hf://datasets/org/name/sub needs another [\d.]+ [KMGT]iB, and the workspace has"
    ):
        made.check_space([RemoteFile("x", 2 * free.f_blocks * free.f_frsize)])


def test_the_manifest_has_sizes_and_hashes(tmp_path: Path) -> None:
    """Of every file, beside what they came from."""
    made = snapshot(tmp_path)
    fill(made)

    assert json.loads(made.manifest.read_text()) == {
        "source": "hf://datasets/org/name/sub",
        "revision": "c0ffee",
        "files": {file.name: {"size": file.size, "sha256": "0" * 64} for file in FILES},
    }
