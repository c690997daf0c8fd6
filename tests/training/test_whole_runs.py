"""Runs that train a model's own weights: learning, resuming, evaluating and exporting them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.grpo_runs import Train, rows, train, workplace
from rlsloth import RunResult
from rlsloth.cli import main as cli
from rlsloth.errors import UserError
from rlsloth.training.source import find_source

__all__ = ["train", "workplace"]
pytestmark = pytest.mark.slow

WHOLE = ("--model.trained", "all", "--lora.rank", "16", "--lora.dropout", "0")
LEARNING = ("--optim.lr", "2e-3", "--loss.beta", "0.01", "--updates-per-rollout", "1")


@pytest.fixture(scope="module")
def run(train: Train) -> Path:
    return train("all", *WHOLE, *LEARNING)


def test_it_learns(run: Path) -> None:
    steps = rows(run)
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.05
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)  # the first update's reference is the start
    assert steps[-1]["kl"] > 1e-3
    before, after = load_file("model/model.safetensors"), load_file(run / "model/model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert not (run / "adapter").exists()


def test_a_resumed_run_is_the_same(run: Path, train: Train) -> None:
    part = train("part", *WHOLE, *LEARNING, "--steps", "4")
    train("part", *WHOLE, *LEARNING, "--run.resume")
    last = Path("checkpoints/step_00006")
    for file in ("weights.safetensors", "optimizer.safetensors"):
        one, two = load_file(run / last / file), load_file(part / last / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert rows(run)[-1]["kl"] == rows(part)[-1]["kl"]


def test_it_is_evaluated_beside_its_base(
    run: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(run / "config.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "base model, and trained model" in printed
    folder = Path(printed.split("run folder ")[1].splitlines()[0])
    found = json.loads((folder / "eval.json").read_text())
    summary = RunResult(run).summary
    assert found["base"]["avg@4"] == pytest.approx(summary["accuracy_before"])
    assert found["trained"]["avg@4"] == pytest.approx(summary["accuracy_after"])
    assert found["difference"][0] > 0


@pytest.mark.parametrize("changed", ["--model.trained norm", "--model.path other"])
def test_other_weights_are_not_evaluated_as_the_runs(
    changed: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(run / "config.yaml"), *changed.split()]) == 2
    assert "all trained with model." in capsys.readouterr().err


def test_its_base_is_not_overwritten(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("model", "twice/model")
    train("twice", *WHOLE, "--model.path", "twice/model", status=2)
    assert "is where the run would write its trained model" in capsys.readouterr().err


def test_where_it_is_found(run: Path) -> None:
    found = find_source(str(run))
    assert find_source(str(run / "model")) == found
    assert (found.adapter, found.run, found.base.precision) == (None, run, "fp32")
    assert find_source("model").run is None  # config.yaml beside it is no run's


def test_it_is_exported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert RunResult(run).model == run / "model"
    with pytest.raises(UserError, match="no adapter"):
        _ = RunResult(run).adapter
    assert cli.main(["export", str(run), "--out", "adapter"]) == 2
    assert "trained the model's own weights, not an adapter; pass --to merged" in (
        capsys.readouterr().err
    )
    for more in (["--onto", "original"], ["--base", "model"]):
        assert cli.main(["export", str(run), "--to", "merged", "--out", "x", *more]) == 2
        assert more[0] in capsys.readouterr().err
    assert cli.main(["export", str(run), "--to", "merged", "--out", "merged"]) == 0
    trained = dict(AutoModelForCausalLM.from_pretrained(run / "model").named_parameters())
    merged = dict(AutoModelForCausalLM.from_pretrained("merged").named_parameters())
    assert all(torch.equal(merged[n], x.to(torch.bfloat16)) for n, x in trained.items())
    card = Path("merged/README.md").read_text()
    assert "| trained weights | all |" in card
    assert "Base: `model`" in card
    assert "rank" not in card


def test_a_resume_cannot_change_what_is_trained(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--run.dir", str(run), "--run.resume", "--steps", "8")
    assert cli.main(["grpo", "config.yaml", *more]) == 2
    assert "model.trained" in capsys.readouterr().err
