"""How a fetch tells the container beside it, in the same pod, that the sources are there.

They share a folder, which the other container mounts read-only. A file in it is locked for as long as the fetch lasts:
the kernel takes the lock back however the fetch ends, so nobody waits for one that was killed. What it found lies
beside that file then, if it ended well.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from qlora_contract.env import HANDOFF_ENV
from qlora_contract.run_config import ResolvedRevisions
from qlora_trainer.storage.atomic import write_atomically

LOCK = "fetching"
FETCHED = "fetched.json"
BEGIN_SECONDS = 120.0
"""How long a fetch may take to begin: the containers of a pod are started one right after the other."""
LOOK_SECONDS = 0.2


@contextlib.contextmanager
def fetching(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Within it, whoever looks at the data waits; nobody does where the environment names no folder."""
    if not (name := environ.get(HANDOFF_ENV)):
        yield
        return
    part = Path(name, f"{LOCK}.part")
    lock = os.open(part, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        part.rename(part.with_name(LOCK))  # it is never there without its lock, but after the end
        yield
    finally:
        os.close(lock)


def leave(fetched: ResolvedRevisions, environ: Mapping[str, str] = os.environ) -> None:
    """Say what the sources stand for that are in the workspace now."""
    if name := environ.get(HANDOFF_ENV):
        write_atomically(Path(name, FETCHED), fetched.model_dump_json(by_alias=True, exclude_none=True))


def wait_for_fetch(folder: Path, begin_seconds: float = BEGIN_SECONDS) -> ResolvedRevisions | None:
    """Wait until the fetch is over, however long it takes, and return what it found; None where it did not end well, or
    did not begin in time."""
    until = time.monotonic() + begin_seconds
    while not (folder / LOCK).exists():
        if time.monotonic() >= until:
            return None
        time.sleep(LOOK_SECONDS)
    lock = os.open(folder / LOCK, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)  # a signal's handler may raise meanwhile
    finally:
        os.close(lock)
    try:
        return ResolvedRevisions.model_validate_json((folder / FETCHED).read_bytes())
    except (OSError, ValidationError):
        return None
