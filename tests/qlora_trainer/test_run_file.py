"""run.json, as an operator or an editor may leave it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_contract.exit_codes import ExitCode
from qlora_contract.run_config import RunConfig
from qlora_trainer import run_file
from qlora_trainer.run_file import RunFileError


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(
            '{"version": 3}', "has version 3 and this trainer reads versions 1 and 2", id="other version"
        ),
        pytest.param('{"job": 1}', "not a JSON object with a version", id="no version"),
        pytest.param("[1]", "not a JSON object with a version", id="list"),
        pytest.param("{", "not a JSON object with a version", id="no JSON"),
        pytest.param("[" * 100_000, "not a JSON object with a version", id="nested too deeply"),
        pytest.param('{"version": 1}', "is malformed at job: Field required", id="fields missing"),
        pytest.param(None, "malformed at training.maxSteps", id="type"),
    ],
)
def test_a_run_file_that_cannot_be_used(
    a_run: Callable[..., RunConfig], tmp_path: Path, text: str | None, says: str
) -> None:
    """A file of another version, or malformed, is refused in one sentence that says where."""
    path = tmp_path / "run.json"
    path.write_text(text or a_run().to_json().replace('"maxSteps": 1', '"maxSteps": "1"'))
    with pytest.raises(RunFileError, match=says) as caught:
        run_file.load_run(path)

    assert caught.value.code == ExitCode.INVALID_CONFIGURATION
    assert "\n" not in str(caught.value)


def test_a_missing_run_file_is_named(tmp_path: Path) -> None:
    """The path and the kernel's reason are in the message."""
    with pytest.raises(RunFileError, match=r"absent\.json cannot be read: No such file"):
        run_file.load_run(tmp_path / "absent.json")


def test_a_run_file_survives_the_round_trip(a_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """What the operator writes is what the launcher reads."""
    path = tmp_path / "run.json"
    path.write_text(a_run().to_json())

    assert run_file.load_run(path) == a_run()
