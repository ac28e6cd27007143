"""Retries: which errors are worth another try, after how long, and when to give up.

By hand, not tenacity: the limit is on the time without progress, which each byte that arrives renews, and a server's
Retry-After sets the pause. Both would be callbacks of ours in its framework, as long as this module.
"""

import sys
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

from qlora_contract.units import now as time_now
from qlora_trainer.errors import TransferFailed

CONNECT_SECONDS = 20.0
RETRYABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be gone a moment later."""
FIRST_DELAY_SECONDS = 1.0
MAX_DELAY_SECONDS = 30.0

T = TypeVar("T")


class TransientError(Exception):
    """A request failed in a way that may pass."""

    def __init__(self, cause: str, retry_after: float | None = None) -> None:
        """Say what happened, and how many seconds the server asks to wait, if it does."""
        super().__init__(cause)
        self.retry_after = retry_after


class Retrier:
    """Retries with growing delays, for as long as there is progress now and then."""

    def __init__(
        self,
        limit_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        tell: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        """Give up after `limit_seconds` without progress.

        `tell` is told of each failure that is tried again, and None once there is progress.
        """
        self.limit_seconds = limit_seconds
        self._tell = tell
        self._told: str | None = None
        self._clock = clock
        self._sleep = sleep
        self.reset()

    def reset(self) -> None:
        """There is progress: the limit and the delays start anew."""
        self._deadline = self._clock() + self.limit_seconds
        self._delay = FIRST_DELAY_SECONDS
        self._say(None)

    def _say(self, failure: str | None) -> None:
        if failure != self._told:
            self._told = failure
            self._tell(failure)

    def call(self, action: Callable[[], T]) -> T:
        """The result of `action`, which is called again after each TransientError.

        Raises:
            TransferFailed: no progress within the limit, or the server asks for a pause that is longer.
        """
        self.reset()
        while True:
            try:
                result = action()
            except TransientError as error:
                delay = self._delay if error.retry_after is None else error.retry_after
                if self._clock() + delay > self._deadline:
                    asked = f", and the server asks to wait {delay:.0f} s" if error.retry_after else ""
                    raise TransferFailed(
                        f"{error}; gave up: no progress within {self.limit_seconds:.0f} s{asked} "
                        "(distributed.rendezvousTimeoutSeconds is also the limit for transfers)"
                    ) from error
                self._delay = min(2 * self._delay, MAX_DELAY_SECONDS)
                pause = f"{error}; retrying in {delay:.0f} s"
                log(pause)
                self._say(pause)
                self._sleep(delay)
            else:
                self._say(None)
                return result


def log(text: str) -> None:
    """Write a line to the pod's log."""
    print(f"{time_now()} transfer: {text}", file=sys.stderr, flush=True)


def retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a Retry-After header asks to wait, given as a number or as a date; None if it says neither."""
    if value is None:
        return None
    try:
        if value.strip().isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - now())
    except ValueError:
        return None
