"""Charts of report.html: drawn values, averages, smoothing and figures."""

from __future__ import annotations

import re

import pytest

from rlsloth.run.report.charts import MAX_POINTS, Chart, Line, draw, figure, smooth
from rlsloth.run.report.samples import evenly
from rlsloth.run.report.sections import chart_sections


def test_long_curves_are_thinned_by_averaging():
    points = [(float(step), float(step % 2)) for step in range(1, 4 * MAX_POINTS + 1)]
    drawing = draw(Chart("x", [Line("x", points)]))
    assert len(drawing.data["steps"]) == MAX_POINTS
    assert drawing.data["steps"][-1] == 4 * MAX_POINTS
    assert set(drawing.data["lines"][0]["values"]) == {"0.5"}


@pytest.mark.parametrize(
    "values", [[0.0], [3.0], [-2.0, -2.0], [1e-9, 2e-9], [1e12, -1e12], [0.0] * 30, [5e-324, 1.0]]
)
@pytest.mark.parametrize("from_zero", [True, False])
def test_any_values_can_be_drawn(values, from_zero):
    points = [(float(step), value) for step, value in enumerate(values)]
    drawing = draw(Chart("x", [Line("x", points)], from_zero=from_zero))
    assert 2 <= len(drawing.y_ticks) <= 12
    numbers = [float(n) for _, path in drawing.paths for n in re.findall(r"-?[\d.]+", path)]
    assert all(-1 <= number <= 1001 for number in numbers)


def test_stacked_areas_add_up():
    lines = [Line("a", [(1.0, 2.0), (2.0, 2.0)]), Line("b", [(1.0, 3.0), (2.0, 1.0)])]
    drawing = draw(Chart("t", lines, kind="stack"))
    assert drawing.latest == "3"
    assert drawing.paths[1][1].startswith("M0.0 166.7L1000.0 500.0")  # 5 and 3 of an axis to 6


def test_smoothing_keeps_constants_and_does_not_lag():
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    line = [float(i) for i in range(100)]
    assert smooth(line)[50] == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.12345, "0.123"),
        (-0.5, "\N{MINUS SIGN}0.5"),
        (2e-5, "2e\N{MINUS SIGN}5"),
        (1234.0, "1234"),
        (12345.0, "12.3k"),
        (2_500_000.0, "2.5M"),
    ],
)
def test_figures_are_readable(value, text):
    assert figure(value) == text


def test_evenly_includes_both_ends():
    assert evenly(3, 8) == [0, 1, 2]
    assert evenly(100, 5) == [0, 25, 50, 74, 99]


def test_dull_charts_are_left_out():
    rows = [{"step": s, "entropy": 1.0, "learning_rate": 1e-5, "kl": None} for s in range(1, 4)]
    titles = [chart.title for _, charts in chart_sections(rows) for chart in charts]
    assert titles == ["Entropy"]
