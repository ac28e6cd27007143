"""attempts.json: what each attempt at a job took, which only its own rank 0 can know, kept for those that follow."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from qlora_contract.cost import AttemptRecord
from qlora_contract.files import read_json
from qlora_contract.job_folder import ATTEMPTS
from qlora_trainer.storage.atomic import write_atomically


def read_attempts(folder: Path) -> list[AttemptRecord]:
    """The attempts of a job's folder, oldest first; none where the file is missing or damaged."""
    try:
        return [AttemptRecord.model_validate(record) for record in read_json(folder / ATTEMPTS)]
    except (OSError, ValueError, TypeError, ValidationError):
        return []


def with_attempt(known: Sequence[AttemptRecord], record: AttemptRecord) -> list[AttemptRecord]:
    """The records with this one in place of itself as it was before. Attempts of a job of another uid, which was
    deleted and created again, were paid for just as well."""
    others = [each for each in known if (each.job_uid, each.attempt) != (record.job_uid, record.attempt)]
    return [*others, record]


def write_attempts(folder: Path, records: Sequence[AttemptRecord]) -> None:
    """Replace attempts.json. Raises StorageFull."""
    lines = ",\n".join(record.model_dump_json(by_alias=False) for record in records)
    write_atomically(folder / ATTEMPTS, f"[\n{lines}\n]\n")
