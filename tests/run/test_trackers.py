"""Trackers: their table, what they get, and what a failing one does to a run."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.run_folders import config, rows
from rlsloth.cli import main as cli
from rlsloth.cli.package_checks import package_checks
from rlsloth.errors import UserError
from rlsloth.run.run import Run
from rlsloth.run.trackers import TRACKERS


class LineTracker:
    """A tracker of these tests: one text file in the run folder."""

    name = "lines"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._file = (folder / "lines.txt").open("a")
        self._file.write(f"{config['steps']} steps\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(f"{step}: {metrics['reward']}\n")

    def close(self) -> None:
        self._file.close()


def test_an_entry_in_the_table_is_all_that_a_tracker_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "lines", LineTracker)
    run = Run.start(config(tmp_path / "run", trackers=["lines"]))
    run.log(1, {"reward": 0.5})
    run.finish({})
    assert (run.dir / "lines.txt").read_text() == "3 steps\n1: 0.5\n"
    assert (
        "--run.trackers lines" in {check.name: check.advice for check in package_checks()}["lines"]
    )


@pytest.mark.parametrize("command", ["grpo", "sft", "dpo", "eval"])
def test_an_unknown_tracker_is_refused_before_a_model_is_loaded(monkeypatch, capsys, command):
    monkeypatch.setattr("rlsloth.policy.policy.Policy.load", pytest.fail)
    assert cli.main([command, "--model.path", "model", "--run.trackers", "wandbb"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--run.trackers wandbb" in line
    assert "did you mean 'wandb'?" in line


def test_the_trackers_of_a_student_are_checked_before_its_teacher_samples(capsys):
    assert cli.main(["distill", "--student.run.trackers", "mlfow"]) == 2
    assert "did you mean 'mlflow'?" in capsys.readouterr().err


def test_a_run_refuses_an_unknown_tracker_and_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"--run\.trackers csv: .*tensorboard, wandb"):
        Run.start(config(tmp_path / "run", trackers=["csv"]))
    assert not (tmp_path / "run").exists()


def test_a_missing_tracker_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Run.start(config(tmp_path / "run", trackers=["wandb"]))
    # The failed start gave the lock back and left no run behind.
    Run.start(config(tmp_path / "run")).finish({})


def test_trackers_get_finite_values_and_may_fail(tmp_path, monkeypatch):
    logged: list[Any] = []

    class FakeRun:
        def log(self, metrics, step):
            if step == 2:
                raise ConnectionError("no route")
            logged.append((step, metrics))

        def finish(self):
            logged.append("finished")

    fake: Any = types.ModuleType("wandb")
    fake.init = lambda **kwargs: FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = Run.start(config(tmp_path / "run", trackers=["wandb"]))
    for step in run.steps(1, 3):
        run.log(step, {"reward": 0.5, "grad_norm": math.nan})
    run.finish({})
    assert len(logged) == 1
    assert logged[0][0] == 1
    assert logged[0][1]["reward"] == 0.5
    assert "grad_norm" not in logged[0][1]
    assert (
        "tracker wandb failed and is switched off (no route)" in (run.dir / "log.txt").read_text()
    )
    assert len(rows(run.dir)) == 3


def test_mlflow_resumes_its_run_and_renames_metrics(tmp_path, monkeypatch):
    calls: list[Any] = []
    fake: Any = types.ModuleType("mlflow")
    fake.set_experiment = lambda name: calls.append(("experiment", name))
    fake.log_params = lambda params: calls.append(("params", params["loss.name"]))
    fake.log_metrics = lambda metrics, step: calls.append((step, metrics["eval_pass_8"]))
    fake.end_run = lambda: calls.append("end")

    def start_run(run_id, run_name):
        calls.append(("start", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

    fake.start_run = start_run
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    run = Run.start(config(tmp_path / "run", trackers=["mlflow"]))
    run.log_eval(0, "", {"pass@8": 0.25})
    run.finish({})
    Run.start(config(tmp_path / "run", trackers=["mlflow"], resume=True)).finish({})
    assert calls == [
        ("start", None, "run"),
        ("params", "dapo"),
        (0, 0.25),
        "end",
        ("start", "abc", None),
        "end",
    ]
