"""The run folder: locking, resuming, what is logged, and what survives a crash."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from helpers.run_folders import NAMES, config, make_group, make_rollout, rows
from rlsloth.config import GrpoConfig
from rlsloth.errors import UserError
from rlsloth.run import folder as run_folder
from rlsloth.run.progress import Display
from rlsloth.run.run import Run

# --- starting


def test_start_writes_a_config_that_loads_again(tmp_path):
    cfg = config(tmp_path / "run")
    with Run.start(cfg) as run:
        saved = yaml.safe_load((run.dir / "config.yaml").read_text())
        assert GrpoConfig(**saved) == cfg
        environment = json.loads((run.dir / "environment.json").read_text())
    assert environment["command"] == sys.argv
    assert environment["versions"]["torch"]
    assert environment["device"]["name"]


def test_new_folders_are_named_after_the_model_and_never_clash(tmp_path):
    runs = [Run.start(config(None), root=tmp_path) for _ in range(3)]
    assert len({run.dir for run in runs}) == 3
    assert all("SmolLM2-360M-Instruct" in run.dir.name for run in runs)
    for run in runs:
        saved = yaml.safe_load((run.dir / "config.yaml").read_text())
        assert saved["run"]["dir"] == str(run.dir)  # so that the saved file can be resumed
        run.finish({})


def test_existing_run_needs_resume(tmp_path):
    run = Run.start(config(tmp_path / "run"))
    run.log(1, {"reward": 0.5})
    run.finish({})
    with pytest.raises(UserError, match=r"--run\.resume, .*--run\.dir"):
        Run.start(config(tmp_path / "run"))
    Run.start(config(tmp_path / "run", resume=True)).finish({})


def test_a_start_that_failed_may_be_repeated(tmp_path):
    with pytest.raises(RuntimeError), Run.start(config(tmp_path / "run")):
        raise RuntimeError("the model did not load")
    Run.start(config(tmp_path / "run")).finish({})


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UserError, match=r"no run in .* leave out --run\.resume"):
        Run.start(config(tmp_path / "none", resume=True))
    with pytest.raises(UserError, match=r"needs --run\.dir"):
        Run.start(config(None, resume=True))


def test_folder_in_use_names_the_process(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    code = (
        "import sys; from pathlib import Path; from rlsloth.config import RunConfig, ModelConfig\n"
        "from rlsloth.run.folder import open_folder\n"
        f"held = open_folder(RunConfig(dir=Path({str(folder)!r})), ModelConfig(), Path('.'))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid}:"):
            Run.start(config(folder))
        holder.kill()
        holder.wait()
    Run.start(config(folder)).finish({})  # a killed process does not leave the folder locked


def test_a_changed_setting_is_named_on_resume(tmp_path, capsys):
    Run.start(config(tmp_path / "run")).finish({})
    cfg = config(tmp_path / "run", resume=True).model_copy(update={"steps": 9})
    with Run.start(cfg) as run:
        assert run.changes == {"steps": (3, 9)}
        run.accept_config()
    assert "steps: 3 -> 9" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["steps"] == 9


def test_a_refused_resume_leaves_the_saved_files(tmp_path):
    Run.start(config(tmp_path / "run")).finish({})
    saved = {name: (tmp_path / "run" / name) for name in ("config.yaml", "environment.json")}
    before = {name: path.read_bytes() for name, path in saved.items()}
    cfg = config(tmp_path / "run", resume=True).model_copy(update={"seed": 9})
    with pytest.raises(UserError), Run.start(cfg) as run:
        raise UserError(f"cannot change {list(run.changes)}")
    assert {name: path.read_bytes() for name, path in saved.items()} == before


def test_changes_are_those_of_values_and_not_of_the_folder(tmp_path):
    Run.start(config(tmp_path / "run")).finish({})
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    del saved["eval"]["samples"]  # written by a version that did not have it
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(saved))
    (tmp_path / "run").rename(tmp_path / "moved")
    cfg = config(tmp_path / "moved", resume=True)
    cfg = cfg.model_copy(update={"env": cfg.env.model_copy(update={"params": {"digits": 2}})})
    with Run.start(cfg) as run:
        assert run.changes == {"env.params.digits": (None, 2)}


def test_a_refused_start_leaves_no_folder_of_its_own(tmp_path, capsys):
    with pytest.raises(UserError), Run.start(config(tmp_path / "run")):
        raise UserError("no such model")
    assert not (tmp_path / "run").exists()
    assert "no such model" not in capsys.readouterr().out  # the command says it

    def train():
        with Run.start(config(tmp_path / "run")) as run:
            run.log(1, {"reward": 0.5})
            raise UserError("too many skipped steps")

    with pytest.raises(UserError, match="too many"):
        train()
    assert "stopped by UserError: too many" in (tmp_path / "run" / "log.txt").read_text()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError), Run.start(config(tmp_path / "mine")):
        raise UserError("no such model")
    assert (tmp_path / "mine" / "log.txt").exists()


# --- logging


def test_each_step_is_one_json_line_with_its_times(tmp_path, capsys):
    run = Run.start(config(tmp_path / "run"))
    for step in run.steps(1, 3):
        with run.timed("rollout"), run.timed("reward"):
            pass
        run.log(step, {"reward": 0.25, "grad_norm": math.nan, "loss": math.inf})
        with run.timed("eval"):
            pass
        run.log_eval(step, "held", {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6})
    run.finish({"accuracy_after": math.nan})
    logged = rows(run.dir)
    assert [row["step"] for row in logged] == [1, 1, 2, 2, 3, 3]
    assert logged[0]["reward"] == 0.25
    assert logged[0]["grad_norm"] is None
    assert logged[0]["loss"] is None
    times = {key: value for key, value in logged[2].items() if key.startswith("time/")}
    assert set(times) == {"time/rollout", "time/reward", "time/other"}
    assert logged[2]["step_time"] == pytest.approx(sum(times.values()))
    assert logged[1]["eval_held_accuracy"] == 0.5
    assert logged[1]["eval_held_runtime"] >= 0
    assert json.loads((run.dir / "summary.json").read_text()) == {"accuracy_after": None}
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("step ")][2].startswith(
        "step 3/3"
    )


def test_phases_are_exclusive_and_sum_to_the_step(monkeypatch, tmp_path):
    run = Run.start(config(tmp_path / "run"))
    now = [100.0]
    monkeypatch.setattr("rlsloth.run.clock.time.monotonic", lambda: now[0])
    for step in run.steps(1, 1):
        with run.timed("rollout"):
            now[0] += 5
            with run.timed("checkpoint"):
                now[0] += 2
            now[0] += 1
        now[0] += 0.5
        run.log(step, {})
    monkeypatch.undo()
    run.finish({})
    (row,) = rows(run.dir)
    assert row["time/rollout"] == 6
    assert row["time/checkpoint"] == 2
    assert row["time/other"] == 0.5
    assert row["step_time"] == 8.5


def test_resume_keeps_each_step_once(tmp_path):
    run = Run.start(config(tmp_path / "run"))
    for step in run.steps(1, 3):
        run.log(step, {"reward": float(step)})
        run.log_samples(step, [make_group(make_rollout(1.0, 0.0))], NAMES)
    run.finish({"done": True})
    with open(run.dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')  # torn by a crash

    run = Run.start(config(tmp_path / "run", resume=True))
    run.truncate_after(2)
    assert [row["step"] for row in rows(run.dir)] == [1, 2]
    assert list(run_folder.sample_files(run.dir)) == [1, 2]
    assert not (run.dir / "summary.json").exists()
    for step in run.steps(3, 3):
        run.log(step, {"reward": 30.0})
    run.finish({})
    assert [(row["step"], row["reward"]) for row in run.history()] == [(1, 1), (2, 2), (3, 30)]


def test_an_exception_leaves_a_report_and_a_free_folder(tmp_path):
    folder = tmp_path / "run"

    def train():
        with Run.start(config(folder)) as run:
            for step in run.steps(1, 3):
                run.log(step, {"reward": 0.5})
                raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        train()
    assert "stopped by KeyError" in (folder / "log.txt").read_text()
    report = (folder / "report.html").read_text()
    assert "not finished" in report
    assert "stopped by KeyError" in report
    Run.start(config(folder, resume=True)).finish({})


def test_say_and_warn_stay_one_line_and_harmless(tmp_path, capsys):
    with Run.start(config(tmp_path / "run")) as run:
        run.say("two\nlines [red]not markup[/red] \ud800")
        run.warn("careful \x1b[2J")
    lines = (run.dir / "log.txt").read_text().splitlines()
    assert lines[1].endswith("two lines [red]not markup[/red] \\ud800")
    assert "warning: careful" in lines[2]
    printed = capsys.readouterr().out
    assert "[red]not markup[/red]" in printed
    assert "\x1b" not in printed


def test_a_terminal_shows_a_bar_with_phase_and_time_left():
    shown_in = io.StringIO()
    console = Console(force_terminal=True, width=120, file=shown_in)
    display = Display(10, console)
    display.begin(5, 10)
    display.phase("rollout")
    display.step(5, {"reward": 0.25, "completions/clipped_ratio": 0.5})
    display.say("[bold]in between[/bold] \x1b[2J")
    display.step_done(5, 0.0)
    display.phase("update")
    display.stop()
    shown = shown_in.getvalue()
    for part in ("4/10", "5/10", "update", "reward 0.250", "cut 50%", "eta 0:00:00"):
        assert part in shown, part
    assert "[bold]in between[/bold]" in shown
    assert "\x1b[2J" not in shown


# --- files


def test_samples_have_trl_columns_and_hold_odd_text(tmp_path):
    odd = "lone \ud800 nul \x00 " + "x" * 2_000_000
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 ="})
    groups = [
        make_group(
            make_rollout(1.0, 0.0, text=odd),
            make_rollout(None, None, failure="timeout", finish="length"),
            index=41,
            messages=chat,
        )
    ]
    with Run.start(config(tmp_path / "run")) as run:
        run.log_samples(5, groups, NAMES)
    table = pq.read_table(run.dir / "samples" / "step_00005.parquet")
    assert table.column_names[:6] == [
        "step",
        "prompt",
        "completion",
        "correct",
        "tags",
        "advantage",
    ]
    first, second = table.to_pylist()
    assert first["step"] == 5
    assert first["completion"] == odd.replace("\ud800", "\\ud800")
    assert first["prompt"] == "[system]\nBe brief.\n\n[user]\n2 + 2 ="
    assert (first["correct"], first["tokens"], first["prompt_index"]) == (1.0, 3, 41)
    assert (second["correct"], second["finish"]) == (None, "length")
    assert second["failure"] == "correct: timeout over budget"


def test_a_reward_named_like_a_column_gets_its_own(tmp_path):
    with Run.start(config(tmp_path / "run")) as run:
        run.log_samples(1, [make_group(make_rollout(1.0, 0.5))], ["finish", "length"])
    (row,) = pq.read_table(run_folder.sample_file(run.dir, 1)).to_pylist()
    assert (row["finish"], row["rewards/finish"], row["length"]) == ("stop", 1.0, 0.5)
