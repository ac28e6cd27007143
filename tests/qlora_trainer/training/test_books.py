"""What rank 0 keeps of its attempt."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.cost import AttemptRecord
from qlora_contract.env import PRICE_ENV, REQUESTED_ENV
from qlora_contract.job_folder import ATTEMPTS, METRICS, REPORT_PAGE
from qlora_contract.run_config import RunConfig
from qlora_contract.units import rfc3339
from qlora_trainer.errors import Fenced
from qlora_trainer.storage.attempts import read_attempts, write_attempts
from qlora_trainer.storage.job_folder import JobFolder
from qlora_trainer.training.books import Books

pytestmark = pytest.mark.process


@pytest.fixture
def folder(tmp_path: Path, a_run: Callable[..., RunConfig]) -> Callable[..., JobFolder]:
    """make(attempt, **fields) -> the folder of an attempt, which has it to itself."""

    def make(attempt: int = 0, **fields: Any) -> JobFolder:
        run = a_run(1, **fields)
        run = run.model_copy(update={"job": run.job.model_copy(update={"attempt": attempt})})
        made = JobFolder(tmp_path / "job", run)
        made.acquire()
        return made

    return make


def line(step: int, **fields: Any) -> str:
    """A line of metrics.jsonl."""
    return json.dumps({"step": step, "loss": 2.0, "seconds": 1.5, **fields}) + "\n"


def test_an_attempt_is_kept_with_its_steps_and_its_end(folder: Callable[..., JobFolder]) -> None:
    """From its first step to how it ended, with the CPUs of all ranks."""
    job = folder(layout={"pods": 1, "ranksPerPod": 2, "cpusPerRank": 3, "memoryPerRank": 2**30})
    books = Books(job, {})
    books.open()
    books.begin_steps(0)
    books.count_step(1)
    books.count_step(2)
    books.write({"job": "x"}, ended="adapter published")
    (kept,) = read_attempts(job.path)

    assert (kept.attempt, kept.cpus, kept.first_step, kept.step) == (0, 6, 0, 2)
    assert (kept.ended, kept.lost_steps, kept.queue_seconds) == ("adapter published", 0, None)
    assert 0 <= kept.seconds < 60


def test_steps_since_the_checkpoint_are_lost(folder: Callable[..., JobFolder]) -> None:
    """What the killed attempt had done beyond it is made again, and its time counts."""
    job = folder()
    (job.path / METRICS).write_text(line(0, loss=None) + "".join(map(line, range(1, 8))) + line(7, loss=None))
    books = Books(job, {})
    books.open()
    books.begin_steps(5)
    books.write()
    (kept,) = read_attempts(job.path)

    assert (kept.first_step, kept.lost_steps, kept.lost_seconds) == (5, 2, 3.0)


def test_a_killed_attempt_lived_as_long_as_its_metrics(folder: Callable[..., JobFolder]) -> None:
    """It could not write how long: the next one sees it by the file that it wrote last. Its energy is not known."""
    began = datetime(2026, 1, 1, tzinfo=UTC)
    job = folder(1)
    killed = AttemptRecord(
        job_uid=job.run.job.uid, attempt=0, began=rfc3339(began), seconds=3.0, cpus=2, energy_joules=9.0
    )
    ended = killed.model_copy(update={"job_uid": "before", "ended": "stopped"})
    write_attempts(job.path, [ended, killed])
    (job.path / METRICS).write_text(line(1))
    os.utime(job.path / METRICS, (0, (began + timedelta(seconds=500)).timestamp()))
    Books(job, {}).open()
    first, second, _ = read_attempts(job.path)

    assert first == ended
    assert second == killed.model_copy(update={"seconds": 500.0, "energy_joules": None})


def test_the_time_before_the_first_rank_is_the_queue_s(folder: Callable[..., JobFolder]) -> None:
    """From the request for the pods; clocks of nodes differ, and no time is below zero."""
    for ago, expected in ((120, 120), (-60, 0)):
        requested = rfc3339(datetime.now(UTC) - timedelta(seconds=ago))
        books = Books(folder(), {REQUESTED_ENV: requested})

        assert books.cost()["queue_seconds"] == pytest.approx(expected, abs=5)


@pytest.mark.parametrize("requested", ["", "yesterday", "2026-01-01"])
def test_a_request_that_cannot_be_read_is_unknown(requested: str, folder: Callable[..., JobFolder]) -> None:
    """Nothing depends on it."""
    assert Books(folder(), {REQUESTED_ENV: requested}).cost()["queue_seconds"] is None


@pytest.mark.parametrize(("price", "currency"), [("2 EUR", "EUR"), ("", ""), ("dear", "")])
def test_the_cost_has_the_price_of_the_environment(
    price: str, currency: str, folder: Callable[..., JobFolder]
) -> None:
    """Without one, or with what is none, there is no money."""
    cost = Books(folder(), {PRICE_ENV: price}).cost()

    assert cost["currency"] == currency
    assert (cost["money"] is None) == (currency == "")


def test_a_fenced_attempt_writes_nothing(folder: Callable[..., JobFolder]) -> None:
    """The folder, and with it the report, is another attempt's."""
    old = folder(0)
    books = Books(old, {})
    books.open()
    folder(1)
    before = (old.path / ATTEMPTS).read_text()

    with pytest.raises(Fenced):
        books.write(ended="late")
    assert (old.path / ATTEMPTS).read_text() == before
    assert not (old.path / REPORT_PAGE).exists()


def test_books_that_were_not_opened_stay_shut(folder: Callable[..., JobFolder]) -> None:
    """Ranks but the first, and attempts that find the job done, write nothing."""
    job = folder()
    Books(job, {}).write(ended="nothing to do")

    assert not (job.path / ATTEMPTS).exists()


def test_a_report_that_fails_ends_no_training(
    folder: Callable[..., JobFolder], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with it is logged."""
    job = folder()
    (job.path / METRICS).write_text(line(1))
    (job.path / REPORT_PAGE).mkdir()
    books = Books(job, {})
    books.open()
    books.write({"job": "x"})

    assert "the report could not be written" in caplog.text
