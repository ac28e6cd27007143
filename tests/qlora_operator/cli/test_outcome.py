"""How launchers ended, with real processes."""

from collections.abc import Callable

import pytest

from qlora_contract.exit_codes import ExitCode
from qlora_operator.cli.outcome import Outcome, error_message, summarize
from qlora_operator.cli.processes import Launcher

pytestmark = pytest.mark.process

Start = Callable[..., list[Launcher]]


def outcome_of(launchers: list[Launcher]) -> Outcome:
    """What became of launchers that end by themselves."""
    for launcher in launchers:
        launcher.process.wait()
    return summarize(launchers)


def test_the_cause_is_that_of_the_launcher_that_failed_first_hand(start_launchers: Start) -> None:
    """Bad data on one launcher explains the lost peer of the other."""
    outcome = outcome_of(
        start_launchers("report(11, 'line 3 is no JSON') if index else report(40, 'rank 1 is gone')")
    )

    assert (outcome.code, outcome.cause) == (ExitCode.INVALID_DATA, "line 3 is no JSON")
    assert outcome.log.name == "launcher-1.log"


def test_a_launcher_that_dies_without_a_word_is_named(start_launchers: Start) -> None:
    """A killed launcher's signal is the cause, and the code is the shell's."""
    launchers = start_launchers("import time; time.sleep(60) if index else report(40, 'rank 1 is gone')")
    launchers[1].process.kill()

    outcome = outcome_of(launchers)
    assert (outcome.code, outcome.cause) == (
        137,
        "launcher 1 was killed by SIGKILL; the machine may have run out of memory",
    )


def test_a_launcher_without_a_report_is_quoted(start_launchers: Start) -> None:
    """The last lines of its log stand for the cause."""
    outcome = outcome_of(start_launchers("print('reading'); sys.exit('no module named torch')", count=1))

    assert outcome.code == 1
    assert outcome.cause == "launcher 0 exited with code 1: reading\nno module named torch"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        pytest.param(11, "invalid data: c", id="a code of the contract"),
        pytest.param(1, "c", id="unexpected"),
        pytest.param(137, "c", id="a signal"),
    ],
)
def test_a_code_and_its_cause_make_a_sentence(code: int, text: str) -> None:
    """A known code stands before its cause in words; the others say nothing that the cause does not."""
    assert error_message(code, "c") == text
