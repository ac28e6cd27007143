"""What `qlora run` shows: live progress, and what came of it."""

import http.client
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

PLAIN_SECONDS = 5.0
"""Between two lines of progress where there is no terminal."""
FETCH_SECONDS = 1.0
MAX_REPORT_BYTES = 1 << 20


def fetch(port: int, job_uid: str, attempt: int) -> ProgressReport | None:
    """Rank 0's newest report; None while it gives none, or when somebody else answers at its port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=FETCH_SECONDS)
    try:
        connection.request("GET", "/progress")
        answer = connection.getresponse()
        report = ProgressReport.model_validate_json(answer.read(MAX_REPORT_BYTES))
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return report if (report.job_uid, report.attempt) == (job_uid, attempt) else None


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
        """Show a report; None: there is none now, so the last one stands."""
        now = self._clock()
        self._report = report = report or self._report
        if self._live:
            self._live.update(picture(self._name, report, now - self._started), refresh=True)
            return
        stage = report.stage if report else "Starting"
        line = "  ".join([f"{self._name}: {stage}", *(facts(report) if report else [])])
        if (stage, line) == self._shown or (stage == self._shown[0] and now - self._shown_at < PLAIN_SECONDS):
            return
        self._shown_at, self._shown = now, (stage, line)
        self.say(line)

    def say(self, text: str) -> None:
        """A line that stays, above the live display."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def picture(name: str, report: ProgressReport | None, elapsed: float) -> Group:
    """The live display: name, stage, bar and step on one line, the facts on the next."""
    done, total, of = _how_far(report)
    row = Table.grid(padding=(0, 1), expand=True)
    for ratio in (None, None, 1, None):
        row.add_column(ratio=ratio, no_wrap=True)
    bar = ProgressBar(total=total or 100, completed=done)
    row.add_row(
        Text(name, style="bold"),
        Text(report.stage if report else "Starting", style="cyan"),
        bar,
        Text(of if total else duration(elapsed)),
    )
    return Group(row, Text("  ".join(facts(report)[total > 0 :]) if report else "", style="dim"))


def _how_far(report: ProgressReport | None) -> tuple[int, int, str]:
    """(done, in all, both in words): of a transfer's bytes, or of the steps; 0 in all while that is not known."""
    if report is None:
        return 0, 0, ""
    if report.bytes_total is not None:
        done = report.bytes_done or 0
        return done, report.bytes_total, f"{size(done)} of {size(report.bytes_total)}"
    return report.step, report.total_steps, f"{report.step}/{report.total_steps}"


def facts(report: ProgressReport) -> list[str]:
    """What is known of the transfer or the training, how far it is first."""
    known = [
        (report.bytes_total, f"{size(report.bytes_done or 0)} of {size(report.bytes_total or 0)}"),
        (report.total_steps or None, f"step {report.step}/{report.total_steps}"),
        (report.loss, f"loss {report.loss:.4f}" if report.loss is not None else ""),
        (report.eval_loss, f"eval loss {report.eval_loss:.4f}" if report.eval_loss is not None else ""),
        (report.tokens_per_second, f"{report.tokens_per_second or 0:.0f} tok/s"),
        (report.eta_seconds, f"ETA {duration(report.eta_seconds or 0)}"),
        (report.memory_peak or report.memory_estimate, _memory(report)),
        (report.checkpoint, f"checkpoint at step {report.checkpoint.step}" if report.checkpoint else ""),
    ]
    return [text for value, text in known if value is not None]


def _memory(report: ProgressReport) -> str:
    peak, estimate = report.memory_peak, report.memory_estimate
    of = f" of estimated {size(estimate)}" if estimate is not None else ""
    return f"memory {size(peak)}{of}" if peak is not None else f"memory estimate {size(estimate or 0)}"


def result_lines(report: dict[str, Any], adapter: Path) -> list[str]:
    """What was achieved, from training_report.json."""
    lines = [f"adapter    {adapter}"]
    loss, base, quantised = (
        report.get(k) for k in ("eval_loss", "base_eval_loss", "base_eval_loss_quantized")
    )
    if loss is not None:
        lines.append(f"eval loss  {loss:.4f}{_improvement(loss, base, quantised)}")
    lines.append(
        f"trained    {report['steps']} steps, {report['tokens']:,} tokens in {duration(report['seconds'])}, "
        f"{report['tokens_per_second']:.0f} tokens/s with {report['world_size']} rank(s)"
    )
    lines.append(f"memory     {size(report['peak_memory_bytes'])} at most in a rank")
    if report.get("not_bit_exact"):
        lines.append(f"resumed    not bit-exact: {report['not_bit_exact']}")
    return lines


def _improvement(loss: float, base: float | None, quantised: float | None) -> str:
    """Beside the base's losses, and in percent of the one that the adapter was trained on, the quantised base's."""
    known = [
        f"{value:.4f} {name}"
        for value, name in ((base, "in fp32"), (quantised, "quantised"))
        if value is not None
    ]
    text = f", base {' and '.join(known)}" if known else ""
    if quantised:
        change = 100 * (quantised - loss) / quantised
        text += f": {abs(change):.1f} % {'below' if change >= 0 else 'above'} the quantised one"
    return text


def duration(seconds: float) -> str:
    """`9m 12s`, `2h 05m`, `3d 04h`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02}h"


def size(count: int) -> str:
    """Bytes as `1.21 GiB`."""
    return f"{count / 2**30:.2f} GiB"


def printable(text: str) -> str:
    """The text without what a terminal would obey: data and logs may hold anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
