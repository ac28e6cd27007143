"""Live progress: the newest report, and the rate of training it is made from."""

import threading
import time
from collections import deque
from typing import Any

from qlora_contract.progress import ProgressReport, Stage, Work
from qlora_contract.run_config import RunConfig
from qlora_contract.units import now


def starting_report(run: RunConfig, stage: Stage = "Starting") -> ProgressReport:
    """The live report of an attempt before anything else is known."""
    return ProgressReport(
        job_uid=run.job.uid,
        attempt=run.job.attempt,
        stage=stage,
        step=0,
        total_steps=0,
        epoch=0.0,
        updated_time=now(),
    )


_CALLED: dict[Stage, str] = {
    "Starting": "preparing",
    "Fetching": "fetching",
    "Training": "training",
    "Evaluating": "evaluating",
    "Publishing": "publishing",
    "Uploading": "uploading",
    "Done": "ending",
}
"""What a timeline calls a stage, where nothing more is known of what is done in it."""


class Rate:
    """Training speed over the last steps, and the time left, estimated from all steps of this attempt."""

    def __init__(self, window: int = 20) -> None:
        self._last: deque[tuple[int, float]] = deque(maxlen=window)
        self._steps = 0
        self._seconds = 0.0

    def step(self, tokens: int, seconds: float) -> None:
        """Record a step: its tokens over all ranks, and its duration in seconds."""
        self._last.append((tokens, seconds))
        self._steps += 1
        self._seconds += seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Averaged over the window; None before the first step."""
        total = sum(seconds for _, seconds in self._last)
        return sum(tokens for tokens, _ in self._last) / total if total > 0 else None

    def eta_seconds(self, remaining_steps: int) -> float | None:
        """How long the remaining steps take at this attempt's mean; None before the first step."""
        return remaining_steps * self._seconds / self._steps if self._steps else None


class Progress:
    """The newest report; thread-safe."""

    def __init__(self, report: ProgressReport) -> None:
        self._lock = threading.Lock()
        self._report = report
        self._tokens = 0
        self._work: Work | None = None
        self._work_done = 0
        self._advances: int | None = None
        self._activity = 0
        self._spent: dict[str, float] = {}
        self._at, self._since = "preparing", time.monotonic()

    def update(self, called: str | None = None, **changes: Any) -> None:
        """Change fields of the report, by their snake_case names, and set its time.

        Args:
            called: what the timeline calls the stage that begins, where its name says too little.
            changes: of the report.

        Raises:
            pydantic.ValidationError: the report has no such field, or the value is of another type.
        """
        with self._lock:
            self._activity += 1
            fields = {name: getattr(self._report, name) for name in ProgressReport.model_fields}
            # Reports are read leniently; what we write ourselves is not.
            self._report = ProgressReport.model_validate(
                fields | changes | {"updated_time": now()}, extra="forbid"
            )
            if "stage" in changes:
                self._turn_to(called or _CALLED[self._report.stage])

    def begin(self, work: Work | None) -> None:
        """Say what is being done from now on, besides steps; None: nothing that is counted."""
        with self._lock:
            self._activity += 1
            self._work, self._work_done = work, 0
            self._turn_to(work.name if work is not None else _CALLED[self._report.stage])

    def advance(self, amount: int) -> None:
        """Count what was just done, in the unit of the work at hand."""
        with self._lock:
            self._activity += 1
            self._work_done += amount
            self._advances = (self._advances or 0) + amount

    def count_tokens(self, tokens: int) -> None:
        """Add a step's tokens, over all ranks."""
        with self._lock:
            self._tokens += tokens

    def spent(self, what: str, seconds: float) -> None:
        """Add to the timeline what was done before there was a report."""
        with self._lock:
            self._spent[what] = seconds

    def _turn_to(self, what: str) -> None:
        now_ = time.monotonic()
        self._spent[self._at] = self._spent.get(self._at, 0.0) + now_ - self._since
        self._at, self._since = what, now_

    @property
    def timeline(self) -> dict[str, float]:
        """Seconds of this attempt by what they went into, in the order in which that was first done."""
        with self._lock:
            self._turn_to(self._at)
            return dict(self._spent)

    @property
    def activity(self) -> int:
        """Changes with everything that is told of."""
        with self._lock:
            return self._activity

    @property
    def report(self) -> ProgressReport:
        """The newest report."""
        with self._lock:
            work = self._work and self._work.model_copy(update={"done": self._work_done})
            return self._report.model_copy(update={"work": work, "advances": self._advances})

    @property
    def tokens(self) -> int:
        """Tokens of all ranks in this attempt."""
        with self._lock:
            return self._tokens
