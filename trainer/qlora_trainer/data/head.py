"""The beginning of data, for who must know soon what they are: bounded in records, tokens and time."""

import time
from collections.abc import Callable, Iterator

from qlora_trainer.data.readers import BadRow, Row, Rows

RECORDS = 10_000
"""Of each source's splits."""
TOKENS = 8_000_000
"""Of all of them: 40 MB."""
SECONDS = 60.0
LEAST = 256
"""Records of each split that are looked at, whatever the others took: of no record nothing can be said."""


class Head:
    """The first rows of every split of a dataset, and whether there are more."""

    def __init__(
        self,
        records: int = RECORDS,
        tokens: int = TOKENS,
        seconds: float = SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The bounds; `clock` is in seconds."""
        self._records, self._tokens, self._clock = records, tokens, clock
        self._until = clock() + seconds
        self.cut = False
        """Whether there are rows that were left out."""
        self.looked_at = 0
        """Rows of all splits so far."""

    def of(self, rows: Rows) -> Iterator[Row | BadRow]:
        """The first rows of a split."""
        for number, row in enumerate(rows):
            if number >= self._records or (number >= LEAST and self._is_spent()):
                self.cut = True
                return
            self.looked_at += 1
            yield row

    def spend(self, tokens: int) -> None:
        """Tokens were made of rows."""
        self._tokens -= tokens

    def _is_spent(self) -> bool:
        return self._tokens <= 0 or self._clock() >= self._until
