"""Questions to the trainer, with real processes."""

import json
import os
import sys
from pathlib import Path

import pytest

from qlora_operator.cli import trainer_query
from qlora_operator.cli.processes import ProcessError
from qlora_operator.cli.trainer_query import compile_kernels, query_trainer

pytestmark = pytest.mark.process


def test_the_trainer_tells_of_the_machine() -> None:
    """The planner, asked for nothing, answers without torch, with the CPUs of this process."""
    machine = query_trainer().machine

    assert machine is not None
    assert sorted(machine.cpus) == sorted(os.sched_getaffinity(0))
    assert set(machine.tiers).isdisjoint(machine.lacking)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        pytest.param(
            "import sys; sys.exit('no torch')", "exited with code 1 without an answer: no torch", id="error"
        ),
        pytest.param("print('hello')", "code 0 without an answer: it wrote nothing to stderr", id="no JSON"),
    ],
)
def test_a_planner_without_an_answer_is_quoted(program: str, said: str) -> None:
    """What it said last stands in the error."""
    with pytest.raises(ProcessError, match=said):
        query_trainer(command=(sys.executable, "-c", program))


def test_an_answer_may_hold_what_unicode_calls_ends_of_lines() -> None:
    """Texts of the web do, and the first sample is part of the answer."""
    answer = json.dumps({"error": {"code": 11, "cause": "a\u2028b\u0085c\x0cd"}}, ensure_ascii=False)

    assert query_trainer(command=(sys.executable, "-c", f"print({answer!r})")).error is not None


def test_a_planner_that_takes_long_is_waited_for_aloud(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody looks at a terminal without a word for minutes; the answer comes all the same."""
    monkeypatch.setattr(trainer_query, "SILENT_SECONDS", 0.05)
    program = "import time; time.sleep(1); print('{}')"

    assert query_trainer(command=(sys.executable, "-c", program)).error is None
    assert "still reading the model and the data, for 0s so far" in capfd.readouterr().err


def test_the_working_folder_is_no_place_to_import_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's json.py beside the job does not become Python's."""
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)

    assert query_trainer().machine is not None


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trainer's packages the extra to install is named."""
    monkeypatch.setattr(trainer_query, "TRAINER_PACKAGES", ("json", "no_such_package"))

    with pytest.raises(
        ProcessError, match=r"\(missing: no_such_package\); run pip install 'qlora-operator\[trainer\]'"
    ):
        trainer_query.require_trainer()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        pytest.param("", [], id="there already"),
        pytest.param("print('no compiler')", ["no compiler"], id="something to say"),
        pytest.param(
            "import time; time.sleep(0.5); print('made')",
            ["compiling the kernels, once for this installation: a minute or two", "made"],
            id="a while",
        ),
    ],
)
def test_kernels_are_compiled_aloud(program: str, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job of an installation waits for it, and its user knows for what."""
    monkeypatch.setattr(trainer_query, "COMPILING_SECONDS", 0.2 if said[1:] else 60.0)
    told: list[str] = []
    compile_kernels(told.append, (sys.executable, "-c", program))

    assert told == said
