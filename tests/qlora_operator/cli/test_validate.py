"""`qlora validate`."""

import io
from pathlib import Path

import pytest

from qlora_operator.cli.validate import validate

SAMPLES = Path(__file__).parents[3] / "manifests/samples"


def test_valid_files_are_listed() -> None:
    """Each job of each file gets a line, and the status is 0."""
    output = io.StringIO()
    paths = [str(SAMPLES / "minimal.yaml"), str(SAMPLES / "full.yaml")]

    assert validate(paths, output) == 0
    assert output.getvalue() == (f"{paths[0]}: smollm2-docs: valid\n{paths[1]}: smollm2-docs-full: valid\n")


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
