"""Where the time went: a bar for each attempt, drawn as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from qlora_contract.cost import AttemptRecord
from qlora_contract.units import format_duration, parse_time
from qlora_trainer.report.charts import ticks

WIDTH, LEFT, RIGHT, BAR, BOTTOM = 1150, 90, 20, 26, 34
MAX_BARS = 24
"""Attempts that are shown: the last ones."""
LATER = 1.0
"""Seconds: times of metrics.jsonl are whole."""

Kind = Literal["queue", "start", "steps", "lost", "end"]
LABELS: dict[Kind, tuple[str, str]] = {
    "queue": ("l0", "waiting for pods"),
    "start": ("l1", "starting"),
    "steps": ("s0", "training"),
    "lost": ("s1", "steps that were lost"),
    "end": ("s2", "evaluating, publishing, exporting"),
}
"""Class of the style sheet, and text."""


@dataclass(frozen=True)
class Span:
    """What an attempt did for a while. Times are in seconds, as `time.time` counts them."""

    kind: Kind
    start: float
    end: float


def spans_of(
    attempts: Sequence[AttemptRecord], metrics: Sequence[Mapping[str, Any]]
) -> list[tuple[int, list[Span]]]:
    """(number, spans) of each attempt whose time is known, in order.

    Args:
        attempts: attempts.json.
        metrics: the lines of metrics.jsonl. Those of steps that were lost are not in it any more.
    """
    steps = [
        (at, line)
        for line in metrics
        if line.get("loss") is not None and (at := _seconds(line.get("time"))) is not None
    ]
    found = []
    for each in attempts:
        began = _seconds(each.began)
        if began is None:
            continue
        end = began + max(0.0, each.seconds)
        own = [(at, line) for at, line in steps if began <= at <= end + LATER]
        # Where its steps begin and end; without any, all of it is the start.
        first = last = end
        after: Kind = "end"
        if own:
            took = own[0][1].get("seconds")
            begun = own[0][0] - (took if isinstance(took, int | float) else 0)
            first, last = min(max(begun, began), end), min(own[-1][0], end)
            killed = each.ended is None and each is not attempts[-1]
            after = "lost" if killed or (each.step or 0) > own[-1][1]["step"] else "end"
        elif each.step is not None and each.step > (each.first_step or 0):
            first, last, after = began, began, "lost"
        elif (each.ended or "").startswith("exported "):
            first = last = began
        spans = [
            Span("queue", began - max(0.0, each.queue_seconds or 0.0), began),
            Span("start", began, first),
            Span("steps", first, last),
            Span(after, last, end),
        ]
        found.append((each.attempt, [span for span in spans if span.end > span.start]))
    return found


def svg(attempts: Sequence[AttemptRecord], metrics: Sequence[Mapping[str, Any]]) -> str:
    """The bars with their legend; empty where no attempt has a time. Arguments as of `spans_of`."""
    bars = [(number, spans) for number, spans in spans_of(attempts, metrics) if spans][-MAX_BARS:]
    if not bars:
        return ""
    zero = min(span.start for _, spans in bars for span in spans)
    whole = max(span.end for _, spans in bars for span in spans) - zero
    if not math.isfinite(whole):
        return ""
    unit, name = next(((size, name) for size, name in _UNITS if whole >= 2 * size), _UNITS[-1])
    marks = ticks(0.0, whole, unit=unit)
    height = BAR * len(bars) + BOTTOM

    def x_at(seconds: float) -> float:
        return LEFT + seconds / marks[-1] * (WIDTH - LEFT - RIGHT)

    parts = []
    for mark in marks:
        at = f"{x_at(mark):.1f}"
        parts.append(f'<path class="grid" d="M{at} 0V{height - BOTTOM}"/>')
        parts.append(
            f'<text x="{at}" y="{height - BOTTOM + 17}" text-anchor="middle">{mark / unit:g} {name}</text>'
        )
    for row, (number, spans) in enumerate(bars):
        y = row * BAR
        parts.append(f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">attempt {number}</text>')
        for span in spans:
            style, label = LABELS[span.kind]
            x, width = x_at(span.start - zero), x_at(span.end) - x_at(span.start)
            title = escape(f"{label}: {format_duration(span.end - span.start)}")
            # Never thinner than can be seen.
            parts.append(
                f'<rect class="{style}" x="{x:.1f}" y="{y + 4}" width="{max(width, 1):.1f}" height="{BAR - 8}">'
                f"<title>{title}</title></rect>"
            )
    shown = {span.kind for _, spans in bars for span in spans}
    keys = "".join(
        f'<span class="key {style}">{escape(label)}</span>'
        for kind, (style, label) in LABELS.items()
        if kind in shown
    )
    drawing = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Timeline">{"".join(parts)}</svg>'
    return f"<figure><p>{keys}</p>{drawing}</figure>"


_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def _seconds(text: Any) -> float | None:
    try:
        return parse_time(text).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None
