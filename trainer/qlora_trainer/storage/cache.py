"""Caches of a workspace: what was made once is mapped by all ranks of a pod, and by later jobs.

    cache/<what>/<key>/meta.json      what is there; written last
    cache/<what>/<key>/...            the files that are mapped
    cache/<what>/.<name>.<job uid>.<attempt>.<pod>.tmp/     one that is being written, or is about to be removed

A key is a hash of everything that decides about the content, so all of a cache may be removed at any time; who reads
an entry looks for damage, and discards what is damaged. Who uses an entry holds a shared lock on its meta.json, whose
time of change is that of its last use. Where room runs short, what nobody has used for long is removed. A workspace
without room, or that cannot be written to, costs time and memory, and no job.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from qlora_contract import files
from qlora_contract.units import format_bytes

log = logging.getLogger(__name__)

META = "meta.json"
ABANDONED_SECONDS = 86_400
"""After which what nobody has written to is no more being written."""
UNUSED_SECONDS = 7 * 86_400
"""After which an entry may be removed where room runs short. Locks do not reach across every kind of volume."""
MAX_SHARE = 0.25
"""Of the workspace's file system, for all entries of a cache: beyond it, too, what was not used for long is removed."""
UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST
)  # fmt: skip

Writer = tuple[str, int, int]
"""A job's uid, its attempt and the pod: of these no two processes write at once."""


class Use:
    """Holds a shared lock on an entry until it is no more referred to."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def is_of(self, meta: Path) -> bool:
        """Whether this is still the entry that the file belongs to. Raises OSError where there is none."""
        return os.path.samestat(os.fstat(self._descriptor), meta.stat())

    def release(self) -> None:
        """Give up the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.release()


class Cache:
    """One of a workspace's caches, as one process of a job uses it."""

    def __init__(self, folder: Path, writer: Writer, kept: str, otherwise: str) -> None:
        """The cache in a folder.

        Args:
            folder: of the workspace; made when something is written.
            writer: who this process is.
            kept: what is kept here, for messages.
            otherwise: what follows where nothing can be kept, for messages.
        """
        self.folder = folder
        self._writer = writer
        self._kept = kept
        self._otherwise = otherwise

    def use(self, key: str) -> Use | None:
        """Lock an entry, and note that it is used; None where there is none, or it cannot be read."""
        meta = self.folder / key / META
        try:
            descriptor = os.open(meta, os.O_RDONLY)
        except OSError:
            return None
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        with suppress(OSError):  # a workspace that can only be read
            os.utime(meta)
        return Use(descriptor)

    def discard(self, key: str, use: Use | None, what: str) -> None:
        """Take a damaged entry out of the cache, and say so. Who has it mapped keeps it.

        Args:
            key: of the entry.
            use: of the same entry, which ends; None: nobody can use it.
            what: is damaged.
        """
        folder = self.folder / key
        log.warning("%s is damaged (%s), and is made anew", folder, what)
        gone = self._temporary(key)
        with suppress(OSError):
            if use is not None and not use.is_of(folder / META):
                return  # another job was faster, and this one is whole
            folder.rename(gone)
            if use is not None:
                use.release()
            _remove_unused(gone)

    def make_room(self, size: int, room: int) -> bool:
        """Whether an entry can be written now, after what was left or not used for long is removed; logs why not.

        Args:
            size: bytes that the entry will take, about.
            room: bytes that must be free before it is written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                return self._cannot("it cannot be written to")
            self._clear_up()
            self._evict(size, room)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return self._cannot_by(error)
        if free < room:
            return self._cannot(f"{format_bytes(free)} free, {format_bytes(room)} needed")
        return True

    def write(self, make: Callable[[Path], tuple[str, Mapping[str, Any]]]) -> bool:
        """Write an entry, for which `make_room` has found room; False when that cannot be done, which is logged.

        `make` writes into a folder: the key and what goes into meta.json. What it raises is raised, after which
        nothing of it is left. Where another job has written the same entry meanwhile, that one stays.
        """
        new = self._temporary("new")
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            key, meta = make(new)
            self._publish(new, self.folder / key, meta)
        except OSError as error:
            return self._cannot_by(error)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return True

    def _publish(self, new: Path, final: Path, meta: Mapping[str, Any]) -> None:
        for path in new.rglob("*"):
            if path.is_file():
                files.sync_file(path)
        files.write_atomically(new / META, json.dumps(meta, indent=1))
        if not (final / META).is_file():
            shutil.rmtree(final, ignore_errors=True)  # nobody can use it
        try:
            new.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another pod was faster
                raise
        files.sync_folder(self.folder)

    def _cannot_by(self, error: OSError) -> bool:
        # Somebody may remove the whole cache at any time.
        is_of_cache = isinstance(error.filename, str) and Path(error.filename).is_relative_to(self.folder)
        if error.errno not in UNWRITABLE and not is_of_cache:
            raise error
        return self._cannot(error.strerror or str(error))

    def _cannot(self, why: str) -> bool:
        log.warning("%s cannot keep %s (%s): %s", self.folder, self._kept, why, self._otherwise)
        return False

    def _temporary(self, name: str) -> Path:
        uid, attempt, pod = self._writer
        return self.folder / f".{name}.{uid}.{attempt}.{pod}.tmp"

    def _clear_up(self) -> None:
        """Remove what writers that were killed have left."""
        uid, attempt, pod = self._writer
        now = time.time()
        for path in self.folder.glob(".*.tmp"):
            parts = path.name.removesuffix(".tmp").split(".")
            mine = parts[2:3] == [uid] and (int(parts[3]) < attempt or parts[3:] == [str(attempt), str(pod)])
            with suppress(FileNotFoundError):  # its writer has just finished it
                newest = max(file.stat().st_mtime for file in [path, *path.rglob("*")])
                if mine or now - newest > ABANDONED_SECONDS:
                    _remove_unused(path)

    def _evict(self, size: int, room: int) -> None:
        """Remove what was not used for long, the oldest first, as long as there is too little room for an entry."""
        entries = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                if not path.name.startswith("."):
                    entries.append(((path / META).stat().st_mtime, _size(path), path))
        total = sum(bytes_ for _, bytes_, _ in entries)
        for last_use, bytes_, path in sorted(entries, key=lambda entry: entry[0]):
            disk = shutil.disk_usage(self.folder)
            fits = total + size <= MAX_SHARE * disk.total
            if (fits and disk.free >= room) or time.time() - last_use < UNUSED_SECONDS:
                return
            gone = self._temporary(path.name)
            with suppress(FileNotFoundError), _unused(path / META) as unused:  # another job may be faster
                if not unused:
                    continue
                path.rename(gone)  # at once, so that nobody finds a half of it
            shutil.rmtree(gone, ignore_errors=True)
            total -= bytes_
            log.info("%s was not used for %d days and is removed, for room", path, UNUSED_SECONDS // 86_400)


@contextmanager
def _unused(meta: Path) -> Iterator[bool]:
    """Whether nobody uses an entry; meanwhile nobody begins to."""
    with meta.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A volume without locks: what is used has a newer time.
            yield error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        else:
            yield True


def _remove_unused(folder: Path) -> None:
    """Remove a folder that has a temporary name, unless somebody has it mapped: then a later attempt does."""
    if (folder / META).is_file():
        with _unused(folder / META) as unused:
            if not unused:
                return
    shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@cache
def code_digest(*folders: Path) -> str:
    """sha256 of the code in folders, for keys: what other code has made may be something else."""
    hashed = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            hashed.update(path.read_bytes())
    return hashed.hexdigest()
