"""Folders for a moment, of which nothing stays behind even when who made them was killed."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "qlora-scratch-"


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A new folder under TMPDIR that is removed with the block; `name` says what it is for.

    Its owner holds a lock on it, which the kernel takes back however that process ends. So whoever makes the next
    folder can tell those that are left over, and removes them, even where containers share /tmp and a process's number
    means nothing.

    Raises:
        OSError: there is nowhere to make it.
    """
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent)
    folder, lock = _locked(parent, f"{PREFIX}{name}-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a process that outlives this one may still write
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove this user's scratch folders whose owners are gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _locked(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(FileNotFoundError):  # somebody has removed it before it was locked
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)
