"""`jobs/<name>` of a workspace on this machine, as `qlora run` sees it: whose it is, and whether its job is done.

The trainer writes everything here but run.json, the lock and the launchers' logs and reports.
"""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qlora_contract import places
from qlora_contract.exit_codes import ExitCode
from qlora_contract.progress import TerminationReport
from qlora_contract.run import RunConfig, config_hash, differences, run_shaping_fields
from qlora_operator.errors import CommandError

LOGS = "logs"


class WorkspaceError(CommandError):
    """The folder cannot be used now, or for this job."""


@contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Hold the lock of a job's folder, which is made if need be; gives the lock's open file.

    Who inherits that file holds the lock as well: launchers do, so that a job whose `qlora run` was killed stays
    locked until its last launcher is gone. Raises WorkspaceError when somebody else holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / places.LOCK).open("a+")
    except OSError as error:
        raise WorkspaceError(f"{folder} cannot be written to: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkspaceError(_held(folder, lock)) from None
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        yield lock


def _held(folder: Path, lock: IO[str]) -> str:
    lock.seek(0)
    holder = lock.read(20).strip()
    by = f"`qlora run` with process id {holder}" if holder.isdigit() else "another `qlora run`"
    return f"{folder} is in use by {by}, or by ranks of it that are still ending; wait for them, or stop it first"


def next_attempt(folder: Path) -> tuple[str, int]:
    """(uid of the job, number of the attempt to make): those of the last run.json, and one more.

    A folder without one gets a new uid.
    """
    try:
        job = json.loads((folder / places.RUN_CONFIG).read_text())["job"]
        return str(job["uid"]), int(job["attempt"]) + 1
    except (OSError, ValueError, KeyError, TypeError):
        return str(uuid.uuid4()), 0


def check_identity(folder: Path, run: RunConfig) -> bool:
    """Whether the folder has begun to be filled by this very spec.

    Raises WorkspaceError, naming what differs, when it belongs to another one.
    """
    try:
        theirs = json.loads((folder / places.IDENTITY).read_text())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return False  # rank 0 says what is wrong with it
    mine = run_shaping_fields(run)
    if not isinstance(theirs, dict) or theirs.get("hash") != config_hash(mine):
        other = theirs.get("fields") if isinstance(theirs, dict) else None
        raise WorkspaceError(
            f"{folder} holds the results of another spec ({differences(other, mine)}); "
            "choose another metadata.name, or remove the folder",
            ExitCode.INVALID_CONFIGURATION,
        )
    return True


def finished(folder: Path) -> dict[str, Any] | None:
    """training_report.json of a job whose adapter is published and whole; None otherwise."""
    adapter = folder / places.ADAPTER
    try:
        files = json.loads((adapter / places.MANIFEST).read_text())["files"]
        whole = all(_sha256(adapter / name) == digest for name, digest in files.items())
        report = json.loads((folder / places.TRAINING_REPORT).read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return report if whole and isinstance(report, dict) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def prepare(folder: Path, run: RunConfig) -> Path:
    """Write run.json, clear away the last attempt's reports; the folder for this attempt's logs."""
    logs = folder / LOGS / f"attempt-{run.job.attempt}"
    try:
        for old in folder.glob("termination-*.json"):
            old.unlink()
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        _write_atomically(folder / places.RUN_CONFIG, run.to_json())
    except OSError as error:
        raise WorkspaceError(f"{folder} cannot be written to: {error.strerror}") from error
    return logs


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def termination_file(folder: Path, index: int) -> Path:
    """Where the launcher of this index leaves its TerminationReport."""
    return folder / f"termination-{index}.json"


def read_termination(path: Path) -> TerminationReport | None:
    """A launcher's report; None when it left none."""
    try:
        return TerminationReport.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
