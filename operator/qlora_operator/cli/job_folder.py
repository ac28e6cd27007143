"""`jobs/<name>` of a workspace on this machine, as `qlora run` sees it: its lock, its attempts, their logs and reports.

Its format is qlora_contract.job_folder. The trainer writes everything here but run.json, the lock, and the launchers'
logs and reports.
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qlora_contract.exit_codes import ExitCode
from qlora_contract.files import read_json, write_atomically
from qlora_contract.job_folder import (
    LOCK,
    LOGS,
    RUN_CONFIG,
    DamagedIdentityError,
    IdentityError,
    has_identity,
)
from qlora_contract.progress import TerminationReport
from qlora_contract.run_config import JobRef, RunConfig
from qlora_operator.errors import CommandError


class WorkspaceError(CommandError):
    """The folder cannot be used now, or not for this job."""


@contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Hold the lock of a job's folder, which is created if need be; yields the lock's open file.

    A process that inherits that file holds the lock, too. Launchers do, so that a job whose `qlora run` was killed
    stays locked until its last launcher is gone.

    Raises:
        WorkspaceError: another process holds the lock, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise WorkspaceError(f"cannot write to {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read(20).strip()
            by = f"`qlora run` (process {holder})" if holder.isdigit() else "another `qlora run`"
            raise WorkspaceError(
                f"{folder} is in use by {by}, or by ranks of it that are still exiting; "
                "wait for them, or stop it first"
            ) from None
        try:
            lock.truncate(0)
            os.write(lock.fileno(), f"{os.getpid()}\n".encode())  # not kept for later where the disk is full
        except OSError as error:
            raise WorkspaceError(f"cannot write to {folder}: {error.strerror}") from error
        yield lock


def next_attempt(folder: Path) -> tuple[str, int]:
    """(uid of the job, number of its next attempt): the uid of the last run.json, and its attempt plus one.

    Without a readable run.json the job gets a new uid and begins with attempt 0.
    """
    try:
        job = JobRef.model_validate(read_json(folder / RUN_CONFIG)["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(uuid.uuid4()), 0
    return job.uid, job.attempt + 1


def belongs_to(folder: Path, run: RunConfig) -> bool:
    """Whether the folder is marked as this spec's. A mark that cannot be read counts as none: rank 0 reports it.

    Raises:
        WorkspaceError: it belongs to another spec; says what differs.
    """
    try:
        return has_identity(folder, run)
    except (OSError, DamagedIdentityError):
        return False
    except IdentityError as error:
        raise WorkspaceError(str(error), ExitCode.INVALID_CONFIGURATION) from error


def prepare(folder: Path, run: RunConfig) -> Path:
    """Write run.json, remove the last attempt's reports, and return an empty folder for this attempt's logs.

    Raises:
        WorkspaceError: the folder cannot be written to.
    """
    logs = folder / LOGS / f"attempt-{run.job.attempt}"
    try:
        for old in folder.glob("termination-*.json"):
            old.unlink()
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        write_atomically(folder / RUN_CONFIG, run.to_json())
    except OSError as error:
        raise WorkspaceError(f"cannot write to {folder}: {error.strerror}") from error
    return logs


def termination_file(folder: Path, index: int) -> Path:
    """Where the launcher of this index leaves its TerminationReport."""
    return folder / f"termination-{index}.json"


def read_termination(path: Path) -> TerminationReport | None:
    """A launcher's report; None when it left none that can be read."""
    try:
        return TerminationReport.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
