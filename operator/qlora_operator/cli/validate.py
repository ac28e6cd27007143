"""`qlora validate`: whether job files are valid, before a cluster or a machine sees them."""

from collections.abc import Sequence
from typing import TextIO

from qlora_operator.api.loader import load_jobs
from qlora_operator.errors import InvalidFileError

VALID = 0
INVALID = 2


def validate(paths: Sequence[str], stdout: TextIO) -> int:
    """Print a line for every valid job and every fault, file by file (`-`: standard input).

    Returns the exit status: 0 if all are valid, else 2.
    """
    status = VALID
    for path in paths:
        try:
            for job in load_jobs(path):
                print(f"{path}: {job.metadata.name}: valid", file=stdout)
        except InvalidFileError as error:
            print(error, file=stdout)
            status = INVALID
    return status
