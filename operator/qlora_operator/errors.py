"""The operator's errors, and what to do about each.

OperatorError
├── InvalidJobError       the object is not a valid job; trying again does not help
├── InvalidFileError      the user's file has faults; trying again does not help
├── SettingsError         the administrator's settings cannot be used
└── CommandError          a command must end, with the error's exit code
    ├── PlacementError    the job does not fit this machine
    ├── WorkspaceError    the job's folder is in use, or belongs to another job
    └── ProcessError      a program of ours could not be started, or did not answer
"""

from collections.abc import Sequence
from dataclasses import dataclass


class OperatorError(Exception):
    """The root of the operator's own errors."""


class InvalidJobError(OperatorError):
    """An object that is not a valid job: (field path, message) of each fault."""

    def __init__(self, faults: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{path}: {message}" if path else message for path, message in faults))
        self.faults = tuple(faults)


@dataclass(frozen=True)
class Fault:
    """One fault of a file: where it is, what is wrong, and what would be right."""

    file: str
    message: str
    path: str = ""
    """Field path as users write it, such as `spec.isa.allowed[1]`; empty for the file itself."""
    document: str = ""
    """Which document, such as `document 2 (smollm2)`; empty when the file has only one."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.document, self.path, self.message) if part)


class InvalidFileError(OperatorError):
    """A file that cannot be used, with every fault that was found in it."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = tuple(faults)


USAGE = 2
"""Exit code of a command whose arguments or files cannot be used."""


class CommandError(OperatorError):
    """Why a command must end, in a sentence for the user, and its exit code."""

    def __init__(self, cause: str, code: int = 1) -> None:
        super().__init__(cause)
        self.code = code
