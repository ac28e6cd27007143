"""Why a rank or a transfer ends early, as exceptions that know their exit code.

TrainerError
├── ConfigurationError     run.json, or a job folder that belongs to another spec
├── DataError              the training data
│   └── NothingLeft        ... of which nothing, or too little, is left to train on
├── ModelError             the base model, or layers in it that cannot be adapted
├── Diverged               a loss or gradient is NaN or infinite
├── StorageFull            no space for checkpoints or the adapter
├── OutOfMemory            an allocation failed
├── NoImprovement          the adapter is not better than the base
├── AdaptersDiffer         the ranks no longer train the same adapter
├── Stalled                this rank hung
├── TransferRefused        a remote source or destination is missing, or denies access
├── TransferFailed         a remote source or destination does not answer properly
├── RendezvousError        the ranks did not find each other
├── CollectiveError        a collective failed
│   ├── PeerLost           ... because a peer is gone
│   └── CollectiveTimeout  ... because a peer did not answer
├── Terminated             SIGTERM, after a checkpoint
│   └── TerminatedAlone    SIGTERM, while there was nothing to agree on
└── Fenced                 a newer attempt has taken over the job's folder
"""

import errno
import os

from qlora_contract.exit_codes import ExitCode
from qlora_contract.paths import InvalidUriError
from qlora_contract.units import first_line

_ALLOCATION_FAILED = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""How torch's allocator and the operating system put it."""


class TrainerError(Exception):
    """An expected way to end. Its text is one sentence for the user and becomes the termination report's cause."""

    exit_code = ExitCode.UNEXPECTED
    agreed = False
    """All ranks raise it at the same place, from the same numbers, so they can leave the group in order."""


class ConfigurationError(TrainerError):
    """run.json, or the job's folder, is wrong."""

    exit_code = ExitCode.INVALID_CONFIGURATION


class DataError(TrainerError):
    """The training data cannot be used."""

    exit_code = ExitCode.INVALID_DATA


class NothingLeft(DataError):  # noqa: N818
    """Of all records too few can be trained on: of the first ones that proves nothing."""


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
    """An allocation failed."""

    exit_code = ExitCode.OUT_OF_MEMORY


class NoImprovement(TrainerError):  # noqa: N818
    """The adapter's eval loss is not below the base model's; nothing is published."""

    exit_code = ExitCode.NO_IMPROVEMENT
    agreed = True


class TransferRefused(TrainerError):  # noqa: N818
    """A remote source or destination is missing or denies access: the same request would fail again."""

    exit_code = ExitCode.TRANSFER_REFUSED


class AdaptersDiffer(TrainerError):  # noqa: N818
    """The ranks do not have the same adapter anymore."""

    exit_code = ExitCode.ADAPTERS_DIFFER
    agreed = True


class Stalled(TrainerError):  # noqa: N818
    """This rank hung."""

    exit_code = ExitCode.STALLED


class TransferFailed(TrainerError):  # noqa: N818
    """A remote source or destination repeatedly did not answer, broke off, or sent something else."""

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
    """Every rank left after the same step because one was asked to stop."""

    exit_code = ExitCode.TERMINATED
    agreed = True


class TerminatedAlone(Terminated):
    """As Terminated, while other ranks may be anywhere: each leaves by itself."""

    agreed = False


class Fenced(TrainerError):  # noqa: N818
    """Another attempt owns the job's folder now; this one must not write to it anymore."""

    exit_code = ExitCode.TERMINATED


def from_os_error(error: OSError, doing: str) -> TrainerError | None:
    """The TrainerError that an OSError stands for; None where its meaning is not certain.

    Args:
        error: a full disk, exhausted memory or a denied permission is recognized.
        doing: what failed, for the message: `writing /volumes/data/x`.
    """
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return ConfigurationError(
            f"{error.strerror} while {doing}: {error.filename}: grant user {os.geteuid()} read access to it, "
            "and write access to the workspace"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f": {error.filename}" if error.filename else ""
        return StorageFull(f"no space left while {doing}{where} ({error.strerror})")
    if error.errno == errno.ENOMEM:
        return OutOfMemory(f"out of memory while {doing}")
    return None


def expected(error: BaseException, doing: str) -> TrainerError | None:
    """The TrainerError that any exception stands for; None for an unexpected one.

    Args:
        error: itself where it is a TrainerError; else a bad URI, a failed allocation, or as from_os_error.
        doing: what failed, for the message.
    """
    if isinstance(error, TrainerError):
        return error
    if isinstance(error, InvalidUriError):
        return ConfigurationError(str(error))
    if isinstance(error, MemoryError) or any(text in str(error) for text in _ALLOCATION_FAILED):
        return OutOfMemory(
            "out of memory: raise topology.memoryPerRank, or lower training.microBatchTokens "
            f"or training.maxSequenceLength ({first_line(error)})"
        )
    return from_os_error(error, doing) if isinstance(error, OSError) else None
