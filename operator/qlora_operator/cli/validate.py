"""`qlora validate`: whether job files are valid, before a cluster or a machine sees them."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, TextIO

from qlora_contract.run_config import NOTHING_HELD_OUT
from qlora_operator.api.loader import file_label, load_jobs
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.api.windows import in_zone, schedule_fault, spans
from qlora_operator.cli.job_file import amendment, on_a_cluster
from qlora_operator.cli.settings import Setting
from qlora_operator.errors import Fault, InvalidFileError

VALID = 0
INVALID = 2


WINDOWS_TOLD = 3


def validate(
    paths: Sequence[str],
    stdout: TextIO,
    settings: Sequence[Setting] = (),
    *,
    output: str = "text",
    now: datetime | None = None,
) -> int:
    """Print a line for each valid job, warning and fault, file by file (`-`: standard input), and when a job with a
    schedule runs next; with `json`, one object.

    Returns the exit status: 0 if all are valid, else 2.
    """
    status, now = VALID, now or datetime.now(UTC)
    files: list[dict[str, Any]] = []
    for path in paths:
        told: dict[str, Any] = {"file": file_label(path), "jobs": [], "faults": []}
        files.append(told)
        try:
            for job in load_jobs(path, amendment(path, settings)):
                told["jobs"].append(
                    {
                        "name": job.metadata.name,
                        "onACluster": on_a_cluster(job),
                        "warnings": warnings(job),
                        "windows": _windows(job, file_label(path), now),
                    }
                )
        except InvalidFileError as error:
            told["faults"] = [asdict(fault) for fault in error.faults]
            status = INVALID
            if output == "text":
                print(error, file=stdout)
        for job_told in told["jobs"] if output == "text" else ():
            note = f"; {sentence}" if (sentence := job_told["onACluster"]) else ""
            print(f"{told['file']}: {job_told['name']}: valid{note}", file=stdout)
            for warning in job_told["warnings"]:
                print(f"{told['file']}: {job_told['name']}: warning: {warning}", file=stdout)
            for window in job_told["windows"]:
                print(f"  runs {_day(window['start'])} to {_day(window['end'])}", file=stdout)
    if output == "json":
        print(json.dumps({"files": files}, indent=2), file=stdout)
    return status


def warnings(job: QLoRAJob) -> list[str]:
    """Why a valid job will fail all the same, whatever its data are."""
    dataset, evaluation = job.spec.dataset, job.spec.evaluation
    held_out = dataset.eval_fraction > 0 or any(source.eval_split for source in dataset.all_sources)
    return [NOTHING_HELD_OUT] if evaluation.require_improvement and not held_out else []


def _windows(job: QLoRAJob, file: str, now: datetime) -> list[dict[str, str | None]]:
    """The next times in which a job with a schedule runs, by its clock, RFC 3339; the first may have begun.

    Raises:
        InvalidFileError: the schedule cannot be followed. An API server does not know time zones, and accepts it.
    """
    schedule = job.spec.schedule
    if schedule is None:
        return []
    if fault := schedule_fault(schedule):
        path, message = fault
        raise InvalidFileError([Fault(file, message, path, job.metadata.name)])
    return [
        {"start": in_zone(schedule, start), "end": None if end is None else in_zone(schedule, end)}
        for start, end in itertools.islice(spans(schedule, now), WINDOWS_TOLD)
    ]


def _day(time: str | None) -> str:
    """`Tue 2026-12-01 20:00 +01:00`."""
    if time is None:
        return "an end that is more than a week away"
    return f"{datetime.fromisoformat(time):%a %Y-%m-%d %H:%M} {time[-6:]}"
