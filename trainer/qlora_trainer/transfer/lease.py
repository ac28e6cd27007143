"""Who fetches into a directory, so that other jobs wait for its files instead of downloading the same ones.

A file with its holder's name and a count that grows while the holder lives. Not a lock of the kernel's: those
are lost over NFS, or held for ever by a node that is gone. Whether a holder lives is seen by the file changing, never
by comparing the clocks of two machines.

Should two hold it after all, they write the same bytes to the same places, and each file is verified before it gets
its name. But jobs that start together, such as those of a sweep, download a model once only because of this
(docs/decisions/0019).
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BEAT_SECONDS = 2.0
STALE_SECONDS = 10.0
"""The holder of a lease that has not changed for so long is dead: some beats, and a file server that stalls."""
POLL_SECONDS = 0.2


class LeaseLost(Exception):  # noqa: N818 - what happened
    """Another process has taken the lease over, as we gave no sign of life."""


class Lease:
    """A lease that is held. A thread renews it."""

    def __init__(self, path: Path, owner: str) -> None:
        self._path = path
        self._owner = owner
        self._lost = threading.Event()
        self._released = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewal.start()

    def check(self) -> None:
        """Raises LeaseLost when another process holds the lease now."""
        if self._lost.is_set():
            raise LeaseLost

    def release(self) -> None:
        """Let others have it."""
        self._released.set()
        self._renewal.join()
        if _owner(_read(self._path)) == self._owner:
            self._path.unlink(missing_ok=True)

    def _renew(self) -> None:
        count = 0
        while not self._released.wait(BEAT_SECONDS):
            count += 1
            try:
                if _owner(_read(self._path)) != self._owner:
                    self._lost.set()
                    return
                with self._path.open("r+") as stream:
                    stream.write(f"{self._owner} {count}")
            except OSError:
                continue  # the file server may recover; if it does not, another process takes over


@contextmanager
def leased(path: Path, stale_seconds: float = STALE_SECONDS) -> Iterator[Lease]:
    """Hold the lease at a path, once no living process holds it."""
    owner = uuid.uuid4().hex
    seen: str | None = None
    since = time.monotonic()
    while True:
        try:
            with path.open("x") as stream:
                stream.write(f"{owner} 0")
            break
        except FileExistsError:
            now, content = time.monotonic(), _read(path)
        if content != seen:
            seen, since = content, now
        elif now - since > stale_seconds:
            _take_away(path, content)
        time.sleep(POLL_SECONDS)
    lease = Lease(path, owner)
    try:
        yield lease
    finally:
        lease.release()


def _take_away(path: Path, dead: str) -> None:
    """Remove the lease of a dead holder, which had this content; that of another is left, or put back."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)  # of several processes that try, one succeeds
        if _read(aside) != dead:  # another process was quicker, and this is its lease
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(aside)
        aside.unlink()


def _read(path: Path) -> str:
    # Opened anew each time: NFS looks at the server then.
    try:
        return path.read_text()
    except OSError:
        return ""


def _owner(content: str) -> str:
    return content.partition(" ")[0]
