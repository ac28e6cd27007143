"""How long to insist on a server that does not answer as it should."""

import sys
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

from qlora_trainer.errors import TransferFailed

FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 30.0

T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818 - what happened, and no error yet
    """A request failed in a way that may pass: try again."""

    def __init__(self, cause: str, retry_after: float | None = None) -> None:
        """Say what happened, and how many seconds the server asks to wait."""
        super().__init__(cause)
        self.retry_after = retry_after


class Patience:
    """Insists as long as something arrives now and then."""

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Give up after so many seconds without a byte."""
        self.seconds = seconds
        self._clock = clock
        self._sleep = sleep
        self.progressed()

    def progressed(self) -> None:
        """Something has arrived."""
        self._deadline = self._clock() + self.seconds
        self._delay = FIRST_DELAY_SECONDS

    def insist(self, action: Callable[[], T]) -> T:
        """What `action` returns, tried again while it is Interrupted and the patience lasts.

        Raises:
            TransferFailed: nothing has arrived for too long, or the server asks to wait for longer than that.
        """
        self.progressed()
        while True:
            try:
                return action()
            except Interrupted as error:
                delay = self._delay if error.retry_after is None else error.retry_after
                if self._clock() + delay > self._deadline:
                    raise TransferFailed(f"{error}; {self._given_up(error.retry_after)}") from error
                self._delay = min(2 * self._delay, LONGEST_DELAY_SECONDS)
                tell(f"{error}; trying again in {delay:.0f} s")
                self._sleep(delay)

    def _given_up(self, retry_after: float | None) -> str:
        asked = "" if retry_after is None else f", which asks to wait for {retry_after:.0f} s"
        limit = f"distributed.rendezvousTimeoutSeconds: {self.seconds:.0f}"
        return f"given up{asked}: no more than that may pass without a byte ({limit})"


def tell(text: str) -> None:
    """A line for the log."""
    print(f"transfer: {text}", file=sys.stderr, flush=True)


def retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Seconds of a Retry-After header, which is a number of them or a date; None without one that can be read."""
    if value is None:
        return None
    try:
        if value.strip().isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - now())
    except ValueError:
        return None
