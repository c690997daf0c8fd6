"""Curves as inline SVG, visible without a script.

Shapes are drawn in a 1000 × 1000 box that the page stretches. Labels are HTML next to it, so that
text keeps its size on every screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Points = Sequence[tuple[float, float]]
BOX = 1000
MAX_POINTS = 400
"""Longer curves are averaged to at most this many points."""
_SMOOTH_FROM = 12
"""Shorter curves are not smoothed."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve."""

    name: str
    points: Points
    """(step, value), by step."""
    low: Sequence[float] | None = None
    """Interval of each point, drawn as a bar, or as a band for a curve that is smoothed."""
    high: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """One diagram."""

    title: str
    lines: Sequence[Line]
    note: str = ""
    kind: Literal["line", "interval", "stack"] = "line"
    """line: raw points and a smoothed curve. interval: joined points with error bars. stack: filled
    areas that add up; its lines share their steps."""
    percent: bool = False
    from_zero: bool = True
    """Whether the axis includes 0."""


@dataclass(slots=True)
class Drawing:
    """A chart ready for the page."""

    title: str
    note: str
    latest: str
    paths: list[tuple[str, str]]
    """(CSS class, SVG path)."""
    legend: list[str]
    x_ticks: list[tuple[float, str]]
    """(per cent from the left, label)."""
    y_ticks: list[tuple[float, str]]
    """(per cent from the top, label)."""
    label: str
    """The chart in words, for screen readers."""
    data: dict[str, Any] = field(repr=False)
    """Data of the tooltip: steps, their positions in per cent, values of each curve as text."""


def draw(chart: Chart) -> Drawing:
    """Lay a chart out. Each line needs at least one point."""
    lines = [_thin(line) for line in chart.lines]
    steps = sorted({step for line in lines for step, _ in line.points})
    tops = _stack(lines) if chart.kind == "stack" else None
    x = _Scale(steps[0], steps[-1] if steps[-1] > steps[0] else steps[0] + 1)
    ticks = _ticks(*_range(chart, lines, tops))
    y = _Scale(ticks[0], ticks[-1])
    paths = []
    for index, line in enumerate(lines):
        if tops is not None:
            paths.append(
                (
                    f"area c{index}",
                    _area(x, y, line, tops[index], tops[index - 1] if index else None),
                )
            )
        elif chart.kind == "interval":
            paths += _interval_paths(x, y, line, index)
        else:
            paths += _line_paths(x, y, line, index)
    last = lines[0].points if chart.kind != "stack" else [(0, tops[-1][-1])] if tops else []
    return Drawing(
        title=chart.title,
        note=chart.note,
        latest=figure(_latest(last, chart.kind), chart.percent),
        paths=paths,
        legend=[line.name for line in lines] if len(lines) > 1 else [],
        x_ticks=[(x.at(tick) / 10, f"{tick:g}") for tick in _step_ticks(steps)],
        y_ticks=[(100 - y.at(tick) / 10, figure(tick, chart.percent)) for tick in ticks],
        label=_in_words(chart, lines),
        data={
            "at": [round(x.at(step) / 10, 2) for step in steps],
            "steps": [int(step) for step in steps],
            "lines": [_hover(line, steps, chart) for line in lines],
        },
    )


def figure(value: float, percent: bool = False) -> str:
    """A number for reading: three significant digits, k and M for thousands and millions."""
    if percent:
        text = f"{100 * value:.1f}"
        return f"{text.removesuffix('.0')}\N{NARROW NO-BREAK SPACE}%"
    if value < 0:
        return "\N{MINUS SIGN}" + figure(-value)
    size = value
    if size >= 999_500:
        return f"{value / 1e6:.3g}M"
    if size >= 9_995:
        return f"{value / 1e3:.3g}k"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e\N{MINUS SIGN}{-int(exponent)}"
    return f"{value:.4g}" if size >= 1000 else f"{value:.3g}"


def smooth(values: Sequence[float]) -> list[float]:
    """Gaussian average around each point, about a tenth of the curve wide.

    Centred, so that it does not lag behind; at the ends it averages the points that exist.
    """
    sigma = max(1.5, len(values) / 30)
    reach = math.ceil(3 * sigma)
    kernel = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
    smoothed = []
    for centre in range(len(values)):
        first, last = max(centre - reach, 0), min(centre + reach + 1, len(values))
        weights = kernel[first - centre + reach : last - centre + reach]
        total = sum(w * v for w, v in zip(weights, values[first:last], strict=True))
        smoothed.append(total / sum(weights))
    return smoothed


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float

    def at(self, value: float) -> float:
        return BOX * (value - self.low) / (self.high - self.low)


def _thin(line: Line) -> Line:
    """Average runs of neighbouring points of a curve longer than MAX_POINTS."""
    size = math.ceil(len(line.points) / MAX_POINTS)
    if size == 1:
        return line
    runs = [line.points[start : start + size] for start in range(0, len(line.points), size)]
    # Averages are drawn at the last step of their run, so that the curve ends where training did.
    points = [(run[-1][0], sum(value for _, value in run) / len(run)) for run in runs]
    return Line(line.name, points, _thin_bound(line.low, size), _thin_bound(line.high, size))


