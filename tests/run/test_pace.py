"""Speed of a run: the line after some steps, and the time left on each step's line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlsloth.config import EvalConfig, GrpoConfig
from rlsloth.run.pace import Pace
from rlsloth.run.run import Run

NEVER = EvalConfig(every=0, at_start=False, at_end=False)


def paced(total: int, seconds: list[float], tokens: float, cfg: EvalConfig = NEVER) -> Pace:
    pace = Pace(cfg)
    pace.begin(total)
    for n, each in enumerate(seconds, 1):
        pace.step(each, n * tokens)
    return pace


def test_the_first_step_does_not_count():
    pace = paced(501, [60.0, 6.0, 7.0, 7.4], 83_640)
    assert pace.line(4) == (
        "at 6.8 s a step (12,300 tokens/s) the remaining 497 steps take about 0.9 h"
    )
    assert pace.left(4) == pytest.approx(497 * 6.8)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_it_is_said_once(steps):
    assert paced(100, [1.0] * steps, 10).line(steps) is None


def test_nothing_is_said_where_nothing_is_left():
    assert paced(4, [1.0] * 4, 10).line(4) is None
    assert paced(4, [], 10).left(0) is None


def test_without_tokens_and_with_a_step_left():
    pace = Pace(NEVER)
    pace.begin(5)
    for _ in range(4):
        pace.step(0.25, None)
    assert pace.line(4) == "at 0.25 s a step the last step takes about 0 s"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.1, "10 s"), (2.0, "3 min"), (36.0, "1.0 h"), (360.0, "9.6 h")]
)
def test_durations(seconds, shown):
    line = paced(100, [9.0, seconds, seconds, seconds], 10).line(4)
    assert line is not None
    assert line.endswith(f"about {shown}")


def test_planned_evaluations_count_once_one_has_been_timed():
    cfg = EvalConfig(every=10, at_start=True, at_end=True)
    pace = paced(40, [9.0, 1.0, 1.0, 1.0], 10, cfg)
    assert pace.left(4) == pytest.approx(36.0)  # their time is not known
    pace.evaluation(0, 15.0)
    pace.evaluation(0, 5.0)  # another part of the same evaluation
    # After steps 10, 20 and 30, and at the end.
    assert pace.left(4) == pytest.approx(36.0 + 4 * 20.0)
    line = pace.line(4)
    assert line is not None
    assert "the remaining 36 steps and 4 evaluations take about 2 min" in line
    assert pace.left(10) == pytest.approx(30.0 + 4 * 20.0)
    pace.evaluation(10, 30.0)
    assert pace.left(10) == pytest.approx(30.0 + 3 * 30.0)


def test_a_run_says_it(tmp_path: Path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    settings: dict[str, Any] = {"steps": 12, "run": {"dir": str(tmp_path / "run")}}
    settings["eval"] = {"at_start": False, "at_end": False}
    with Run.start(GrpoConfig.model_validate(settings)) as run:
        for step in run.steps(3, 12):  # resumed: the first step of this process does not count
            now[0] += 100.0 if step == 3 else 2.0
            run.log(step, {"reward": 0.5, "num_tokens": 1000.0 * step})
    printed = capsys.readouterr().out
    line = "at 2.0 s a step (500 tokens/s) the remaining 6 steps take about 12 s"
    assert printed.count(line) == 1
    lines = printed.splitlines()
    at = lines.index(line)
    assert lines[at - 1].startswith("step 6/12 ")
    assert lines[at - 1].endswith("eta 0:00:12")
    assert line in (tmp_path / "run" / "log.txt").read_text()
