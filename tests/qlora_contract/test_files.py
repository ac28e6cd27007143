"""Files that a crash cannot leave half written."""

import os
import subprocess
import sys
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


def test_processes_of_the_same_number_do_not_write_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 of an attempt that was given up and rank 0 of the next one, in two pods, write at the same time."""
    path, between = tmp_path / "file", []

    def meanwhile(written: Path) -> None:
        if not between:
            between.append(written)
            files.write_atomically(path, "theirs")
            assert written.read_text() == "ours"

    monkeypatch.setattr(files, "sync_file", meanwhile)
    files.write_atomically(path, "ours")

    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "ours")]


@pytest.mark.process
def test_a_text_is_utf_8_whatever_the_locale_is(tmp_path: Path) -> None:
    """A report with a name in another script is written on a machine that is set up for another one."""
    write = (
        "import sys, pathlib; from qlora_contract import files; "
        "files.write_atomically(pathlib.Path(sys.argv[1]), '\\u6a21')"
    )
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", write, str(tmp_path / "f")], env=environ, check=True)

    assert (tmp_path / "f").read_bytes() == "\u6a21".encode()


def test_a_digest_is_that_of_sha256sum(tmp_path: Path) -> None:
    """Users can check it with coreutils."""
    (tmp_path / "f").write_text("abc")

    assert files.sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
