"""Where the time went, attempt by attempt."""

from typing import Any

import pytest

from qlora_contract.cost import AttemptRecord
from qlora_trainer.report.timeline import Span, spans_of, svg

ZERO = 1_767_225_600.0
"""2026-01-01T00:00:00Z."""


def at(seconds: int) -> str:
    """So many seconds after the beginning, as records have it."""
    return f"2026-01-01T00:{seconds // 60:02}:{seconds % 60:02}Z"


def an_attempt(began: str, seconds: float, **fields: Any) -> AttemptRecord:
    """An attempt of a job on two CPUs."""
    return AttemptRecord(job_uid="u", began=began, seconds=seconds, cpus=2, **{"attempt": 0, **fields})


def steps(*each: tuple[int, int]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: (step, time), a step taking four seconds."""
    return [{"step": step, "loss": 2.0, "seconds": 4.0, "time": at(time)} for step, time in each]


TRAINED = an_attempt(at(10), 90, queue_seconds=10, first_step=0, step=3, ended="adapter published")
CASES: dict[str, tuple[list[AttemptRecord], list[dict[str, Any]], list[list[tuple[str, int, int]]]]] = {
    "from the request to the adapter": (
        [TRAINED],
        [{"step": 0, "eval_loss": 3.0, "time": at(25)}, *steps((1, 34), (3, 50))],
        [[("queue", 0, 10), ("start", 10, 30), ("steps", 30, 50), ("end", 50, 100)]],
    ),
    "killed: what followed its last kept step is lost": (
        [an_attempt(at(0), 60, step=2), an_attempt(at(100), 30, first_step=2, step=3)],
        steps((1, 14), (2, 18), (3, 114)),
        [
            [("start", 0, 10), ("steps", 10, 18), ("lost", 18, 60)],
            [("start", 100, 110), ("steps", 110, 114), ("end", 114, 130)],
        ],
    ),
    "ended with steps that were made again": (
        [an_attempt(at(0), 60, first_step=0, step=9, ended="a peer was lost")],
        steps((1, 14), (4, 26)),
        [[("start", 0, 10), ("steps", 10, 26), ("lost", 26, 60)]],
    ),
    "all of its steps were lost": (
        [an_attempt(at(0), 60, first_step=0, step=9, ended="a peer was lost")],
        [],
        [[("lost", 0, 60)]],
    ),
    "it made no step": ([an_attempt(at(0), 60, ended="no such model")], [], [[("start", 0, 60)]]),
    "an export": ([an_attempt(at(0), 60, ended="exported merged")], [], [[("end", 0, 60)]]),
    "a time that is none": ([an_attempt("yesterday", 60)], [], []),
}


@pytest.mark.parametrize(("attempts", "metrics", "expected"), CASES.values(), ids=CASES)
def test_an_attempt_is_told_apart(
    attempts: list[AttemptRecord],
    metrics: list[dict[str, Any]],
    expected: list[list[tuple[str, int, int]]],
) -> None:
    """Waiting, starting, training, what was lost, and what comes after the last step."""
    found = spans_of(attempts, metrics)

    assert [[(s.kind, s.start - ZERO, s.end - ZERO) for s in spans] for _, spans in found] == expected


def test_each_span_is_a_bar_with_its_duration() -> None:
    """On one axis, with the kinds that there are in the legend."""
    drawn = svg([TRAINED], steps((1, 34), (3, 50)))

    assert drawn.count("<rect") == 4
    assert "<title>waiting for pods: 10s</title>" in drawn
    assert "<title>evaluating, publishing, exporting: 50s</title>" in drawn
    assert "attempt 0" in drawn
    assert "steps that were lost" not in drawn


def test_without_times_there_is_none() -> None:
    """Nor for attempts that took none, or longer than any number."""
    assert svg([], []) == ""
    assert svg([an_attempt(at(0), 0.0)], []) == ""
    assert svg([an_attempt(at(0), 1.7e308, queue_seconds=1.7e308)], []) == ""
    assert spans_of([an_attempt(at(0), -5.0)], []) == [(0, [])]


def test_of_many_attempts_the_last_are_shown() -> None:
    """A job that was preempted a hundred times still has a page."""
    drawn = svg([an_attempt(at(n), 1.0, attempt=n) for n in range(100)], [])

    assert "attempt 99" in drawn
    assert drawn.count("<rect") == 24


def test_a_span_has_seconds() -> None:
    """As `time.time` counts them."""
    assert spans_of([an_attempt(at(0), 60)], []) == [(0, [Span("start", ZERO, ZERO + 60)])]
