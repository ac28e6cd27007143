"""The page of a job's folder."""

import json
from pathlib import Path

import pytest

from qlora_contract.cost import AttemptRecord, parse_price
from qlora_contract.job_folder import (
    EXPORT_REPORT,
    EXPORTS,
    METRICS,
    REPORT_FACTS,
    REPORT_PAGE,
    TRAINING_REPORT,
)
from qlora_trainer.report.files import page_of, write_page
from qlora_trainer.storage.attempts import write_attempts

RELEASE = Path(__file__).parents[2] / "releases" / "0.1.0" / "checkpoint" / "finished"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job that has made a step."""
    path = tmp_path / "demo"
    path.mkdir()
    (path / METRICS).write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    return path


def test_a_job_that_has_begun_has_a_page(folder: Path) -> None:
    """From its curves alone, under the name of its folder; a line that a crash has cut is left out."""
    path = write_page(folder, None)

    assert path == folder / REPORT_PAGE
    assert "<h1>demo</h1>" in path.read_text()
    assert path.read_text().count("<circle") == 1


def test_what_is_final_comes_before_what_was_known_so_far(folder: Path) -> None:
    """The report of a finished job is its own; that of another is of the newest checkpoint."""
    (folder / REPORT_FACTS).write_text(json.dumps({"job": "so far"}))
    assert "<h1>so far</h1>" in str(page_of(folder, None))

    (folder / TRAINING_REPORT).write_text(json.dumps({"job": "final"}))
    assert "<h1>final</h1>" in str(page_of(folder, None))


def test_the_price_of_the_day_counts(folder: Path) -> None:
    """Money is a matter of when one asks; what was used is not."""
    write_attempts(folder, [AttemptRecord(job_uid="u", attempt=0, began="b", seconds=7200, cpus=3)])

    assert "12.00 CHF, at 2 CHF an hour" in str(page_of(folder, parse_price("2 CHF")))
    assert "no price given" in str(page_of(folder, None))


COSTS: dict[str, tuple[object, str]] = {
    "with a price": ({"price_per_core_hour": 0.5, "currency": "EUR"}, "3.00 EUR, at 0.5 EUR an hour"),
    "without": ({"price_per_core_hour": None}, "no price given"),
    "damaged": ({"price_per_core_hour": "much"}, "no price given"),
    "no cost at all": ("none", "no price given"),
}


@pytest.mark.parametrize(("cost", "shown"), COSTS.values(), ids=COSTS)
def test_without_a_price_the_job_s_own_counts(folder: Path, cost: object, shown: str) -> None:
    """It was given when the job ran; writing the page again must not lose it."""
    write_attempts(folder, [AttemptRecord(job_uid="u", attempt=0, began="b", seconds=7200, cpus=3)])
    (folder / TRAINING_REPORT).write_text(json.dumps({"cost": cost}))

    assert shown in str(page_of(folder, None))


def test_exports_of_this_adapter_are_shown(folder: Path) -> None:
    """Also those that `qlora export` made later; not one of an adapter of before, nor a folder without a report."""
    (folder / TRAINING_REPORT).write_text(json.dumps({"adapter_sha256": "new"}))
    for form, of in (("merged", "new"), ("gguf-f16", "old"), ("gguf-q8_0", None), ("other", "new")):
        path = folder / EXPORTS / form / EXPORT_REPORT
        path.parent.mkdir(parents=True)
        if of is not None:
            path.write_text(json.dumps({"adapter_sha256": of, "bytes": 2**30}))
    page = str(page_of(folder, None))

    assert "vllm serve exports/merged" in page
    assert not any(f"<td>{form}</td>" in page for form in ("gguf-f16", "gguf-q8_0", "other"))


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_damaged_report_is_passed_over(text: str, folder: Path) -> None:
    """There are still the curves."""
    (folder / TRAINING_REPORT).write_text(text)

    assert "<svg" in str(page_of(folder, None))


def test_a_folder_without_a_job_has_none(tmp_path: Path) -> None:
    """Nothing is written where there is nothing to tell."""
    assert write_page(tmp_path, None) is None
    assert list(tmp_path.iterdir()) == []
    assert page_of(tmp_path / "missing", None) is None


def test_a_job_of_the_release_before_has_a_page() -> None:
    """It recorded neither configuration nor attempts."""
    page = str(page_of(RELEASE, None))

    assert "Provenance" in page
    assert "What it cost" not in page
