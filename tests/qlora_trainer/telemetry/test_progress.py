"""The live report, and the rate of training."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qlora_contract.progress import ProgressReport, Work
from qlora_contract.run_config import RunConfig
from qlora_trainer.telemetry.progress import Progress, Rate, starting_report

START = ProgressReport(
    job_uid="u",
    attempt=2,
    stage="Starting",
    step=0,
    total_steps=400,
    epoch=0.0,
    updated_time="2026-01-01T00:00:00Z",
)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"steps": 1}, id="unknown-field"),
        pytest.param({"step": "3"}, id="wrong-type"),
        pytest.param({"stage": "Dancing"}, id="unknown-stage"),
    ],
)
def test_a_wrong_update_is_refused_and_changes_nothing(changes: dict[str, Any]) -> None:
    """A report is never invalid, so that the operator can always read it."""
    live = Progress(START)
    with pytest.raises(ValidationError):
        live.update(**changes)

    assert live.report == START


def test_whatever_is_done_advances_the_report() -> None:
    """The count of all work grows through the stages; that of the work at hand begins anew with each."""
    live = Progress(START)
    seen = [(live.report.advances, live.report.work)]
    live.begin(Work(name="tokenizing", unit="records"))
    live.advance(3)
    live.advance(2)
    seen.append((live.report.advances, live.report.work))
    live.begin(Work(name="loading the model", unit="bytes", total=100))
    live.advance(40)
    live.update(stage="Starting")
    seen.append((live.report.advances, live.report.work))
    live.begin(None)
    seen.append((live.report.advances, live.report.work))

    assert seen == [
        (None, None),
        (5, Work(name="tokenizing", unit="records", done=5)),
        (45, Work(name="loading the model", unit="bytes", done=40, total=100)),
        (45, None),
    ]


def test_a_timeline_has_every_second_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the work at hand, or the stage where no more is known, in the order in which each was first done."""
    clock = [10.0]
    monkeypatch.setattr("qlora_trainer.telemetry.progress.time.monotonic", lambda: clock[0])
    live = Progress(START)
    live.spent("imports", 5.0)
    steps: list[tuple[float, Callable[[], None]]] = [
        (1.0, lambda: live.begin(Work(name="tokenizing", unit="records"))),
        (2.0, lambda: live.begin(None)),
        (0.5, lambda: live.update("first step", stage="Training")),
        (3.0, lambda: live.update(step=1)),
        (0.0, lambda: live.update(stage="Training")),
        (4.0, lambda: live.update(stage="Evaluating")),
        (7.0, lambda: live.update(stage="Training")),
    ]
    for seconds, step in steps:
        clock[0] += seconds
        step()
    clock[0] += 1.0

    assert {name: spent for name, spent in live.timeline.items() if spent} == {
        "imports": 5.0, "preparing": 1.5, "tokenizing": 2.0, "first step": 3.0, "training": 5.0, "evaluating": 7.0
    }  # fmt: skip
    assert list(live.timeline) == [
        "imports",
        "preparing",
        "tokenizing",
        "first step",
        "training",
        "evaluating",
    ]


def test_an_attempt_starts_with_what_is_known(a_run: Callable[..., RunConfig]) -> None:
    """Before anything is done the report says which attempt it is and what it does."""
    report = starting_report(a_run(), "Fetching")

    assert (report.job_uid, report.attempt, report.stage, report.step) == ("u", 1, "Fetching", 0)
    assert report.updated_time.endswith("Z")


def test_rate_before_the_first_step_knows_nothing() -> None:
    """There is no speed without a step."""
    rate = Rate()

    assert (rate.tokens_per_second, rate.eta_seconds(10)) == (None, None)


def test_speed_is_of_the_window_and_eta_of_the_attempt() -> None:
    """Speed follows the last steps; the time left is by the mean of all steps so far."""
    rate = Rate(window=2)
    for tokens, seconds in [(100, 10.0), (100, 1.0), (300, 1.0)]:
        rate.step(tokens, seconds)

    assert rate.tokens_per_second == 200.0
    assert rate.eta_seconds(5) == 20.0
    assert rate.eta_seconds(0) == 0.0


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.01, 100.0)), min_size=1))
def test_speed_lies_between_the_slowest_and_the_fastest_step(steps: list[tuple[int, float]]) -> None:
    """The mean over a window is that of its tokens and seconds, not of the steps' speeds."""
    rate = Rate(window=len(steps))
    for tokens, seconds in steps:
        rate.step(tokens, seconds)
    speeds = [tokens / seconds for tokens, seconds in steps]

    assert rate.tokens_per_second is not None
    assert min(speeds) * (1 - 1e-9) <= rate.tokens_per_second <= max(speeds) * (1 + 1e-9)
