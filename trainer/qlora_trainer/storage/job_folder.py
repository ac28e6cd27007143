"""`jobs/<name>` of a workspace, as the trainer sees it: whose it is, and which attempt may write to it.

Its format is qlora_contract.job_folder.
"""

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

from qlora_contract.files import read_json
from qlora_contract.job_folder import (
    ADAPTER,
    BEGAN,
    CHECKPOINTS,
    FENCE,
    IDENTITY,
    TRAINING_REPORT,
    IdentityError,
    finished_report,
    has_identity,
    identity_text,
)
from qlora_contract.run_config import RunConfig
from qlora_contract.units import format_bytes
from qlora_trainer.errors import ConfigurationError, Fenced, StorageFull
from qlora_trainer.storage.atomic import make_folder, recover, write_atomically

MOST_OWNERS_BEFORE = 16
"""Jobs that a fence remembers to have had the folder. A job that is deleted and created again is another one."""


class JobFolder:
    """The folder of a job, for one attempt at it.

    Every attempt writes its number into the fence before anything else, and reads it again before it publishes: one
    that was believed dead, and is not, finds another's number there and stops.
    """

    def __init__(self, path: Path, run: RunConfig) -> None:
        self.path = path
        self.run = run

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def adapter(self) -> Path:
        """Folder of the finished adapter."""
        return self.path / ADAPTER

    def acquire(self) -> None:
        """Make the folder ours: check that it belongs to this spec, set the fence, clear up. Rank 0 does, at the start.

        Raises:
            ConfigurationError: it holds another spec's results; says what differs. Or another job has taken it over
                from this one: the two would go on taking it from each other.
            Fenced: a newer attempt of this job has it.
            StorageFull: not even these small files fit.
        """
        make_folder(self.checkpoints)
        try:
            if not has_identity(self.path, self.run):
                if (self.path / IDENTITY).exists():
                    # Of a shorter training that this one goes on with: it is not finished any more.
                    (self.path / TRAINING_REPORT).unlink(missing_ok=True)
                write_atomically(self.path / IDENTITY, identity_text(self.run))
        except IdentityError as error:
            raise ConfigurationError(str(error)) from error
        job = self.run.job
        uid, attempt, before = self._fence()
        if uid == job.uid and attempt > job.attempt:
            raise Fenced(f"attempt {attempt} has taken over; this is attempt {job.attempt}")
        if job.uid in before:
            raise ConfigurationError(
                f"{self.path} was taken over from this job by another one of the same name and spec (uid {uid}): give "
                "one of the two another name or workspace"
            )
        if uid not in ("", job.uid):
            before = [*before, uid][-MOST_OWNERS_BEFORE:]
        fence = {"uid": job.uid, "attempt": job.attempt} | ({"before": before} if before else {})
        write_atomically(self.path / FENCE, json.dumps(fence))
        for folder in (self.path, self.checkpoints):
            recover(folder)
        if self._began() is None:
            time = datetime.datetime.now().astimezone().isoformat()
            write_atomically(self.path / BEGAN, json.dumps({"time": time}))

    def began(self) -> datetime.datetime:
        """When the first attempt began; now, where none has."""
        return self._began() or datetime.datetime.now().astimezone()

    def _began(self) -> datetime.datetime | None:
        try:
            return datetime.datetime.fromisoformat(read_json(self.path / BEGAN)["time"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def check_fence(self) -> None:
        """Raise Fenced unless the fence still names this attempt."""
        uid, attempt, _ = self._fence()
        if (uid, attempt) != (self.run.job.uid, self.run.job.attempt):
            owner = f"now belongs to attempt {attempt} of job {uid}" if uid else "has no readable fence"
            raise Fenced(f"{self.path} {owner}; this attempt stops writing to it")

    def _fence(self) -> tuple[str, int, list[str]]:
        """(job uid, attempt, uids of jobs that had the folder before) that the fence names; ("", -1, []) when there is
        none, or a damaged one."""
        try:
            fence = read_json(self.path / FENCE)
            before = [str(uid) for uid in fence.get("before", ())]
            return str(fence["uid"]), int(fence["attempt"]), before
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
        ):  # of an infinite number
            return "", -1, []

    def check_space(self, needed: int) -> None:
        """Raise StorageFull when fewer than `needed` bytes are free."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise StorageFull(
                f"{self.path} has {format_bytes(free)} free; checkpoints and the adapter need {format_bytes(needed)}"
            )

    def finished(self) -> bool:
        """Whether this job's adapter is complete and reported."""
        return finished_report(self.path) is not None

    def report(self) -> dict[str, Any]:
        """training_report.json of a finished job."""
        report: dict[str, Any] = read_json(self.path / TRAINING_REPORT)
        return report
