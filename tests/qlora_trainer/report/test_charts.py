"""Line charts as SVG."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from qlora_trainer.report.charts import (
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    Chart,
    Limit,
    Line,
    svg,
    thinned,
    ticks,
)

HOSTILE = "</text><script>alert(1)</script>&\"'"


def drawing(chart: Chart) -> ET.Element:
    """The parsed figure."""
    return ET.fromstring(svg(chart))


TICKS: dict[str, tuple[float, float, dict[str, float | bool], list[float]]] = {
    "round numbers around the range": (1.7, 3.3, {}, [1.5, 2.0, 2.5, 3.0, 3.5]),
    "from zero": (0.0, 433.0, {}, [0.0, 100.0, 200.0, 300.0, 400.0, 500.0]),
    "small numbers": (0.0, 0.002, {}, [0.0, 0.0005, 0.001, 0.0015, 0.002]),
    "whole numbers": (0.0, 3.0, {"whole": True}, [0.0, 1.0, 2.0, 3.0]),
    "one value": (4.0, 4.0, {}, [2.0, 3.0, 4.0, 5.0, 6.0]),
    "zero alone": (0.0, 0.0, {}, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    "bytes": (0.0, 1.5 * 2**30, {"unit": 2**30}, [0.0, 0.5 * 2**30, 2**30, 1.5 * 2**30]),
}


@pytest.mark.parametrize(("low", "high", "how", "expected"), TICKS.values(), ids=TICKS)
def test_ticks_are_round_and_span_the_range(
    low: float, high: float, how: dict[str, float | bool], expected: list[float]
) -> None:
    """A few of them, the first at most the least value and the last at least the greatest."""
    assert ticks(low, high, **how) == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("exponent", range(-12, 13, 3))
def test_there_are_never_many_ticks(exponent: int) -> None:
    """Whatever the range: labels must not overlap."""
    for factor in (1.0, 1.7, 2.3, 4.9, 7.7, 9.99):
        high = factor * 10.0**exponent
        for low in (0.0, high * 0.3, high * 0.999, -high):
            found = ticks(low, high)

            assert 2 <= len(found) <= 8
            assert found[0] <= low + abs(high) * 1e-9
            assert found[-1] >= high * (1 - 1e-9)


def test_a_long_line_keeps_its_spikes() -> None:
    """It is thinned to what a screen shows, and neither the highest nor the lowest value goes."""
    points = [(float(step), math.sin(step / 50)) for step in range(100_000)]
    points[54_321], points[67_890] = (54_321.0, 99.0), (67_890.0, -99.0)
    kept = thinned(points)

    assert len(kept) <= MAX_POINTS
    assert kept == sorted(kept)
    assert {(54_321.0, 99.0), (67_890.0, -99.0)} <= set(kept)
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_everything_is_drawn_inside() -> None:
    """Lines, limits and marks, whatever the values, within the picture's box."""
    points = [(step, 1e9 * (-1) ** step / (step + 1)) for step in range(40)]
    figure = drawing(Chart("a", [Line("b", points, dots=True)], [Limit("c", 2e9)], marks=[10.0, 400.0]))
    numbers = [
        (float(circle.get("cx", "nan")), float(circle.get("cy", "nan"))) for circle in figure.iter("circle")
    ]

    assert len(numbers) == 40
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in numbers)
    assert [path.get("class") for path in figure.iter("path")].count(
        "mark"
    ) == 1  # the other lies beyond the steps


def test_names_are_escaped() -> None:
    """A title, a label or a limit cannot leave its element."""
    figure = drawing(Chart(HOSTILE, [Line(HOSTILE, [(1, 1), (2, 2)], dots=True)], [Limit(HOSTILE, 1.5)]))

    assert {element.tag for element in figure.iter()} <= {
        "figure", "figcaption", "p", "span", "svg", "path", "text", "circle", "title"
    }  # fmt: skip
    assert figure.findtext("figcaption") == HOSTILE


def test_what_is_no_number_is_left_out() -> None:
    """A loss that diverged is in metrics.jsonl, and a chart has no place for it."""
    chart = Chart("a", [Line("b", [(1, math.nan), (2, 1.0), (3, math.inf)])], [Limit("c", math.inf)])

    assert "nan" not in svg(chart)
    assert "inf" not in svg(chart)
    assert len(list(drawing(chart).iter("circle"))) == 1
    assert svg(Chart("a", [Line("b", [(1, math.nan)])])) == svg(Chart("a", [])) == ""


def test_the_legend_stands_outside_of_the_picture() -> None:
    """Where it hides nothing; each line and each limit has its key, the limit with its value."""
    figure = drawing(Chart("a", [Line("x", [(0, 1), (1, 2)])], [Limit("planned", 2.5)], text="{:.1f}".format))

    assert [span.text for span in figure.iter("span")] == ["x", "planned 2.5"]
    assert not re.search("planned", ET.tostring(figure.find("svg"), "unicode"))  # type: ignore[arg-type]
