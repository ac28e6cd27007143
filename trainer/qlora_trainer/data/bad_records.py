"""Records that cannot be trained on: counted by reason, and whether a job goes on without them."""

import re
from collections.abc import Sequence

from qlora_contract.plan import BadRecords
from qlora_contract.run_config import Dataset
from qlora_trainer.data.readers import BadRow
from qlora_trainer.errors import DataError, NothingLeft

MAX_BAD_LISTED = 10
"""Bad records that the error names which ends a job."""
MAX_BAD_PLACES = 5
"""Places that are kept of each reason for which records are left out."""
MAX_REASONS = 1000
"""Reasons that are kept apart."""
LOOKED_AT_BEHIND = 10_000
"""Records behind the first bad one that are looked at, where it ends the job."""
OTHER = "for other reasons"


class BadTally:
    """Takes the bad records of a split as they are met."""

    def __init__(self, dataset: Dataset) -> None:
        self._fails = dataset.on_bad_record == "fail"
        self._max_share = dataset.max_bad_share
        self._first: list[BadRow] = []
        self._reasons: dict[str, BadRecords] = {}
        self._count = 0
        self._first_at: int | None = None

    def add(self, bad: BadRow) -> None:
        """Count a bad record. Raises DataError when it is one too many to be listed."""
        self._count += 1
        if len(self._first) < MAX_BAD_LISTED:
            self._first.append(bad)
        elif self._fails:
            raise DataError(_refusal(self._first, more=True))
        # A number in a reason is a place within its record.
        kind = re.sub(r"\d+", "N", bad.reason)
        if kind not in self._reasons and len(self._reasons) >= MAX_REASONS:
            kind = OTHER
        known = self._reasons.get(kind) or BadRecords(reason=bad.reason, count=0, places=[])
        self._reasons[kind] = BadRecords(
            reason=bad.reason if bad.reason == known.reason else kind,
            count=known.count + 1,
            places=[*known.places, bad.location][:MAX_BAD_PLACES],
        )

    def check(self, looked_at: int) -> None:
        """Raise DataError once enough was looked at behind a bad record that ends the job.

        Args:
            looked_at: records so far, good and bad.
        """
        if not (self._fails and self._first):
            return
        if self._first_at is None:
            self._first_at = looked_at
        if looked_at - self._first_at > LOOKED_AT_BEHIND:
            raise DataError(_refusal(self._first, more=False))

    def by_reason(self) -> tuple[BadRecords, ...]:
        """The most frequent reason first."""
        return tuple(sorted(self._reasons.values(), key=lambda bad: -bad.count))

    def finish(self, good: int) -> tuple[BadRecords, ...]:
        """What was left out, by reason, once all records were looked at.

        Raises DataError when dataset.onBadRecord is `fail` and there is a bad one, which names the first ten; and when
        more than dataset.maxBadShare are bad.
        """
        if not self._first:
            return ()
        if self._fails:
            raise DataError(_refusal(self._first, more=False))
        total = self._count + good
        if not good or self._count > self._max_share * total:
            allowed = f", more than dataset.maxBadShare {self._max_share:g} allows" if good else ""
            listed = "; ".join(map(told, self.by_reason()))
            raise NothingLeft(f"{self._count:,} of {total:,} records cannot be trained on{allowed}: {listed}")
        return self.by_reason()


def told(bad: BadRecords) -> str:
    """How many records were left out for a reason, and where the first ones are."""
    return f"{bad.count:,} {bad.reason} ({', '.join(bad.places)})"


def _refusal(bad: Sequence[BadRow], *, more: bool) -> str:
    """The sentence about the first bad records."""
    if len(bad) == 1:
        return str(bad[0])
    listed = " ".join(f"({number}) {row}" for number, row in enumerate(bad, start=1))
    return (
        f"{len(bad)}{' and more' if more else ''} records cannot be trained on; mend them, or leave them out with "
        f"dataset.onBadRecord: skip: {listed}"
    )
