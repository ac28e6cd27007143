"""Exit codes of a rank and of a launcher, and what each means for a retry."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a rank ended. The number is the contract: it is never reused."""

    DONE = 0
    UNEXPECTED = 1
    """An error nobody foresaw; retried on the user's budget."""

    INVALID_CONFIGURATION = 10
    INVALID_DATA = 11
    MODEL_UNUSABLE = 12
    DIVERGED = 13
    STORAGE_FULL = 14
    OUT_OF_MEMORY = 15
    NO_IMPROVEMENT = 16
    TRANSFER_REFUSED = 17
    """A remote source or destination is missing, or refuses us."""

    RENDEZVOUS_FAILED = 30
    STALLED = 31
    TRANSFER_FAILED = 32
    """A remote source or destination did not answer, broke off, or sent what it should not, again and again."""

    LOST_PEER = 40
    COLLECTIVE_TIMEOUT = 41

    TERMINATED = 50
    """SIGTERM was obeyed: every rank left at the same step, after a checkpoint."""
    ISA_BELOW_TIER = 51


PERMANENT = frozenset(
    {
        ExitCode.INVALID_CONFIGURATION,
        ExitCode.INVALID_DATA,
        ExitCode.MODEL_UNUSABLE,
        ExitCode.DIVERGED,
        ExitCode.STORAGE_FULL,
        ExitCode.OUT_OF_MEMORY,
        ExitCode.NO_IMPROVEMENT,
        ExitCode.TRANSFER_REFUSED,
    }
)
"""Never retried: the same input fails the same way."""

RETRYABLE = frozenset(
    {ExitCode.UNEXPECTED, ExitCode.RENDEZVOUS_FAILED, ExitCode.STALLED, ExitCode.TRANSFER_FAILED}
)
"""Retried on the user's budget."""

COLLATERAL = frozenset({ExitCode.LOST_PEER, ExitCode.COLLECTIVE_TIMEOUT})
"""The consequence of another rank's end; they wait before they exit, so that the cause is first."""

INFRASTRUCTURE = frozenset({ExitCode.TERMINATED, ExitCode.ISA_BELOW_TIER})
"""Retried on the infrastructure's budget."""

COLLATERAL_DELAY_SECONDS = 5.0
"""How long a collateral rank waits before it exits."""


def fold(codes: list[int]) -> int:
    """One code for several ranks of a pod: the one that best names the cause.

    Codes above 128 or below 0 are deaths by signal. Permanent causes win, then
    unexpected and retryable ones, then deaths by signal, then infrastructure,
    then collateral ones; 0 only when all are 0.
    """
    order: list[frozenset[int]] = [
        frozenset(PERMANENT),
        frozenset(RETRYABLE),
        frozenset(c for c in codes if c not in set(ExitCode)),
        frozenset(INFRASTRUCTURE),
        frozenset(COLLATERAL),
    ]
    for group in order:
        for code in codes:
            if code in group:
                return 128 - code if code < 0 else code
    return ExitCode.DONE
