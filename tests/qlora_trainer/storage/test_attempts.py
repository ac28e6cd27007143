"""attempts.json."""

from pathlib import Path

import pytest

from qlora_contract.cost import AttemptRecord
from qlora_contract.job_folder import ATTEMPTS
from qlora_trainer.storage.attempts import read_attempts, with_attempt, write_attempts


def record(attempt: int, uid: str = "u", seconds: float = 1.0) -> AttemptRecord:
    """One attempt."""
    return AttemptRecord(job_uid=uid, attempt=attempt, began="2026-01-01T00:00:00Z", seconds=seconds, cpus=2)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """All attempts, in order."""
    records = [record(0), record(1, seconds=2.5)]
    write_attempts(tmp_path, records)

    assert read_attempts(tmp_path) == records


@pytest.mark.parametrize("text", [None, "", "{", "7", '[{"attempt": 0}]', '["x"]', "[null]"])
def test_a_file_that_is_missing_or_damaged_is_no_attempt(text: str | None, tmp_path: Path) -> None:
    """It is for people alone: a job goes on without it."""
    if text is not None:
        (tmp_path / ATTEMPTS).write_text(text)

    assert read_attempts(tmp_path) == []


def test_a_record_replaces_itself_and_no_other() -> None:
    """Neither an earlier attempt nor one of the job's folder under another uid, whose numbers began anew."""
    known = [record(0, "before"), record(1, "before"), record(0)]

    assert with_attempt(known, record(0, seconds=9.0)) == [*known[:2], record(0, seconds=9.0)]
    assert with_attempt(known, record(1)) == [*known, record(1)]


def test_fields_of_a_later_release_are_passed_over(tmp_path: Path) -> None:
    """A job may be continued by an earlier release."""
    write_attempts(tmp_path, [record(0)])
    path = tmp_path / ATTEMPTS
    path.write_text(path.read_text().replace('"cpus"', '"unheard_of":1,"cpus"'))

    assert read_attempts(tmp_path) == [record(0)]
