"""What `qlora run` shows: live progress, and the result.

Drawn with rich.live rather than rich.progress: a job is one task at a time, of steps or of bytes, with a second line of
facts that a table of tasks has no place for. What stays is printed line by line: each stage with the time it took, and
a line of history every so many steps.
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

from qlora_contract.progress import ProgressReport, timeline_text
from qlora_contract.units import format_bytes, format_bytes_done, format_duration, now

PLAIN_SECONDS = 15.0
"""Between two lines of progress of one stage where there is no terminal."""
HISTORY_LINES = 25
"""About how many steps of a job get a line that stays."""
NOTABLE_SECONDS = 1.0
"""A stage that took less, and of which nothing is counted, gets no line on a terminal."""


class Display:
    """One job's progress: a live display on a terminal, else a line now and then.

    What is said stays, on a terminal above the live display with the time since the start, elsewhere with the time of
    day.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        clock: Callable[[], float] = time.monotonic,
        time_of_day: Callable[[], str] = now,
    ) -> None:
        self._console = console
        self._name = name
        self._clock = clock
        self._time_of_day = time_of_day
        self._started = clock()
        self._first = "Starting"
        self._report: ProgressReport | None = None
        self._stage = ""
        self._stage_began = self._said_at = self._started
        self._said = ""
        self._last_step = 0
        self._eval_loss: float | None = None
        self._live = (
            Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        )

    def starting(self, label: str) -> Self:
        """What happens first in the next stage, before there is any report."""
        self._first = label
        return self

    def __enter__(self) -> Self:
        self._report = None  # of the stage before
        self._stage, self._last_step = "", 0
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end_stage(self._report)
        if self._live:
            self._live.stop()

    def show(self, report: ProgressReport | None) -> None:
        """Show a report; None: there is none now, so the last one stays."""
        at, before = self._clock(), self._report
        self._report = report = report or before
        label = _label(report) if report else self._first
        if report is not None:
            self._say_step(report)
        if label != self._stage:
            self._end_stage(report)
            self._stage, self._stage_began = label, at
            if self._live is None:
                self._say_stage(report, at)
        if self._live:
            self._live.update(self._picture(report, at), refresh=True)
        elif at - self._said_at >= PLAIN_SECONDS or _newly_waiting(report, before):
            self._say_stage(report, at)

    def print(self, text: str) -> None:
        """Print a line that stays, as it is."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def _say(self, *parts: str) -> None:
        """Print a line that stays, with the time."""
        text, at = "  ".join(parts), self._clock()
        if self._live:
            self.print(f"{format_duration(at - self._started):>7}  {text}")
        elif text != self._said:
            self._said, self._said_at = text, at
            elapsed = format_duration(at - self._started)
            self.print(f"{self._time_of_day()} {self._name}: {text}  elapsed {elapsed}")

    def _say_step(self, report: ProgressReport) -> None:
        """A line for the newest step, if it is time for one."""
        if report.loss is None:
            self._last_step = report.step  # an attempt goes on from there
            return
        every = max(1, -(-report.total_steps // HISTORY_LINES))
        due = report.step // every > self._last_step // every or report.step == report.total_steps
        if due and report.step > self._last_step:
            self._last_step = report.step
            self._say("Training", *_step_facts(report), *([] if self._live else _standing_facts(report)))

    def _say_stage(self, report: ProgressReport | None, at: float) -> None:
        """A line of the stage as it is now."""
        self._say(self._stage, *(facts(report, at - self._stage_began) if report else []))

    def _end_stage(self, report: ProgressReport | None) -> None:
        """On a terminal a line of the stage that is over; elsewhere it had one when it began.

        Steps have lines of their own.
        """
        took = self._clock() - self._stage_began
        if self._live and self._stage not in ("", "Training") and took >= NOTABLE_SECONDS:
            loss = report.eval_loss if report else None
            evaluated = self._stage.startswith("Evaluating") and loss is not None and loss != self._eval_loss
            self._eval_loss = loss
            self._say(
                f"{self._stage} took {format_duration(took)}",
                *([f"eval loss {loss:.4f}"] if evaluated else []),
            )

    def _picture(self, report: ProgressReport | None, at: float) -> Group:
        """The live display: name, stage, bar and amount on one line, the other facts on the next.

        While it is not known how much there is to do, or nothing of it is done, the bar moves.
        """
        done, total = _done_and_total(report) if report else (0, 0)
        amount = _amount(report) if report else None
        row = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, None, 1, None):
            row.add_column(ratio=ratio, no_wrap=True)
        stage_seconds = at - self._stage_began
        row.add_row(
            Text(self._name, style="bold"),
            Text(self._stage, style="cyan"),
            ProgressBar(total=total or 100, completed=done, pulse=not (done and total), animation_time=at),
            Text(amount or format_duration(stage_seconds)),
        )
        rest = facts(report, stage_seconds)[amount is not None :] if report else []
        elapsed = f"elapsed {format_duration(at - self._started)}"
        return Group(row, Text("  ".join([*rest, elapsed]), style="dim"))


def _newly_waiting(report: ProgressReport | None, before: ProgressReport | None) -> bool:
    """Whether a transfer failed anew since the report before."""
    waiting = report.waiting if report else None
    return waiting is not None and waiting != (before.waiting if before else None)


def _label(report: ProgressReport) -> str:
    """What is being done: the work within a stage says it better than the stage."""
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
    done, total = _done_and_total(report)
    if work is not None and not total:
        return f"{done:,} {work.unit}" if done else None
    if not total or (work is None and report.bytes_total is None and report.stage != "Training"):
        return None
    if work is None and report.bytes_total is None:
        return f"step {done}/{total}"
    if work is None or work.unit == "bytes":
        counted = format_bytes_done(done, total)
    else:
        counted = f"{done:,}/{total:,} {work.unit}"
    return f"{100 * done // total} %  {counted}"


def facts(report: ProgressReport, seconds: float = 0.0) -> list[str]:
    """What is known of what is being done: first how much of it is done, then speed, losses and memory.

    Args:
        report: the newest.
        seconds: since this stage began, from which the time that it still takes follows.
    """
    standing = _standing_facts(report)
    if report.work is None and report.bytes_total is None and report.stage == "Training":
        return _step_facts(report) + standing
    amount, waiting = _amount(report), report.waiting
    done, total = _done_and_total(report) if amount else (0, 0)
    known = [amount] if amount else []
    if waiting is not None:
        known.append(printable(waiting))
    elif 0 < done < total and seconds >= NOTABLE_SECONDS:
        known.append(f"ETA {format_duration(seconds * (total - done) / done)}")
    return known + standing


def _step_facts(report: ProgressReport) -> list[str]:
    """What is known of the newest step."""
    known = [f"step {report.step}/{report.total_steps}"] if report.total_steps else []
    if report.loss is not None:
        known.append(f"loss {report.loss:.4f}")
    if report.eval_loss is not None:
        known.append(f"eval loss {report.eval_loss:.4f}")
    if report.learning_rate is not None:
        known.append(f"lr {report.learning_rate:.2e}")
    if report.tokens_per_second is not None:
        known.append(f"{report.tokens_per_second:.0f} tok/s")
    if report.eta_seconds is not None:
        known.append(f"ETA {format_duration(report.eta_seconds)}")
    return known


def _standing_facts(report: ProgressReport) -> list[str]:
    """What is true in every stage: memory, and the newest checkpoint."""
    known = []
    estimate = None if report.memory_estimate is None else f"estimate {format_bytes(report.memory_estimate)}"
    if report.memory_peak is not None:
        known.append(f"memory {format_bytes(report.memory_peak)}" + (f" ({estimate})" if estimate else ""))
    elif estimate is not None:
        known.append(f"memory {estimate}")
    if report.checkpoint is not None:
        known.append(f"checkpoint at step {report.checkpoint.step}")
    return known


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
    served = report.get("eval_loss_unquantized")
    if served is not None and report.get("base_eval_loss") != report.get("base_eval_loss_quantized"):
        lines.append(f"           {served:.4f} on the unquantized base, which most servers run")
    lines += [
        (
            f"trained    {report['steps']} steps, {report['tokens']:,} tokens in {format_duration(report['seconds'])}, "
            f"{report['tokens_per_second']:.0f} tokens/s with {report['world_size']} rank(s)"
        ),
        f"memory     {format_bytes(report['peak_memory_bytes'])} peak per rank",
    ]
    if timeline := report.get("timeline"):
        lines.append(f"time       {timeline_text({name: float(timeline[name]) for name in timeline})}")
    if report.get("not_bit_exact"):
        lines.append(f"resumed    not bit-exact: {report['not_bit_exact']}")
    return lines


def _improvement(report: dict[str, Any]) -> str:
    """The base model's losses, and the change in percent of the one that was trained on, the quantized base's."""
    base, quantized = report.get("base_eval_loss"), report.get("base_eval_loss_quantized")
    if base is not None and base == quantized:  # the base is not quantized
        return f", base model {base:.4f}: {_change(base, report['eval_loss'])} it"
    known = [
        f"{value:.4f} {name}"
        for value, name in ((base, "unquantized"), (quantized, "quantized"))
        if value is not None
    ]
    text = f", base model {' and '.join(known)}" if known else ""
    if quantized:
        text += f": {_change(quantized, report['eval_loss'])} the quantized base"
    return text


def _change(before: float, after: float) -> str:
    percent = 100 * (before - after) / before
    return f"{abs(percent):.1f} % {'below' if percent >= 0 else 'above'}"


def printable(text: str) -> str:
    """The text without control characters that a terminal would act on: data and logs may hold anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
