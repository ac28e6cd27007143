"""The time by which decisions are made: the API server's, without steps."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

SLEW = 0.1
"""How much faster or slower than a second a second may be while the clock approaches the API server's."""
RESOLUTION = timedelta(seconds=1)
"""Of the server's answers. A smaller difference is none."""


class Clock:
    """Deadlines, back-offs and times to live are measured with it, so it must not step.

    This machine's clock may, when NTP sets it or when it was suspended, and so may that of one of several API servers:
    a step of an hour would end jobs and delete finished ones at once, or make back-offs last for an hour. Between two
    answers the time is what this process has seen pass; a difference to the server's clock is made up gradually,
    however large it is. Only the first answer sets the clock.
    """

    def __init__(
        self,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._monotonic = monotonic
        self._base, self._at = wall(), monotonic()
        self._is_set = False

    def now(self) -> datetime:
        """The time, UTC; this machine's until the API server has answered for the first time."""
        return self._base + timedelta(seconds=self._monotonic() - self._at)

    def observe(self, server_time: datetime) -> None:
        """The API server has answered at this time."""
        at, before = self._monotonic(), self.now()
        # The server cuts off what exceeds a whole second.
        difference = min(max(before, server_time), server_time + RESOLUTION) - before
        if self._is_set:
            most = timedelta(seconds=(at - self._at) * SLEW)
            difference = min(max(difference, -most), most)
        self._base, self._at, self._is_set = before + difference, at, True
