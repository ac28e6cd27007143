"""Reports: what crosses the wire between trainer and operator."""

import json

import pytest
from pydantic import ValidationError

from qlora_contract.progress import (
    CheckpointRef,
    ProgressReport,
    RankFacts,
    TerminationReport,
    timeline_text,
)
from qlora_contract.run_config import ResolvedRevisions

PROGRESS = ProgressReport(
    job_uid="0f",
    attempt=2,
    stage="Training",
    step=3,
    total_steps=10,
    epoch=0.3,
    loss=1.5,
    checkpoint=CheckpointRef(step=2, time="2026-01-01T00:00:00Z", uri="pvc://team/w/jobs/j/checkpoints/2"),
    ranks=[RankFacts(rank=0, host="h", isa="avx2", cpus="0-3", threads=4)],
    updated_time="2026-01-01T00:00:01Z",
)
TERMINATION = TerminationReport(exit_code=13, reason="DIVERGED", cause="the loss is NaN at step 7", step=7)
FETCHING = PROGRESS.model_copy(update={"stage": "Fetching", "bytes_done": 10, "bytes_total": 2**40})
FETCHED = TerminationReport(
    exit_code=0, reason="DONE", cause="fetched", fetched=ResolvedRevisions(model="c" * 40, dataset="d" * 64)
)
PUBLISHED = TerminationReport(
    exit_code=0, reason="DONE", cause="sent", published_uri="hf://org/adapter@" + "c" * 40
)


@pytest.mark.parametrize(
    "report",
    [PROGRESS, TERMINATION, FETCHING, FETCHED, PUBLISHED],
    ids=["progress", "termination", "fetching", "fetched", "published"],
)
def test_a_report_survives_the_round_trip(report: ProgressReport | TerminationReport) -> None:
    """What one side writes, the other reads as the same."""
    assert type(report).model_validate_json(report.model_dump_json(by_alias=True)) == report


def test_fields_are_camel_case_outside() -> None:
    """Names on the wire are those of Kubernetes' style."""
    wire = json.loads(PROGRESS.model_dump_json(by_alias=True))

    assert (wire["jobUid"], wire["totalSteps"], wire["ranks"][0]["cpus"]) == ("0f", 10, "0-3")
    assert json.loads(TERMINATION.model_dump_json(by_alias=True))["exitCode"] == 13


def test_what_is_not_known_yet_may_be_left_out() -> None:
    """Before the first step there is no loss, evaluation, rate or checkpoint."""
    first = ProgressReport.model_validate_json(
        '{"version": 1, "jobUid": "0f", "attempt": 1, "stage": "Starting", "step": 0, "totalSteps": 10,'
        ' "epoch": 0.0, "updatedTime": "2026-01-01T00:00:00Z"}'
    )

    assert (first.loss, first.eval_loss, first.checkpoint, first.ranks) == (None, None, None, [])
    assert (first.bytes_done, first.bytes_total) == (None, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", 2), ("stage", "Sleeping"), ("step", "3")],
    ids=["version", "stage", "type"],
)
def test_a_foreign_report_is_refused(field: str, value: object) -> None:
    """A report of another version or shape is refused rather than misread."""
    wire = json.loads(PROGRESS.model_dump_json(by_alias=True))
    with pytest.raises(ValidationError):
        ProgressReport.model_validate_json(json.dumps(wire | {field: value}))


@pytest.mark.parametrize("report", [PROGRESS, TERMINATION], ids=["progress", "termination"])
def test_what_a_later_trainer_adds_to_a_report_is_ignored(
    report: ProgressReport | TerminationReport,
) -> None:
    """A job does not lose its progress, or the cause of its end, for a field that this operator does not know."""
    wire = json.loads(report.model_dump_json(by_alias=True))

    assert type(report).model_validate_json(json.dumps(wire | {"surprise": {"a": 1}})) == report


def test_a_loss_that_is_no_number_is_still_valid_json() -> None:
    """NaN has no JSON; it crosses as null, and reads as not known."""
    text = TERMINATION.model_copy(update={"eval_loss": float("nan")}).model_dump_json(by_alias=True)

    assert TerminationReport.model_validate_json(text).eval_loss is None


def test_a_report_of_ranks_says_nothing_of_transfers() -> None:
    """Only a fetch tells what was fetched, and only an upload where the copy is."""
    assert (TERMINATION.fetched, TERMINATION.published_uri) == (None, None)
    assert (FETCHED.published_uri, PUBLISHED.fetched) == (None, None)


@pytest.mark.parametrize(
    ("timeline", "text"),
    [
        pytest.param({}, "", id="nothing yet"),
        pytest.param({"imports": 8.0, "training": 0.01}, "imports 8.0 s", id="no first step"),
        pytest.param({"a": 1.0, "first step": 2.0}, "3.0 s to the end of the first step: a 1.0 s, first step 2.0 s",
                     id="the first step"),
        pytest.param({"a": 1.0, "first step": 2.0, "b": 3.0},
                     "3.0 s to the end of the first step: a 1.0 s, first step 2.0 s; then b 3.0 s", id="more"),
    ],
)  # fmt: skip
def test_a_timeline_says_what_came_before_the_first_step(timeline: dict[str, float], text: str) -> None:
    """The wait for the first step is what a user feels; what took no time is left out."""
    assert timeline_text(timeline) == text
