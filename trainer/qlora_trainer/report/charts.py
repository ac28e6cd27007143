"""Line charts as SVG, drawn by hand: a report has no script and no library.

Colors are classes of the page's style sheet, so that one drawing serves light and dark.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 38
MAX_POINTS = 600
"""Points of a line at most: more are narrower than a pixel."""
MARKED_POINTS = 60
"""A line of fewer points shows each as a dot."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    label: str
    points: Sequence[Point]
    dots: bool = False
    """Each point is measured apart, and shown."""


@dataclass(frozen=True)
class Limit:
    """A horizontal line to compare with."""

    label: str
    value: float


@dataclass(frozen=True)
class Chart:
    """A chart over the steps."""

    title: str
    lines: Sequence[Line]
    limits: Sequence[Limit] = ()
    marks: Sequence[float] = ()
    """Steps at which an attempt went on from a checkpoint."""
    text: Callable[[float], str] = "{:.4g}".format
    """A value as its axis shows it."""
    from_zero: bool = False
    binary: bool = False
    """Values are bytes: ticks at round numbers of binary units."""


def svg(chart: Chart) -> str:
    """The chart with its title and legend; empty without a single point."""
    lines = [Line(line.label, thinned(_finite(line.points)), line.dots) for line in chart.lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    limits = [limit for limit in chart.limits if math.isfinite(limit.value)]
    values = [y for _, y in points] + [limit.value for limit in limits]
    xs = ticks(min(x for x, _ in points), max(x for x, _ in points), whole=True)
    ys = ticks(
        0.0 if chart.from_zero else min(values),
        max(values),
        unit=_byte_unit(max(values)) if chart.binary else 1,
    )
    x_at = _scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    y_at = _scale(ys[0], ys[-1], HEIGHT - BOTTOM, TOP)
    parts = [*_grid(xs, ys, x_at, y_at, chart.text)]
    for mark in chart.marks:
        if xs[0] <= mark <= xs[-1]:
            parts.append(f'<path class="mark" d="M{x_at(mark):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    for number, limit in enumerate(limits):
        parts.append(f'<path class="limit l{number}" d="M{LEFT} {y_at(limit.value):.1f}H{WIDTH - RIGHT}"/>')
    for number, line in enumerate(lines):
        parts += _line(line, number, x_at, y_at, chart.text)
    label = escape(f"{chart.title} over the steps")
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    keys = [
        f'<span class="key s{n}">{escape(line.label)}</span>' for n, line in enumerate(lines) if line.points
    ]
    keys += [
        f'<span class="key limit l{n}">{escape(limit.label)} {escape(chart.text(limit.value))}</span>'
        for n, limit in enumerate(limits)
    ]
    if chart.marks:
        keys.append('<span class="key mark">went on from a checkpoint</span>')
    return f"<figure><figcaption>{escape(chart.title)}</figcaption><p>{''.join(keys)}</p>{drawing}</figure>"


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most so many of the points: of each run of them the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        run = points[start : start + size]
        ends = {min(run, key=lambda point: point[1]), max(run, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, *, whole: bool = False, unit: float = 1, count: int = 5) -> list[float]:
    """About so many round numbers that span the range, at least two.

    Args:
        low: the least value.
        high: the greatest.
        whole: none between whole numbers.
        unit: what they are round multiples of.
        count: how many there are, at most one more.
    """
    low, high = low / unit, high / unit
    if high - low <= max(abs(low), abs(high)) * 1e-9:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        if whole:
            low, high = math.floor(low), math.ceil(high)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step * unit for number in range(first, last + 1)]


def _finite(points: Iterable[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]


def _byte_unit(most: float) -> float:
    return float(next((size for size in (2**40, 2**30, 2**20, 2**10) if most >= size), 1))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _grid(
    xs: Sequence[float],
    ys: Sequence[float],
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
    text: Callable[[float], str],
) -> Iterable[str]:
    for y in ys:
        yield f'<path class="grid" d="M{LEFT} {y_at(y):.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 8}" y="{y_at(y) + 4:.1f}" text-anchor="end">{escape(text(y))}</text>'
    for x in xs:
        anchor = "end" if x == xs[-1] else "middle"
        yield f'<text x="{x_at(x):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="{anchor}">{x:,.0f}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">step</text>'


def _line(
    line: Line,
    number: int,
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
    text: Callable[[float], str],
) -> Iterable[str]:
    places = [(f"{x_at(x):.1f}", f"{y_at(y):.1f}", x, y) for x, y in line.points]
    if len(places) > 1:
        path = "L".join(f"{x} {y}" for x, y, _, _ in places)
        yield f'<path class="line s{number}" d="M{path}"/>'
    if line.dots or len(places) <= MARKED_POINTS:
        radius = 3.5 if line.dots else 1.8
        for x, y, step, value in places:
            title = escape(f"{line.label}, step {step:,.0f}: {text(value)}")
            yield f'<circle class="s{number}" cx="{x}" cy="{y}" r="{radius}"><title>{title}</title></circle>'
