"""Files that a crash cannot leave half written."""

from pathlib import Path

import pytest

from qlora_contract import files


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """The new text is there, and nothing beside it."""
    for text in ("old", "new"):
        files.write_atomically(tmp_path / "file", text)

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "new")]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old text stays, the temporary file goes, and the error is the system's own."""
    path = tmp_path / "file"
    files.write_atomically(path, "old")

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync_file", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, "new")

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_digest_is_that_of_sha256sum(tmp_path: Path) -> None:
    """Users can check it with coreutils."""
    (tmp_path / "f").write_text("abc")

    assert files.sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
