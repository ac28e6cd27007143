"""`qlora validate`."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_operator.cli.validate import validate

SAMPLES = Path(__file__).parents[3] / "manifests/samples"


def test_valid_files_are_listed() -> None:
    """Each job of each file gets a line, and the status is 0."""
    output = io.StringIO()
    paths = [str(SAMPLES / "minimal.yaml"), str(SAMPLES / "full.yaml")]

    assert validate(paths, output) == 0
    lines = [line for line in output.getvalue().splitlines() if not line.startswith("  ")]
    assert lines == [f"{paths[0]}: smollm2-docs: valid", f"{paths[1]}: smollm2-docs-full: valid"]


def scheduled(folder: Path, zone: str, *windows: dict[str, Any]) -> str:
    """The file of a job with a schedule."""
    file = folder / "job.yaml"
    job = yaml.safe_load((SAMPLES / "minimal.yaml").read_text())
    job["spec"]["schedule"] = {"timeZone": zone, "windows": list(windows)}
    file.write_text(yaml.safe_dump(job))
    return str(file)


def test_a_job_with_a_schedule_says_when_it_runs_next(tmp_path: Path) -> None:
    """The next three windows by its own clock, also across a change of it; the first may have begun."""
    path = scheduled(tmp_path, "Europe/Berlin", {"start": "0 20 * * *", "end": "0 6 * * *"})
    told, output = io.StringIO(), io.StringIO()
    now = datetime(2026, 3, 27, 23, tzinfo=UTC)

    assert (validate([path], told, now=now), validate([path], output, output="json", now=now)) == (0, 0)
    assert told.getvalue().splitlines()[1:] == [
        "  runs Fri 2026-03-27 20:00 +01:00 to Sat 2026-03-28 06:00 +01:00",
        "  runs Sat 2026-03-28 20:00 +01:00 to Sun 2026-03-29 06:00 +02:00",
        "  runs Sun 2026-03-29 20:00 +02:00 to Mon 2026-03-30 06:00 +02:00",
    ]
    (job,) = json.loads(output.getvalue())["files"][0]["jobs"]
    assert job["windows"][0] == {"start": "2026-03-27T20:00:00+01:00", "end": "2026-03-28T06:00:00+01:00"}


def test_windows_that_never_close_are_told_as_such(tmp_path: Path) -> None:
    """Days that meet each other have no end in sight."""
    path, told = scheduled(tmp_path, "UTC", {"start": "0 0 * * *", "durationSeconds": 86400}), io.StringIO()

    assert validate([path], told, now=datetime(2026, 3, 27, 23, tzinfo=UTC)) == 0
    assert told.getvalue().splitlines()[1:] == [
        "  runs Fri 2026-03-27 00:00 +00:00 to an end that is more than a week away"
    ]


@pytest.mark.parametrize(
    ("zone", "start", "fault"),
    [
        (
            "Europe/Berln",
            "0 20 * * *",
            "spec.schedule.timeZone: Europe/Berln is no time zone that is known here",
        ),
        ("UTC", "0 20 31 4 *", "spec.schedule.windows[0].start: 0 20 31 4 * names no day that there is"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_not_valid(
    tmp_path: Path, zone: str, start: str, fault: str
) -> None:
    """An API server, which does not know time zones, would accept it, and the job would wait."""
    path, told = scheduled(tmp_path, zone, {"start": start, "durationSeconds": 60}), io.StringIO()

    assert validate([path], told) == 2
    assert told.getvalue().startswith(f"{path}: smollm2-docs: {fault}")


def test_one_bad_file_does_not_hide_the_others(tmp_path: Path) -> None:
    """All files are judged; any fault makes the status 2."""
    bad = tmp_path / "bad.yaml"
    bad.write_text((SAMPLES / "minimal.yaml").read_text().replace("epochs: 3", "epochs: three"))
    output = io.StringIO()

    assert validate([str(bad), str(SAMPLES / "minimal.yaml")], output) == 2
    assert output.getvalue().splitlines() == [
        f"{bad}: spec.training.epochs: is the string 'three'; it must be an integer from 1 to 10000",
        f"{SAMPLES / 'minimal.yaml'}: smollm2-docs: valid",
    ]


def test_standard_input_is_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` stands for standard input."""
    content = (SAMPLES / "minimal.yaml").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    output = io.StringIO()

    assert validate(["-"], output) == 0
    assert output.getvalue() == "standard input: smollm2-docs: valid\n"


@pytest.mark.parametrize(
    ("of_dataset", "more", "warned"),
    [
        ("", "", False),
        ("    evalFraction: 0\n", "", True),
        ("    evalFraction: 0\n    evalSplit: test\n", "", False),
        ("    evalFraction: 0\n", "  evaluation: {requireImprovement: false}\n", False),
    ],
)
def test_a_job_that_no_data_can_satisfy_is_warned_of(
    tmp_path: Path, of_dataset: str, more: str, warned: bool
) -> None:
    """It is valid, since the field may be set by --set yet; what to change is said."""
    lines = (SAMPLES / "minimal.yaml").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("  dataset:")) + 1
    job = tmp_path / "job.yaml"
    job.write_text("".join([*lines[:at], of_dataset, *lines[at:], more]))
    output = io.StringIO()

    assert validate([str(job)], output) == 0
    warning = f"{job}: smollm2-docs: warning: evaluation.requireImprovement needs data to evaluate on: set "
    assert (warning in output.getvalue()) is warned
