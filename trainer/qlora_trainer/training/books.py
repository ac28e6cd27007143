"""What rank 0 keeps of its attempt for people: what it takes, and the report page.

None of it is needed to train, so nothing that goes wrong here ends the training, but for the end of this attempt's
right to write at all.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from qlora_contract.cost import AttemptRecord, Price, cost_of, parse_price
from qlora_contract.env import PRICE_ENV, REQUESTED_ENV
from qlora_contract.job_folder import METRICS, REPORT_FACTS
from qlora_contract.units import parse_time, rfc3339
from qlora_trainer.artifacts.metrics_log import read_metrics
from qlora_trainer.errors import Fenced
from qlora_trainer.host.energy import EnergyMeter
from qlora_trainer.report.files import write_page
from qlora_trainer.storage.atomic import write_atomically
from qlora_trainer.storage.attempts import read_attempts, with_attempt, write_attempts
from qlora_trainer.storage.job_folder import JobFolder

log = logging.getLogger(__name__)


class Books:
    """The books of one attempt, kept by rank 0 from its start on."""

    def __init__(
        self, folder: JobFolder, environ: Mapping[str, str] = os.environ, meter: EnergyMeter | None = None
    ) -> None:
        run = folder.run
        began = datetime.now(UTC)
        self._folder = folder
        self._began = time.monotonic()
        self._price = _price(environ)
        # Its counters know one machine, and the ranks of other pods may be on others.
        self._meter = (meter or EnergyMeter()) if run.layout.pods == 1 else None
        self._open = False
        self._record = AttemptRecord(
            job_uid=run.job.uid,
            attempt=run.job.attempt,
            began=rfc3339(began),
            seconds=0.0,
            cpus=run.layout.world_size * run.layout.cpus_per_rank,
            queue_seconds=_queue_seconds(began, environ),
        )

    def open(self) -> None:
        """Begin to write: the folder is this attempt's now. What a killed attempt could not write is completed."""
        self._open = True
        with self._forgiven():
            self._write_attempts()

    def begin_steps(self, step: int) -> None:
        """The first step comes next, after `step`. Steps of earlier attempts beyond it are lost."""
        lost = [
            line
            for line in read_metrics(self._folder.path / METRICS)
            if line["step"] > step and line.get("loss") is not None
        ]
        self._update(
            first_step=step,
            step=step,
            lost_steps=len(lost),
            lost_seconds=float(sum(line.get("seconds") or 0 for line in lost)),
        )

    def count_step(self, step: int) -> None:
        """A step is done."""
        if self._meter is not None:
            self._meter.sample()
        self._update(step=step)

    def cost(self) -> dict[str, Any]:
        """What the job has cost so far, for training_report.json."""
        return cost_of(self._records(), self._price).model_dump(by_alias=False)

    def write(self, facts: Mapping[str, Any] | None = None, ended: str | None = None) -> None:
        """Write the attempt and the page.

        Args:
            facts: of a job that is not finished, as training_report.json would have them; None: as they were.
            ended: how the attempt ended; None while it runs.

        Raises:
            Fenced: a newer attempt has taken over.
        """
        if not self._open:
            return
        with self._forgiven():
            self._folder.check_fence()
            self._update(ended=ended)
            self._write_attempts()
            if facts is not None:
                write_atomically(self._folder.path / REPORT_FACTS, json.dumps(facts, indent=1))
            write_page(self._folder.path, self._price)

    def _records(self) -> list[AttemptRecord]:
        """All attempts, this one as it is now."""
        if self._meter is not None:
            self._meter.sample()
            self._update(energy_joules=self._meter.joules)
        self._update(seconds=time.monotonic() - self._began)
        own = (self._record.job_uid, self._record.attempt)
        known = read_attempts(self._folder.path)
        earlier = [self._completed(each) for each in known if (each.job_uid, each.attempt) != own]
        return with_attempt(earlier, self._record)

    def _completed(self, record: AttemptRecord) -> AttemptRecord:
        """An attempt that was killed lived at least as long as its newest line of metrics.jsonl says."""
        if record.ended is not None or self._record.first_step is not None:
            return record
        try:
            sign = datetime.fromtimestamp((self._folder.path / METRICS).stat().st_mtime, UTC)
            seconds = (sign - parse_time(record.began)).total_seconds()
        except (OSError, ValueError, TypeError):
            return record
        if seconds <= record.seconds:
            return record
        return record.model_copy(update={"seconds": seconds, "energy_joules": None})

    def _write_attempts(self) -> None:
        write_attempts(self._folder.path, self._records())

    def _update(self, **values: Any) -> None:
        self._record = self._record.model_copy(update=values)

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except Fenced:
            raise
        except Exception as error:  # whatever is in a report, it must not end a training
            log.warning("the report could not be written: %s", error)


def _price(environ: Mapping[str, str]) -> Price | None:
    text = environ.get(PRICE_ENV)
    if not text:
        return None
    try:
        return parse_price(text)
    except ValueError as error:
        log.warning("%s: %s", PRICE_ENV, error)
        return None


def _queue_seconds(began: datetime, environ: Mapping[str, str]) -> float | None:
    """Between the request for the pods and now; never below zero, since clocks of nodes differ."""
    try:
        return max(0.0, (began - parse_time(environ[REQUESTED_ENV])).total_seconds())
    except (KeyError, ValueError, TypeError):
        return None
