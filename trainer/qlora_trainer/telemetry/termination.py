"""Why a process ended: how a rank tells its launcher, and the launcher or a transfer tells Kubernetes."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import ValidationError

from qlora_contract.env import TERMINATION_LOG_ENV
from qlora_contract.files import read_json
from qlora_contract.paths import TERMINATION_LOG, TERMINATION_REPORT_BYTES
from qlora_contract.progress import TerminationReport

log = logging.getLogger(__name__)

REPORT_ENV = "QLORA_REPORT"
"""Path of the file that a rank writes its TerminationReport to, set by its launcher."""

_FREE_TEXT = ("cause", "not_bit_exact", "host", "data")
"""Fields of unbounded length; they are truncated when a report is too long."""


def write_rank_report(report: TerminationReport, environ: Mapping[str, str] = os.environ) -> None:
    """Leave a report for the launcher; do nothing for a rank that was started by hand, without one.

    A report that cannot be written, since /tmp is full or its folder gone, changes nothing of how the rank ends.
    """
    if not (name := environ.get(REPORT_ENV)):
        return
    path = Path(name)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(to_bytes(report))
        part.replace(path)  # a rank that is killed while it writes leaves no report rather than half of one
    except OSError as error:
        log.warning("the report for the launcher could not be written: %s", error)


def write_memory_plan(parts: Mapping[str, int], environ: Mapping[str, str] = os.environ) -> None:
    """Leave beside the report what this rank needs its memory for, bytes by part: a rank that is killed for it cannot
    say so any more."""
    if name := environ.get(REPORT_ENV):
        try:
            _memory_plan_of(Path(name)).write_text(json.dumps(dict(parts)))
        except OSError as error:
            log.warning("the plan of this rank's memory could not be written: %s", error)


def read_memory_plan(report: Path) -> dict[str, int]:
    """What the rank of this report needed its memory for; empty where it did not come to know."""
    try:
        return {str(part): int(size) for part, size in read_json(_memory_plan_of(report)).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _memory_plan_of(report: Path) -> Path:
    return report.with_name(report.name + ".memory")


def read_rank_report(path: Path) -> TerminationReport | None:
    """The report that a rank left; None where there is none, or something else."""
    try:
        return TerminationReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def to_bytes(report: TerminationReport, limit: int = TERMINATION_REPORT_BYTES) -> bytes:
    """UTF-8 JSON of at most `limit` bytes; free text is truncated, the longest first, to make it fit."""
    if len(whole := _dump(report, None)) <= limit:
        return whole
    low, high = 0, max(len(getattr(report, field) or "") for field in _FREE_TEXT)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(_dump(report, middle)) <= limit else (low, middle)
    return _dump(report, low)


def _dump(report: TerminationReport, longest: int | None) -> bytes:
    """JSON whose free text is one line of at most `longest` characters a field; bytes that are not UTF-8 become ?."""
    texts = {}
    for field in _FREE_TEXT:
        if (text := getattr(report, field)) is not None:
            line = " ".join(text.encode("utf-8", "replace").decode().split())
            if longest is not None and len(line) > longest:
                line = line[: max(longest - 1, 0)] + "…"[:longest]
            texts[field] = line
    return report.model_copy(update=texts).model_dump_json(by_alias=True, exclude_none=True).encode()


def termination_log(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where the termination message goes: the file that the environment names, else Kubernetes' own; None: nowhere."""
    if name := environ.get(TERMINATION_LOG_ENV):
        return Path(name)
    return TERMINATION_LOG if TERMINATION_LOG.exists() else None


def write_termination_message(
    report: TerminationReport, environ: Mapping[str, str], log: Callable[[str], None]
) -> None:
    """Write the termination message, and log it as the last line. A file that cannot be written is logged, too."""
    path = termination_log(environ)
    try:
        if path is not None:
            path.write_bytes(to_bytes(report))
    except OSError as error:
        log(f"the termination message could not be written: {error}")
    log(f"exits with code {report.exit_code} ({report.reason}): {report.cause}")
