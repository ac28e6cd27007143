"""How a rank, a launcher or a transfer ends: each exit code, whose fault it is, what users read of it."""

from collections.abc import Sequence
from enum import IntEnum, StrEnum


class FailureKind(StrEnum):
    """Whose fault an end is, and so what another attempt costs. The order is that of `dominant_exit_code`."""

    PERMANENT = "permanent"
    """The same input fails the same way: the job is never retried."""
    RETRYABLE = "retryable"
    """Another attempt may succeed; it counts against the user's backoffLimit."""
    INFRASTRUCTURE = "infrastructure"
    """The cluster took the pod away or gave it the wrong node; counts against infrastructureBackoffLimit."""
    COLLATERAL = "collateral"
    """The consequence of another rank's end. The rank waits COLLATERAL_DELAY_SECONDS before it exits, so that the
    cause is reported first. Counts against infrastructureBackoffLimit when no other cause is found."""
    NONE = "none"
    """No failure."""


class ExitCode(IntEnum):
    """One row per exit code: number, kind, meaning and, where the name does not give it, the reason.

    The number is the contract: operators and trainers of different releases meet, so it is never changed or reused.
    """

    kind: FailureKind
    meaning: str
    """One sentence for the reference documentation."""
    reason: str
    """CamelCase, as a condition's `reason`: the name (InvalidData for INVALID_DATA) unless the row says otherwise."""

    def __new__(cls, number: int, kind: FailureKind, meaning: str, reason: str = "") -> "ExitCode":
        """A row of the table."""
        code = int.__new__(cls, number)
        code._value_ = number
        code.kind, code.meaning, code.reason = kind, meaning, reason
        return code

    def __init__(self, *_: object) -> None:
        self.reason = self.reason or "".join(word.capitalize() for word in self.name.split("_"))

    # fmt: off
    DONE = 0, FailureKind.NONE, "The rank is done.", "Succeeded"
    UNEXPECTED = (
        1, FailureKind.RETRYABLE, "A rank failed with an error that the trainer does not know.", "UnexpectedError")

    INVALID_CONFIGURATION = (
        10, FailureKind.PERMANENT, "The settings contradict each other, the model or the data.")
    INVALID_DATA = 11, FailureKind.PERMANENT, "The dataset cannot be trained on."
    MODEL_UNUSABLE = 12, FailureKind.PERMANENT, "The base model cannot be read or adapted."
    DIVERGED = 13, FailureKind.PERMANENT, "The loss or a gradient is not a finite number."
    STORAGE_FULL = 14, FailureKind.PERMANENT, "The workspace is full."
    OUT_OF_MEMORY = 15, FailureKind.PERMANENT, "A rank needed more than memoryPerRank."
    NO_IMPROVEMENT = (
        16, FailureKind.PERMANENT,
        "The adapter is not better than the base model, and evaluation.requireImprovement is set.")
    TRANSFER_REFUSED = (
        17, FailureKind.PERMANENT, "A remote source or the destination does not exist or refuses the credentials.")

    RENDEZVOUS_FAILED = 30, FailureKind.RETRYABLE, "The ranks did not find each other in time."
    STALLED = 31, FailureKind.RETRYABLE, "A rank hung."
    TRANSFER_FAILED = (
        32, FailureKind.RETRYABLE,
        "A remote source or the destination did not answer, broke off, or sent the wrong bytes, repeatedly.")

    ADAPTERS_DIFFER = 33, FailureKind.RETRYABLE, "The ranks no longer had the same adapter."

    LOST_PEER = (
        40, FailureKind.COLLATERAL, "A rank lost a peer, and the peer left no exit code of its own.", "PeerLost")
    COLLECTIVE_TIMEOUT = (
        41, FailureKind.COLLATERAL, "A peer did not take part in a collective operation in time.", "PeerLost")

    TERMINATED = (
        50, FailureKind.INFRASTRUCTURE,
        "The pods received SIGTERM, and every rank left at the same step after a checkpoint.")
    ISA_BELOW_TIER = 51, FailureKind.INFRASTRUCTURE, "A node lacks instructions that its labels advertise."
    # fmt: on


def _of_kind(kind: FailureKind) -> frozenset[ExitCode]:
    return frozenset(code for code in ExitCode if code.kind == kind)


PERMANENT = _of_kind(FailureKind.PERMANENT)
RETRYABLE = _of_kind(FailureKind.RETRYABLE)
COLLATERAL = _of_kind(FailureKind.COLLATERAL)
INFRASTRUCTURE = _of_kind(FailureKind.INFRASTRUCTURE)

COLLATERAL_DELAY_SECONDS = 5.0
"""How long a rank that lost a peer waits before it exits."""


COMMAND_CODES: dict[int, str] = {
    0: "Done.",
    1: "An unexpected error, or a folder that is in use or cannot be written to.",
    2: "Wrong arguments, or a file with errors.",
    129: "Ended because its terminal went away, as by Ctrl-C.",
    130: "Ended by Ctrl-C; a job that was training has a checkpoint, and the same command goes on from there.",
    137: "A process of the job was killed, mostly because the machine ran out of memory; the same command goes on.",
    143: "Ended by SIGTERM, as by Ctrl-C.",
}
"""Codes of the `qlora` command that are its own; the others are those of the ranks and transfers of its job."""


def command_codes() -> dict[int, str]:
    """Every exit code of the `qlora` command, and what it means, in their order."""
    job = {
        int(code): code.meaning
        for code in ExitCode
        if code not in COMMAND_CODES and code != ExitCode.TERMINATED
    }
    return dict(sorted({**job, **COMMAND_CODES}.items()))


def dominant_exit_code(codes: Sequence[int]) -> int:
    """The one of several ranks' codes that best names the cause; 0 only when all are 0.

    Permanent causes come first, then retryable ones, then deaths by signal and codes that are not ours, then
    infrastructure, then collateral; of equals the first.

    Args:
        codes: as subprocess.Popen.returncode has them: negative for a death by signal. 128 + signal counts as such.

    Returns:
        A code that a process can exit with: 128 + signal for a death by signal.
    """
    failures = [code for code in codes if code != ExitCode.DONE]
    if not failures:
        return ExitCode.DONE
    kinds = list(FailureKind)

    def precedence(code: int) -> float:
        if code in set(ExitCode):
            return kinds.index(ExitCode(code).kind)
        return kinds.index(FailureKind.RETRYABLE) + 0.5

    code = min(failures, key=precedence)
    return 128 - code if code < 0 else code
