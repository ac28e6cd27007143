"""Folders for a moment."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qlora_contract import scratch
from qlora_contract.scratch import PREFIX, remove_abandoned, scratch_folder

OWNER = """
import sys, time
from qlora_contract.scratch import scratch_folder
with scratch_folder("test") as folder:
    (folder / "run.json").write_text("{}")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty."""
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_gone_with_its_block(place: Path) -> None:
    """With all that is in it."""
    with scratch_folder("test") as folder:
        where, mode = folder.parent, folder.stat().st_mode & 0o777
        (folder / "file").touch()

    assert (where, mode) == (place, 0o700)
    assert list(place.iterdir()) == []


@pytest.mark.process
def test_what_a_killed_process_leaves_is_removed_by_the_next_one(place: Path) -> None:
    """What belongs to one that lives, or to somebody else, stays."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], env=os.environ | {"TMPDIR": str(place)}, stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    theirs = Path(owner.stdout.readline().decode().strip())
    foreign = place / "another-program"
    foreign.mkdir()
    link = place / f"{PREFIX}link"
    link.symlink_to(foreign)
    with scratch_folder("test"):
        pass
    kept = theirs.exists()
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    with scratch_folder("test"):
        pass

    assert (kept, theirs.exists()) == (True, False)
    assert sorted(place.iterdir()) == [foreign, link]


def test_many_at_once_each_have_a_folder(place: Path) -> None:
    """Nobody removes what another one has made, and not locked yet."""
    failed = []

    def use() -> None:
        for _ in range(50):
            with scratch_folder("test") as folder:
                remove_abandoned(place)
                if not folder.is_dir():
                    failed.append(folder)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failed == []
    assert list(place.iterdir()) == []
