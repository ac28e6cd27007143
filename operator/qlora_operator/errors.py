"""What can go wrong, and what to do about it.

OperatorError
├── InvalidJobError       the object is no valid job; judging it again changes nothing
├── InvalidFileError      the user's file is wrong; reading it again changes nothing
└── CommandError          a command cannot go on; it ends with the error's exit code
    ├── PlacementError    the machine does not fit the job
    ├── WorkspaceError    the job's folder is in use, or another job's
    └── ProcessError      a program of ours could not be started, or gave no answer
"""

from collections.abc import Sequence
from dataclasses import dataclass


class OperatorError(Exception):
    """The root of the operator's own errors."""


class InvalidJobError(OperatorError):
    """An object that is no valid job: (field path, message) of each fault."""

    def __init__(self, faults: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{path}: {message}" if path else message for path, message in faults))
        self.faults = tuple(faults)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in a file: where, what, and what would be right."""

    file: str
    message: str
    path: str = ""
    """Field path as users write it, such as `spec.isa.allowed[1]`; empty for the file itself."""
    document: str = ""
    """Which document, such as `document 2 (smollm2)`; empty when the file has only one."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.document, self.path, self.message) if part)


class InvalidFileError(OperatorError):
    """A file that is not what it should be, with every fault that was found in it."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = tuple(faults)


class CommandError(OperatorError):
    """Why a command cannot go on, in a sentence for the user, and the code it exits with."""

    def __init__(self, cause: str, code: int = 1) -> None:
        super().__init__(cause)
        self.code = code
