"""Which CPUs of this machine other `qlora run`s use, and how much memory, whoever started them: a lock for each CPU,
and one for each job's memory.

All locks are ranges of one file that every user may write to: byte ranges, since a machine may have more CPUs than a
process may have open files. They belong to the open file, as of flock(2), and not to a process (fcntl(2), open file
description locks): the kernel releases them when the last process that inherited the file is gone. A CPU's range also
holds who has it, for people to read; whether anybody has it is decided by the lock alone.
"""

import fcntl
import os
import re
import stat
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qlora_operator.cli.memory_use import private_bytes

FOLDER_ENV = "QLORA_CPU_LOCKS"
"""A folder for the file, where jobs in several containers share CPUs: a folder that all of them mount."""
FILE = "qlora-cpus.lock"
RECORD = 128
"""Bytes of a CPU: the holder's text, filled up with NUL."""
_MEMORY = range(1 << 20, (1 << 20) + 256)
"""Records beyond every CPU's: each of a job, with the bytes that it may take."""
_CHOOSING = 1 << 40
"""An offset beyond every CPU's: held while CPUs are chosen."""
_FLOCK = struct.Struct("hhqqixxxx")
"""struct flock of x86-64: type, whence, start, length, process."""
OPEN_ATTEMPTS = 10
OPEN_SECONDS = 0.05
"""Between two attempts: another user may have made the file without having opened it to all yet."""


def lock_file() -> Path:
    """The file of this machine's locks, the same for all users."""
    if folder := os.environ.get(FOLDER_ENV):
        return Path(folder) / FILE
    run = Path("/run/lock")
    return (run if _is_for_all(run) else Path("/tmp")) / FILE  # noqa: S108 - the file is checked when it is opened


def _is_for_all(folder: Path) -> bool:
    try:
        mode = folder.stat().st_mode
    except OSError:
        return False
    return stat.S_ISDIR(mode) and bool(mode & stat.S_IWOTH) and bool(mode & stat.S_ISVTX)


class CpuLocks:
    """The locks of one process, which may hold some."""

    def __init__(self, path: Path) -> None:
        """Open the file, and make it if need be. Raises OSError where that is impossible."""
        self._file = _open(path)

    def fileno(self) -> int:
        """The descriptor to inherit: as long as a process has it, what is held stays so."""
        return self._file

    def close(self) -> None:
        """Give back what is held, unless a child process has inherited it."""
        os.close(self._file)

    def busy(self, cpus: Iterable[int]) -> dict[int, str]:
        """Those of the CPUs that somebody else holds, and who that is."""
        return {cpu: self._holder(cpu) for cpu in cpus if self._is_held(cpu)}

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """No other process chooses meanwhile."""
        self._set(fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, _CHOOSING, 1)
        try:
            yield
        finally:
            self._set(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, _CHOOSING, 1)

    def take(self, cpus: Iterable[int], holder: str) -> None:
        """Hold those of the CPUs that nobody else holds. `holder`: what others read."""
        record = holder.encode()[:RECORD].ljust(RECORD, b"\0")
        for cpu in cpus:
            try:
                self._set(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, cpu * RECORD, RECORD)
            except BlockingIOError:
                continue  # shared with its holder
            os.pwrite(self._file, record, cpu * RECORD)

    def promised_memory(self) -> dict[str, int]:
        """Holder -> bytes that it may take yet, of those who hold memory: what it asked for less what it has."""
        promised: dict[str, int] = {}
        for slot in filter(self._is_held, _MEMORY):
            size, _, holder = self._holder(slot).partition(" ")
            process = re.search(r"\(process (\d+)\)$", holder)
            if size.isdigit() and process:
                promised[holder] = max(0, int(size) - private_bytes(int(process[1])))
        return promised

    def promise_memory(self, size: int, holder: str) -> None:
        """Hold so many bytes, in place of what was held before; with more jobs than there are records, nothing."""
        record = f"{size} {holder}".encode()[:RECORD].ljust(RECORD, b"\0")
        for slot in _MEMORY:
            try:
                self._set(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, slot * RECORD, RECORD)
            except BlockingIOError:
                continue
            os.pwrite(self._file, record, slot * RECORD)
            return

    def _holder(self, cpu: int) -> str:
        text = os.pread(self._file, RECORD, cpu * RECORD).rstrip(b"\0").decode(errors="replace")
        return text or "another `qlora run`"

    def _is_held(self, cpu: int) -> bool:
        return self._set(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, cpu * RECORD, RECORD) != fcntl.F_UNLCK

    def _set(self, command: int, kind: int, start: int, length: int) -> int:
        """The kind of the lock that F_OFD_GETLK finds in the way."""
        answer = fcntl.fcntl(self._file, command, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
        return int(_FLOCK.unpack(answer)[0])


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    for attempt in range(OPEN_ATTEMPTS):
        try:
            file = os.open(path, flags)
        except FileNotFoundError:
            try:
                file = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                continue
            os.fchmod(file, 0o666)  # whatever the umask says: other users lock in it, too
        except PermissionError:
            if attempt == OPEN_ATTEMPTS - 1:
                raise
            time.sleep(OPEN_SECONDS)
            continue
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            return file
        os.close(file)
        raise PermissionError(1, "is not a plain file of its own", str(path))
    raise PermissionError(1, "comes and goes", str(path))


def holder_text(name: str) -> str:
    """Who holds what a job of this name takes."""
    return f"job {name} (process {os.getpid()})"


def in_use_now(cpus: Sequence[int]) -> tuple[dict[int, str], dict[str, int]]:
    """Those of the CPUs that a job holds, and which one; and `promised_memory`. Nothing where that cannot be known."""
    try:
        locks = CpuLocks(lock_file())
    except OSError:
        return {}, {}
    try:
        return locks.busy(cpus), locks.promised_memory()
    finally:
        locks.close()
