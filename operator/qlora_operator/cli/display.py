"""What `qlora run` shows: live progress, and the result.

Drawn with rich.live rather than rich.progress: a job is one task at a time, of steps or of bytes, with a second line of
facts that a table of tasks has no place for.
"""

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_contract.progress import ProgressReport
from qlora_contract.units import format_bytes, format_bytes_done, format_duration

PLAIN_SECONDS = 5.0
"""Between two lines of progress where there is no terminal."""


class Display:
    """One job's progress: a live display on a terminal, else a line now and then."""

    def __init__(self, console: Console, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._name = name
        self._clock = clock
        self._started = clock()
        self._shown_at = self._started
        self._shown = ("", "")
        self._report: ProgressReport | None = None
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        self._report = None  # of the stage before
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, report: ProgressReport | None) -> None:
        """Show a report; None: there is none now, so the last one stays."""
        now = self._clock()
        self._report = report = report or self._report
        if self._live:
            self._live.update(render(self._name, report, now - self._started), refresh=True)
            return
        stage = _label(report)
        line = "  ".join([f"{self._name}: {stage}", *(facts(report) if report else [])])
        if (stage, line) == self._shown or (stage == self._shown[0] and now - self._shown_at < PLAIN_SECONDS):
            return
        self._shown_at, self._shown = now, (stage, line)
        self.print(line)

    def print(self, text: str) -> None:
        """Print a line that stays, above the live display."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def render(name: str, report: ProgressReport | None, elapsed: float) -> Group:
    """The live display: name, stage, bar and amount on one line, the other facts on the next.

    Args:
        name: of the job.
        report: the newest; None: there is none yet.
        elapsed: seconds, shown until the total amount of work is known.
    """
    done, total = _done_and_total(report) if report else (0, 0)
    amount = _amount(report) if report else None
    row = Table.grid(padding=(0, 1), expand=True)
    for ratio in (None, None, 1, None):
        row.add_column(ratio=ratio, no_wrap=True)
    row.add_row(
        Text(name, style="bold"),
        Text(_label(report), style="cyan"),
        ProgressBar(total=total or 100, completed=done),
        Text(amount or format_duration(elapsed)),
    )
    rest = facts(report)[amount is not None :] if report else []
    return Group(row, Text("  ".join(rest), style="dim"))


def _label(report: ProgressReport | None) -> str:
    """What is being done: the work within a stage says it better than the stage."""
    if report is None:
        return "Starting"
    return report.stage if report.work is None else printable(report.work.name).capitalize()


def _done_and_total(report: ProgressReport) -> tuple[int, int]:
    """How much of what is being done is done, and of how much; 0: unknown."""
    if report.work is not None:
        return report.work.done, report.work.total or 0
    if report.bytes_total is not None:
        return report.bytes_done or 0, report.bytes_total
    return report.step, report.total_steps


def _amount(report: ProgressReport) -> str | None:
    """How much is done, in the unit of the work, in bytes or in steps; None while the total is unknown."""
    work = report.work
    if work is not None and work.total is None:
        return f"{work.done:,} {work.unit}" if work.done else None
    done, total = _done_and_total(report)
    if report.bytes_total is not None or (work is not None and work.unit == "bytes"):
        return format_bytes_done(done, total)
    if work is not None:
        return f"{done:,}/{total:,} {work.unit}"
    return f"step {report.step}/{report.total_steps}" if report.total_steps else None


def facts(report: ProgressReport) -> list[str]:
    """What is known of the stage: first how much is done, then speed, losses and memory."""
    known: list[str | None] = [_amount(report)]
    if report.loss is not None:
        known.append(f"loss {report.loss:.4f}")
    if report.eval_loss is not None:
        known.append(f"eval loss {report.eval_loss:.4f}")
    if report.tokens_per_second is not None:
        known.append(f"{report.tokens_per_second:.0f} tok/s")
    if report.eta_seconds is not None:
        known.append(f"ETA {format_duration(report.eta_seconds)}")
    estimate = None if report.memory_estimate is None else f"estimate {format_bytes(report.memory_estimate)}"
    if report.memory_peak is not None:
        known.append(f"memory {format_bytes(report.memory_peak)}" + (f" ({estimate})" if estimate else ""))
    elif estimate is not None:
        known.append(f"memory {estimate}")
    if report.checkpoint is not None:
        known.append(f"checkpoint at step {report.checkpoint.step}")
    return [fact for fact in known if fact is not None]


def result_lines(report: dict[str, Any], adapter: Path) -> list[str]:
    """What a job has achieved, from training_report.json; the adapter alone where that is damaged."""
    lines = [f"adapter    {adapter}"]
    try:
        return lines + _training_lines(report)
    except (KeyError, TypeError, ValueError):
        return [*lines, "trained    (training_report.json is damaged)"]


def _training_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    if report.get("eval_loss") is not None:
        lines.append(f"eval loss  {report['eval_loss']:.4f}{_improvement(report)}")
    if (served := report.get("eval_loss_unquantized")) is not None:
        lines.append(f"           {served:.4f} on the unquantized base, which most servers run")
    lines += [
        (
            f"trained    {report['steps']} steps, {report['tokens']:,} tokens in {format_duration(report['seconds'])}, "
            f"{report['tokens_per_second']:.0f} tokens/s with {report['world_size']} rank(s)"
        ),
        f"memory     {format_bytes(report['peak_memory_bytes'])} peak per rank",
    ]
    if report.get("not_bit_exact"):
        lines.append(f"resumed    not bit-exact: {report['not_bit_exact']}")
    return lines


def _improvement(report: dict[str, Any]) -> str:
    """The base model's losses, and the change in percent of the one that was trained on, the quantized base's."""
    base, quantized = report.get("base_eval_loss"), report.get("base_eval_loss_quantized")
    known = [
        f"{value:.4f} {name}"
        for value, name in ((base, "unquantized"), (quantized, "quantized"))
        if value is not None
    ]
    text = f", base model {' and '.join(known)}" if known else ""
    if quantized:
        change = 100 * (quantized - report["eval_loss"]) / quantized
        text += f": {abs(change):.1f} % {'below' if change >= 0 else 'above'} the quantized base"
    return text


def printable(text: str) -> str:
    """The text without control characters that a terminal would act on: data and logs may hold anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
