"""How a stage of `qlora run` ended: one exit code and one cause for all of its launchers."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_contract.exit_codes import ExitCode, dominant_exit_code
from qlora_contract.progress import TerminationReport
from qlora_operator.cli.job_folder import read_termination
from qlora_operator.cli.log_tail import last_lines
from qlora_operator.cli.processes import Launcher


@dataclass(frozen=True)
class Outcome:
    """How all launchers together ended."""

    code: int
    """The dominant one of the launchers' exit codes."""
    cause: str
    log: Path
    """Of the launcher that names the cause."""
    report: TerminationReport | None = None
    """Of the same one; None: it left none."""


def summarize(launchers: Sequence[Launcher]) -> Outcome:
    """The outcome of the launcher whose exit code best names the cause.

    Those that we ended ourselves count only if no other one failed.
    """
    failed = [launcher for launcher in launchers if launcher.process.returncode != 0]
    candidates = [launcher for launcher in failed if not launcher.ended_by_us] or failed or list(launchers)
    code = dominant_exit_code([launcher.process.returncode for launcher in candidates])
    culprit = next(
        launcher for launcher in candidates if dominant_exit_code([launcher.process.returncode]) == code
    )
    report = read_termination(culprit.report)
    cause = report.cause if report is not None else _describe_exit(culprit)
    return Outcome(code, cause, culprit.log, report)


def _describe_exit(launcher: Launcher) -> str:
    """The cause, as far as it is known when the launcher left no report."""
    code = launcher.process.returncode
    if launcher.ended_by_us:
        return f"launcher {launcher.index} did not stop in time and was killed"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = "; the machine may have run out of memory" if -code == signal.SIGKILL else ""
        return f"launcher {launcher.index} was killed by {name}{hint}"
    return (
        f"launcher {launcher.index} exited with code {code}: {last_lines(launcher.log) or 'it wrote nothing'}"
    )


def error_message(code: int, cause: str) -> str:
    """An exit code in words and its cause: `invalid data: docs.jsonl: line 3: ...`.

    Codes that are not the trainer's, and the one for unexpected errors, add nothing to the cause.
    """
    if code in set(ExitCode) - {ExitCode.UNEXPECTED}:
        return f"{ExitCode(code).name.lower().replace('_', ' ')}: {cause}"
    return cause
