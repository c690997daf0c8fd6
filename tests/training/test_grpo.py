"""GRPO as a user runs it: the command, a tiny random model in a folder, a reward from a file.

After a change that is meant to change figures:
REGENERATE_GOLDEN=1 pytest tests/training/test_grpo.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.grpo_runs import NO_EVAL, QUICK, Train, adapter, assert_same_run, rows, same
from rlsloth.cli import main as cli
from rlsloth.config import GrpoConfig
from rlsloth.errors import UserError
from rlsloth.policy.policy import Policy
from rlsloth.run.run import Run
from rlsloth.training import grpo, opening, session

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "grpo_tiny.json"
GOLDEN_METRICS = ("reward", "loss", "grad_norm", "entropy", "completions/mean_length")


# The same figures as ever


@pytest.mark.parametrize("loss", ["dapo", "gspo"])
def test_golden_metrics(loss: str, train: Train) -> None:
    # No dropout: its random numbers come from another library on another kind of CPU. A low rate:
    # rounding must not carry a token's ratio over the edge of the clip.
    flags = f"--loss.name {loss} --lora.dropout 0 --optim.lr 3e-4".split()
    folder = train(loss, *flags, *NO_EVAL)
    got = {name: [row[name] for row in rows(folder)] for name in GOLDEN_METRICS}
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("REGENERATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden | {loss: got}, indent=1) + "\n")
        return
    for name, want in golden[loss].items():
        assert got[name] == pytest.approx(want, rel=1e-4, abs=1e-5), name


def test_the_seed_fixes_a_run_and_another_changes_it(train: Train, whole: Path) -> None:
    torch.manual_seed(123)  # what happened before in the process plays no part
    torch.rand(7)
    assert_same_run(whole, train("again"))
    other = train("other seed", "--seed", "1", *QUICK)
    assert [r["reward"] for r in rows(other)] != [r["reward"] for r in rows(whole)[:2]]
    assert not same(adapter(other), adapter(whole), "lora_A")


# What a run leaves


def test_run_folder(whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} - {".lock"} == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "log.txt",
        "metrics.jsonl",
        "plan.json",
        "report.html",
        "samples",
        "summary.json",
    }
    assert [p.name for p in sorted((whole / "checkpoints").glob("step*"))] == [
        "step_00002",
        "step_00004",
        "step_00006",
    ]
    config = GrpoConfig.model_validate(yaml.safe_load((whole / "config.yaml").read_text()))
    assert config.optim.lr == 1e-3
    assert config.rollout.max_sequences == "auto"
    assert json.loads((whole / "plan.json").read_text())["max_sequences"] == 256  # on a CPU
    samples = pq.read_table(whole / "samples" / "step_00003.parquet").to_pylist()
    assert len(samples) == 16
    assert {r["step"] for r in samples} == {3}
    assert sum(r["letters"] for r in samples) / 16 == pytest.approx(rows(whole)[2]["reward"])


def test_metrics_of_every_step(whole: Path) -> None:
    for row in rows(whole):
        assert row["rewards/letters/failures"] == 0
        assert 0 < row["sampling/sampling_logp_difference/mean"] < 0.1  # dropout is in it
        assert row["skipped_updates"] == 0
        assert 0 < row["completions/clipped_ratio"] < 1
        assert {"time/rollout", "time/reward", "time/update", "step_time"} <= row.keys()
    assert [row["learning_rate"] for row in rows(whole)][1:] == [1e-3] * 5  # warmed up
    tokens = [row["num_tokens"] for row in rows(whole)]
    assert tokens == sorted(set(tokens))


def test_evaluations_and_summary(whole: Path) -> None:
    before, after = rows(whole, "eval_avg@4")
    assert (before["step"], after["step"]) == (0, 6)
    for row in (before, after):
        assert 0 < row["eval_avg@4"] <= row["eval_pass@4"] <= 1
        assert row["eval_avg@4_low"] <= row["eval_avg@4"] <= row["eval_avg@4_high"]
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary) >= {
        "accuracy_before",
        "accuracy_after",
        "interval_before",
        "interval_after",
        "problems",
        "steps",
        "seconds",
        "device",
    }
    assert summary["accuracy_before"] == before["eval_avg@4"]
    assert summary["interval_after"] == [after["eval_avg@4_low"], after["eval_avg@4_high"]]
    assert (summary["problems"], summary["steps"], summary["device"]) == (6, 6, "cpu")


def test_held_out_questions_never_train(whole: Path) -> None:
    trained = set()
    for file in (whole / "samples").glob("*.parquet"):
        trained |= set(pq.read_table(file)["prompt"].to_pylist())
    assert len(trained) == 24  # 6 steps of 4, from the 34 that are not held out, none twice


def test_evaluation_during_training(train: Train) -> None:
    folder = train("evaluated", "--eval.every", "1", "--eval.problems", "2", "--steps", "3")
    assert [row["step"] for row in rows(folder, "eval_avg@4")] == [0, 1, 2, 3]
    assert json.loads((folder / "summary.json").read_text())["problems"] == 2


def test_the_base_stays_as_it_was(train: Train, workplace: Path, monkeypatch) -> None:
    trained: list[Any] = []
    monkeypatch.setattr(session, "save_trained", lambda model, *_: trained.append(model))
    train("base", *QUICK)
    (model,) = trained
    base = model.unload().state_dict()
    saved = load_file(workplace / "model" / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(base[name], tensor), name


def test_the_adapter_is_a_peft_folder(whole: Path, workplace: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    ids = torch.arange(3, 20)[None]
    plain = base(ids).logits
    model = peft.PeftModel.from_pretrained(base, str(whole / "adapter"))
    assert (model(ids).logits - plain).abs().max() > 1e-3


# Evaluation alone


def test_eval_of_a_run(whole: Path, workplace: Path) -> None:
    """The base model and the adapter have the figures that the run itself logged."""
    assert cli.main(["eval", f"{whole}/config.yaml"]) == 0
    (folder,) = (workplace / "runs").iterdir()
    figures = json.loads((folder / "eval.json").read_text())
    before, after = rows(whole, "eval_avg@4")
    for name, row in (("base", before), ("adapter", after)):
        for key, value in figures[name].items():
            assert row[f"eval_{key}"] == pytest.approx(value, abs=1e-12), (name, key)
    value, low, high = figures["difference"]
    assert value == pytest.approx(after["eval_avg@4"] - before["eval_avg@4"])
    assert low <= value <= high
    names = [sorted(k for k in row if "avg@4" in k)[0] for row in rows(folder, "step")]
    assert names == ["eval_base_avg@4", "eval_adapter_avg@4"]
    assert len(rows(whole)) == 6  # the run's own folder is left alone


def test_the_trial_backward_is_for_training_alone(workplace: Path, monkeypatch, capsys) -> None:
    def refuse(policy: Policy) -> None:
        raise UserError("no backward")

    monkeypatch.setattr(opening, "trial_backward", refuse)
    Path("no trial").mkdir()
    eval_only = ["--run.dir", "no trial", "--eval.problems", "2"]
    assert cli.main(["eval", "config.yaml", *eval_only]) == 0
    assert cli.main(["grpo", "config.yaml", "--run.dir", "trial"]) == 2
    assert "error: no backward" in capsys.readouterr().err


def test_eval_of_a_base_alone(workplace: Path, capfd) -> None:
    (workplace / "eval alone").mkdir()
    assert cli.main(["eval", "config.yaml", "--run.dir", "eval alone", "--eval.problems", "3"]) == 0
    figures = json.loads((workplace / "eval alone" / "eval.json").read_text())
    assert set(figures) == {"base"}
    summary = json.loads((workplace / "eval alone" / "summary.json").read_text())
    assert summary["evaluated"].endswith(": base model, no adapter")
    printed = capfd.readouterr().out
    assert printed.index("base model, no adapter") < printed.index("evaluation base")


# Resuming


def test_resume_after_the_end(train: Train, whole: Path) -> None:
    folder = train("resumed", "--steps", "4")
    before = json.loads((folder / "summary.json").read_text())["accuracy_before"]
    assert train("resumed", "--run.resume") == folder
    assert_same_run(whole, folder)
    assert same(adapter(folder), adapter(whole))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["accuracy_before"] == before
    assert (summary["steps"], len(list((folder / "samples").iterdir()))) == (6, 6)
    assert "steps: 4 -> 6" in (folder / "log.txt").read_text()


def test_resume_after_a_kill(train: Train, whole: Path) -> None:
    """Killed in step 6, after the checkpoint of step 4: step 5 is forgotten and done again."""
    command = "-m rlsloth grpo config.yaml --run.dir killed --rewards ./fatal.py:letters"
    killed = subprocess.run(
        [sys.executable, *command.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        timeout=100,
    )
    assert killed.returncode == -signal.SIGKILL
    folder = whole.parent / "killed"
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5]
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step_00004"
    train("killed", "--run.resume", "--rewards", "./fatal.py:letters")
    assert_same_run(whole, folder)


def test_resume_after_an_interruption_without_a_checkpoint(
    train: Train, whole: Path, monkeypatch, capsys
) -> None:
    steps = iter([False, True])

    def interrupt(*arguments: Any) -> Any:
        if next(steps):
            raise KeyboardInterrupt
        return update(*arguments)

    update = grpo.update
    monkeypatch.setattr(grpo, "update", interrupt)
    train("interrupted", "--run.save_every", "0", status=130)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "rlsloth grpo interrupted/config.yaml --run.dir interrupted --run.resume" in said
    monkeypatch.setattr(grpo, "update", update)
    folder = whole.parent / "interrupted"
    assert [row["step"] for row in rows(folder)] == [1]
    command = "grpo interrupted/config.yaml --run.dir interrupted --run.resume"
    assert cli.main([*command.split(), "--run.save_every", "2"]) == 0
    assert_same_run(whole, folder)
    assert [row["step"] for row in rows(folder, "eval_avg@4")] == [0, 6]


def test_the_seconds_of_a_run_count_its_opening(train: Train, monkeypatch) -> None:
    begun: list[float] = []
    opened: list[Any] = []
    real_start, real_open = Run.start, opening.open_grpo

    def start(*arguments: Any) -> Any:
        begun.append(time.monotonic())
        return real_start(*arguments)

    def open_grpo(*arguments: Any) -> Any:
        opened.append(real_open(*arguments))
        return opened[-1]

    monkeypatch.setattr(Run, "start", start)
    monkeypatch.setattr(grpo, "open_grpo", open_grpo)
    train("seconds", *QUICK, "--steps", "1")
    assert opened[0].started < begun[0]
