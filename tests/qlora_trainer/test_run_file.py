"""run.json, as the trainer reads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.exit_codes import ExitCode
from qlora_contract.run_config import RunConfig
from qlora_trainer.run_file import RunFileError, load_run, with_rank_counts


@pytest.fixture
def write(tmp_path: Path, a_run: Callable[..., RunConfig]) -> Callable[..., Path]:
    """Writes run.json: a given text, or the text of a run with fields set by their dotted paths."""

    def write(text: str | None = None, **fields: Any) -> Path:
        document = json.loads(a_run().to_json())
        for path, value in fields.items():
            *parents, last = path.split("__")
            inner = document
            for name in parents:
                inner = inner.setdefault(name, {})
            inner[last] = value
        file = tmp_path / "run.json"
        file.write_text(json.dumps(document) if text is None else text)
        return file

    return write


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        pytest.param(
            '{"version": 3}', "has version 3 and this trainer reads versions 1 and 2", id="newer version"
        ),
        pytest.param(
            '{"version": "2"}',
            "has version '2' and this trainer reads versions 1 and 2",
            id="version as text",
        ),
        pytest.param('{"job": 1}', "not a JSON object with a version", id="no version"),
        pytest.param("[1]", "not a JSON object with a version", id="list"),
        pytest.param("{", "not a JSON object with a version", id="no JSON"),
        pytest.param('{"version": 1}', "is malformed at job: Field required", id="fields missing"),
    ],
)
def test_a_text_that_is_not_a_run_is_refused(text: str, cause: str, write: Callable[..., Path]) -> None:
    """A file of another version, or malformed, is refused in one sentence that says where."""
    path = write(text)

    with pytest.raises(RunFileError, match=cause) as caught:
        load_run(path)
    assert caught.value.code == ExitCode.INVALID_CONFIGURATION
    assert str(caught.value).startswith(str(path))


def test_a_value_of_the_wrong_type_is_refused(write: Callable[..., Path]) -> None:
    """The sentence says which field it is."""
    with pytest.raises(RunFileError, match=r"is malformed at training\.maxSteps"):
        load_run(write(training__maxSteps="1"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A launcher without a run.json says so."""
    with pytest.raises(RunFileError, match="cannot be read: No such file"):
        load_run(tmp_path / "absent.json")


@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_are_read(
    version: int, write: Callable[..., Path], a_run: Callable[..., RunConfig]
) -> None:
    """A trainer reads its own version and the one before."""
    assert load_run(write(version=version)) == a_run(version=version)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}], ids=repr)
def test_an_unknown_field_that_says_nothing_is_passed_over(
    value: Any, version: int, write: Callable[..., Path], a_run: Callable[..., RunConfig]
) -> None:
    """A writer that spells out an empty default asks for nothing new."""
    path = write(version=version, training__sooner=value, sooner=value)

    assert load_run(path) == a_run(version=version)


@pytest.mark.parametrize("value", [True, 1, "x", [0], {"a": 0}], ids=repr)
def test_an_unknown_field_that_says_something_is_refused(value: Any, write: Callable[..., Path]) -> None:
    """What a trainer cannot do it does not leave out in silence: the sentence names the field and the versions."""
    with pytest.raises(RunFileError, match=r"sets training\.sooner.* reads versions 1 and 2") as caught:
        load_run(write(training__sooner=value))
    assert caught.value.code == ExitCode.INVALID_CONFIGURATION


def test_a_run_is_given_its_rank_counts(a_run: Callable[..., RunConfig]) -> None:
    """What the launchers agreed on becomes a part of the run."""
    run = a_run(layout={"pods": 2, "ranksPerPod": "auto", "cpusPerRank": 8, "memoryPerRank": 2**30})

    assert with_rank_counts(run, [2, 2]).layout.world_size == 4
    assert with_rank_counts(run, [2, 2]).layout.cpus_per_rank == 4