def _thin_bound(values: Sequence[float] | None, size: int) -> list[float] | None:
    if values is None:
        return None
    runs = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(run) / len(run) for run in runs]


def _stack(lines: Sequence[Line]) -> list[list[float]]:
    """Upper edge of each area."""
    tops: list[list[float]] = []
    below = [0.0] * len(lines[0].points)
    for line in lines:
        below = [base + value for base, (_, value) in zip(below, line.points, strict=True)]
        tops.append(below)
    return tops


def _range(
    chart: Chart, lines: Sequence[Line], tops: Sequence[Sequence[float]] | None
) -> tuple[float, float]:
    values = [value for line in lines for _, value in line.points]
    for line in lines:
        values += [*(line.low or []), *(line.high or [])]
    if tops is not None:
        values = list(tops[-1])
    low, high = min(values), max(values)
    if chart.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(high) or 1.0
        low, high = (low, high + pad) if chart.from_zero else (low - pad, high + pad)
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about four, that reach from at most low to at least high."""
    step = _round_up((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [
        round(index * step, 12) if step > 1e-9 else index * step for index in range(first, last + 1)
    ]


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= value * (1 - 1e-9)
    )


def _step_ticks(steps: Sequence[float]) -> list[float]:
    first, last = steps[0], steps[-1]
    if first == last:
        return [first]
    gap = max(_round_up((last - first) / 5), 1)
    inner = [i * gap for i in range(math.ceil(first / gap), math.floor(last / gap) + 1)]
    return [tick for tick in inner if float(tick).is_integer()]


def _line_paths(x: _Scale, y: _Scale, line: Line, index: int) -> list[tuple[str, str]]:
    steps = [step for step, _ in line.points]
    values = [value for _, value in line.points]
    long = len(values) >= _SMOOTH_FROM
    curve = smooth(values) if long else values
    paths = []
    if line.low is not None and line.high is not None:
        low, high = (smooth(line.low), smooth(line.high)) if long else (line.low, line.high)
        paths.append((f"band c{index}", _between(x, y, steps, high, low)))
    if long or len(values) == 1:
        paths.append((f"dots c{index}", _dots(x, y, steps, values)))
    paths.append((f"curve c{index}", _polyline(x, y, steps, curve)))
    return paths


def _interval_paths(x: _Scale, y: _Scale, line: Line, index: int) -> list[tuple[str, str]]:
    steps = [step for step, _ in line.points]
    values = [value for _, value in line.points]
    paths = [(f"curve thin c{index}", _polyline(x, y, steps, values))]
    if line.low is not None and line.high is not None:
        bars = [
            f"M{x.at(step):.1f} {BOX - y.at(low):.1f}V{BOX - y.at(high):.1f}"
            for step, low, high in zip(steps, line.low, line.high, strict=True)
        ]
        paths.append((f"bars c{index}", "".join(bars)))
    return [*paths, (f"dots big c{index}", _dots(x, y, steps, values))]


def _polyline(x: _Scale, y: _Scale, steps: Sequence[float], values: Sequence[float]) -> str:
    pairs = zip(steps, values, strict=True)
    return "M" + "L".join(f"{x.at(step):.1f} {BOX - y.at(value):.1f}" for step, value in pairs)


def _dots(x: _Scale, y: _Scale, steps: Sequence[float], values: Sequence[float]) -> str:
    # Strokes of no length with round ends: circles that stay round when the box is stretched.
    pairs = zip(steps, values, strict=True)
    return "".join(f"M{x.at(step):.1f} {BOX - y.at(value):.1f}h0" for step, value in pairs)


def _between(
    x: _Scale, y: _Scale, steps: Sequence[float], upper: Sequence[float], lower: Sequence[float]
) -> str:
    back = _polyline(x, y, list(reversed(steps)), list(reversed(lower)))
    return f"{_polyline(x, y, steps, upper)}L{back[1:]}Z"


def _area(
    x: _Scale, y: _Scale, line: Line, top: Sequence[float], below: Sequence[float] | None
) -> str:
    steps = [step for step, _ in line.points]
    return _between(x, y, steps, top, below if below is not None else [0.0] * len(top))


def _latest(points: Points, kind: str) -> float:
    values = [value for _, value in points]
    return smooth(values)[-1] if kind == "line" and len(values) >= _SMOOTH_FROM else values[-1]


def _hover(line: Line, steps: Sequence[float], chart: Chart) -> dict[str, Any]:
    values = dict(line.points)
    texts = [figure(values[step], chart.percent) if step in values else "" for step in steps]
    if chart.kind == "interval" and line.low is not None and line.high is not None:
        spans = {
            step: f" ({figure(low, chart.percent)} to {figure(high, chart.percent)})"
            for (step, _), low, high in zip(line.points, line.low, line.high, strict=True)
        }
        texts = [text + spans.get(step, "") for text, step in zip(texts, steps, strict=True)]
    return {"name": line.name, "values": texts}


def _in_words(chart: Chart, lines: Sequence[Line]) -> str:
    parts = [
        f"{line.name} from {figure(line.points[0][1], chart.percent)} "
        f"at step {line.points[0][0]:g} to {figure(line.points[-1][1], chart.percent)} "
        f"at step {line.points[-1][0]:g}"
        for line in lines
    ]
    return f"{chart.title}: {'; '.join(parts)}"
