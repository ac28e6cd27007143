"""Facts about jobs that are kept between reconciliations and stand in no API object."""

import time
from collections.abc import Iterable

from qlora_contract.progress import ProgressReport
from qlora_operator.status.observation import ReasonMessage

FAILURES_TOLD = 3
"""After how many failures in a row the user is told."""
FAILING_SECONDS_TOLD = 20.0
"""After how long, with fewer: a request that is not answered takes its time to fail."""


class JobFacts:
    """Facts by the QLoRAJob's uid. Handlers and the poller put them here; the reconciler reads them."""

    def __init__(self) -> None:
        self._reports: dict[str, ProgressReport] = {}
        self._children_missing: set[str] = set()
        self._children_complete: set[str] = set()
        self._networks: set[str] = set()
        self._create_errors: dict[str, ReasonMessage] = {}
        self._failures: dict[str, tuple[int, float]] = {}
        self._warned: dict[str, int | None] = {}
        self._delivered: dict[str, set[str]] = {}

    def put_report(self, uid: str, report: ProgressReport) -> None:
        """Rank 0 has reported its progress."""
        self._reports[uid] = report

    def take_report(self, uid: str) -> ProgressReport | None:
        """What rank 0 has reported since this was last asked."""
        return self._reports.pop(uid, None)

    def set_children_missing(self, uids: Iterable[str]) -> None:
        """A Service or a NetworkPolicy of these jobs does not exist."""
        missing = set(uids)
        self._children_missing |= missing
        self._children_complete -= missing

    def set_children_complete(self, uid: str) -> None:
        """The job's Service and NetworkPolicy exist."""
        self._children_missing.discard(uid)
        self._children_complete.add(uid)
        self._networks.add(uid)

    def children_complete(self, uid: str) -> bool:
        """Whether the job's Service and NetworkPolicy were there when that was last looked at."""
        return uid in self._children_complete

    def children_missing(self, uid: str) -> bool:
        """Whether the job's Service or NetworkPolicy is known not to exist."""
        return uid in self._children_missing

    def set_network_exists(self, uids: Iterable[str]) -> None:
        """A Service or a NetworkPolicy of these jobs exists."""
        self._networks.update(uids)

    def set_network_gone(self, uid: str) -> None:
        """Neither exists any more."""
        self._networks.discard(uid)
        self._children_complete.discard(uid)

    def network_exists(self, uid: str) -> bool:
        """Whether the job's Service or NetworkPolicy is known to exist."""
        return uid in self._networks

    def set_create_error(self, uid: str, error: ReasonMessage | None) -> bool:
        """Why the job's children could not be created, or None if they were. Returns whether that is news: an error
        with another reason than before. Not by the message: a webhook may name each request in it."""
        before = self._create_errors.pop(uid, None)
        if error is None:
            return False
        self._create_errors[uid] = error
        return before is None or before.reason != error.reason

    def create_error(self, uid: str) -> ReasonMessage | None:
        """Why the job's children could not be created when that was last tried."""
        return self._create_errors.get(uid)

    def count_failure(self, uid: str, begun: float) -> bool:
        """A reconciliation that began at this monotonic time has failed. Returns whether that is worth a word: one
        failure is soon forgotten."""
        count, since = self._failures.get(uid, (0, begun))
        self._failures[uid] = (count + 1, since)
        return count + 1 >= FAILURES_TOLD or time.monotonic() - since >= FAILING_SECONDS_TOLD

    def clear_failures(self, uid: str) -> None:
        """A reconciliation has succeeded."""
        self._failures.pop(uid, None)

    def set_ignored_fields(self, uid: str, generation: int | None) -> bool:
        """This generation of a job has fields that are ignored. Returns whether that is news."""
        known = self._warned.get(uid, -1)
        self._warned[uid] = generation
        return known != generation

    def set_delivered(self, uid: str, notice: str) -> None:
        """A notice, by its key, was delivered."""
        self._delivered.setdefault(uid, set()).add(notice)

    def was_delivered(self, uid: str, notice: str) -> bool:
        """Whether a notice was delivered since this operator started."""
        return notice in self._delivered.get(uid, ())

    def delivered(self, uid: str) -> frozenset[str]:
        """Keys of the notices that were delivered since this operator started."""
        return frozenset(self._delivered.get(uid, ()))

    def forget(self, uid: str) -> None:
        """The job is gone."""
        self._reports.pop(uid, None)
        self._children_missing.discard(uid)
        self.set_network_gone(uid)
        self._create_errors.pop(uid, None)
        self._failures.pop(uid, None)
        self._warned.pop(uid, None)
        self._delivered.pop(uid, None)
