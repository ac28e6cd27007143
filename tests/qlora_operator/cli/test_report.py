"""`qlora report`."""

import sys
from pathlib import Path

import pytest

from qlora_contract.cost import parse_price
from qlora_contract.job_folder import METRICS, REPORT_PAGE
from qlora_operator.cli.report import write
from qlora_operator.errors import CommandError

pytestmark = pytest.mark.process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job that has made a step."""
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.5}\n')
    return tmp_path


def test_the_report_is_written_and_named(folder: Path) -> None:
    """By a program of the trainer's."""
    assert write(folder, parse_price("0.1 EUR")) == str(folder / REPORT_PAGE)
    assert (folder / REPORT_PAGE).read_text().startswith("<!DOCTYPE html>")


def test_a_folder_without_a_job_is_named(tmp_path: Path) -> None:
    """The command ends with the program's sentence."""
    with pytest.raises(CommandError, match=f"{tmp_path} holds no job that has made a step"):
        write(tmp_path, None)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        pytest.param(["/missing/program"], "could not be started", id="it is not there"),
        pytest.param(
            [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "ended with -9", id="it dies"
        ),
    ],
)
def test_a_program_that_does_not_answer_is_said_so(command: list[str], message: str, tmp_path: Path) -> None:
    """In a sentence, too."""
    with pytest.raises(CommandError, match=message):
        write(tmp_path, None, command)
