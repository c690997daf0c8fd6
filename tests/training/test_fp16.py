"""Runs in float16: they learn as in float32, resume bit by bit, and export what they trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.grpo_runs import Train, adapter, assert_same_run, rows, same
from helpers.one_step import OPTIONS, QUESTIONS, make_place
from helpers.policies import make_groups
from helpers.supervised import PAIRS, SFT, command, make_folder, steps
from helpers.tiny import tiny_llama
from helpers.trained_runs import micro_batch, plain_logprobs, reopened
from rlsloth.cli import main as cli
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack
from rlsloth.errors import UserError
from rlsloth.policy.policy import Policy
from rlsloth.training.skips import Skips

pytestmark = pytest.mark.slow

HALF = ("--model.precision", "fp16")
REWARD = ("--rewards", "gsm8k_answer")
PLAIN = (*HALF, *["--lora.dropout", "0", "--updates-per-rollout", "1"])


@pytest.mark.parametrize("name", ["sft", "dpo", "orpo"])
def test_examples_are_learnt_as_in_float32(name: str, tmp_path: Path, monkeypatch) -> None:
    make_folder(tmp_path, sft=SFT, pairs=PAIRS)
    monkeypatch.chdir(tmp_path)
    data = "sft" if name == "sft" else "pairs"
    assert command(name, data, *HALF) == 0
    assert command(name, data, "--run.dir", "exact", "--model.precision", "fp32") == 0
    for half, exact in zip(steps(), steps("exact"), strict=True):
        assert half["loss"] == pytest.approx(exact["loss"], abs=0.02)
        assert half["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)


def test_grpo_resumes_bit_by_bit(train: Train) -> None:
    whole = train("fp16", *PLAIN)
    assert all(row["grad_norm"] > 0 for row in rows(whole))
    assert all(row["sampling/sampling_logp_difference/mean"] <= 0.01 for row in rows(whole))
    part = train("fp16 resumed", *PLAIN, "--steps", "4")
    train("fp16 resumed", *PLAIN, "--run.resume")
    assert_same_run(whole, part)
    assert same(adapter(whole), adapter(part))
    newest = sorted((whole / "checkpoints").iterdir())[-1]
    assert '"loss_scale": {"factor": 65536.0, "good": 6}' in "".join(
        file.read_text() for file in newest.glob("*.json")
    )


def save_overflowing_model(folder: Path) -> None:
    """Weights are within float16's range, the first MLP's output is not."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(30_000)
        model.model.layers[0].mlp.down_proj.weight.mul_(100_000)
    model.save_pretrained(folder)


def test_activations_beyond_float16_are_named_before_the_first_step(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    make_folder(tmp_path, sft=SFT)
    save_overflowing_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert command("sft", "sft", *HALF) == 2
    message = capsys.readouterr().err
    assert "NaN or infinite in float16" in message
    assert "--model.precision bf16 or fp32" in message
    assert command("sft", "sft", "--steps", "1") == 0


def test_grpo_names_them_as_well(tmp_path: Path, monkeypatch, capsys) -> None:
    make_place(tmp_path)
    save_overflowing_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["grpo", *OPTIONS.split(), *QUESTIONS.split(), *HALF, *REWARD]) == 2
    assert "activations exceed float16's largest value" in capsys.readouterr().err


def test_skipped_updates_count_once_the_factor_cannot_fall(tmp_path: Path) -> None:
    batch = pack(make_groups(0), 10_000, mask_truncated=False, keep_zero_advantage=True)
    said: list[str] = []
    run: Any = SimpleNamespace(dir=tmp_path, warn=said.append)
    skips = Skips(2, "bf16 or fp32")
    for step, scale in enumerate((4.0, 2.0, 1.0), 1):
        skips.check(True, batch, run, step, scale=scale)
    assert skips.in_a_row == 1
    assert "in fp16 the loss is scaled by 4 from now on" in said[0]
    assert "scaled" not in said[2]
    with pytest.raises(UserError, match=r"pass --model\.precision bf16 or fp32, or look at"):
        skips.check(True, batch, run, 4, scale=1.0)


def test_merged_weights_are_the_trained_policy(train: Train) -> None:
    run = train("fp16 to merge", *PLAIN, "--steps", "2")
    assert json.loads((run / "adapter" / "rlsloth.json").read_text())["base"]["precision"] == "fp16"
    out = Path("fp16 merged")
    assert (
        cli.main(["export", str(run), "--to", "merged", "--dtype", "f16", "--out", str(out)]) == 0
    )
    assert "fp16" in (out / "README.md").read_text()
    model = ModelConfig(path="model", device="cpu", adapter=run / "adapter", precision="fp32")
    trained = Policy.load(model, LoraConfig(), OptimConfig(), temperature=1.0, total_updates=1)
    off = plain_logprobs(reopened(out)) - trained.eval_logprobs(micro_batch())
    assert float(off.abs().mean()) <= 0.01
    assert load_file(out / "model.safetensors")
