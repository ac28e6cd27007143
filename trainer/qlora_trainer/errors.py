"""Why a rank ends early, as exceptions; each knows its exit code.

TrainerError
├── ConfigurationError     run.json, or a folder that belongs to another spec
├── DataError              the training data
├── ModelError             the base model, or what cannot be adapted in it
├── Diverged               NaN or Inf in a loss or gradient
├── StorageFull            no space for checkpoints or the adapter
├── OutOfMemory            the memory limit
├── NoImprovement          the adapter is no better than the base
├── TransferRefused        a remote source or destination is missing, or refuses us
├── TransferFailed         a remote source or destination does not answer as it should
├── RendezvousError        ranks did not find each other
├── CollectiveError        a collective failed
│   ├── PeerLost           ... because a peer is gone
│   └── CollectiveTimeout  ... because a peer did not answer
├── Terminated             SIGTERM, after a checkpoint
└── Fenced                 a newer attempt has taken over the job's folder
"""

import errno
import os

from qlora_contract.exit_codes import ExitCode


class TrainerError(Exception):
    """A foreseen end. Its text is one sentence for the user; it becomes the termination report's cause."""

    exit_code = ExitCode.UNEXPECTED
    agreed = False
    """Raised by all ranks at the same place, from the same numbers: they can part in order."""


class ConfigurationError(TrainerError):
    """run.json or the job's folder is not what it should be."""

    exit_code = ExitCode.INVALID_CONFIGURATION


class DataError(TrainerError):
    """The training data cannot be used."""

    exit_code = ExitCode.INVALID_DATA


class ModelError(TrainerError):
    """The base model cannot be used."""

    exit_code = ExitCode.MODEL_UNUSABLE


class Diverged(TrainerError):  # noqa: N818 - named for what happened
    """A loss or gradient is NaN or infinite; the last good checkpoint is kept."""

    exit_code = ExitCode.DIVERGED
    agreed = True


class StorageFull(TrainerError):  # noqa: N818
    """The workspace has no space left."""

    exit_code = ExitCode.STORAGE_FULL


class OutOfMemory(TrainerError):  # noqa: N818
    """Memory could not be had."""

    exit_code = ExitCode.OUT_OF_MEMORY


class NoImprovement(TrainerError):  # noqa: N818
    """The adapter's eval loss is not below the base's; nothing is published."""

    exit_code = ExitCode.NO_IMPROVEMENT
    agreed = True


class TransferRefused(TrainerError):  # noqa: N818
    """A remote source or destination is missing, or refuses us: the same request is refused again."""

    exit_code = ExitCode.TRANSFER_REFUSED


class TransferFailed(TrainerError):  # noqa: N818
    """A remote source or destination did not answer, broke off, or sent something else, again and again."""

    exit_code = ExitCode.TRANSFER_FAILED


class RendezvousError(TrainerError):
    """The ranks did not find each other in time."""

    exit_code = ExitCode.RENDEZVOUS_FAILED


class CollectiveError(TrainerError):
    """A collective operation failed."""

    exit_code = ExitCode.LOST_PEER


class PeerLost(CollectiveError):  # noqa: N818
    """A collective failed because a peer's connection broke."""


class CollectiveTimeout(CollectiveError):  # noqa: N818
    """A collective failed because a peer did not answer in time."""

    exit_code = ExitCode.COLLECTIVE_TIMEOUT


class Terminated(TrainerError):  # noqa: N818
    """Every rank left at the same step because one was asked to."""

    exit_code = ExitCode.TERMINATED
    agreed = True


class Fenced(TrainerError):  # noqa: N818
    """Another attempt owns the job's folder now; this one must not write to it."""

    exit_code = ExitCode.TERMINATED


def from_os_error(error: OSError, doing: str) -> TrainerError | None:
    """The foreseen error an OSError stands for; None when it is none of them."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return ConfigurationError(
            f"{error.strerror} while {doing}: {error.filename}: user {os.geteuid()} must be let to read what is there, "
            "and to write in the workspace"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f": {error.filename}" if error.filename else ""
        return StorageFull(f"no space left while {doing}{where} ({error.strerror})")
    if error.errno == errno.ENOMEM:
        return OutOfMemory(f"no memory left while {doing}")
    return None
