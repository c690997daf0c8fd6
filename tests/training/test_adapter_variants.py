"""Runs with variants of LoRA: they train, continue, and export the policy that they trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.grpo_runs import QUICK, Train, adapter, assert_same_run, rows, same
from helpers.trained_runs import micro_batch, plain_logprobs, reopened
from rlsloth.cli import main as cli
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.policy.policy import Policy

pytestmark = pytest.mark.slow

VARIANTS = {"rslora": "--lora.rslora true"}
"""Name of the option in ``lora`` -> its flag."""
KL = "--loss.beta 0.1 --loss.kl k3 --updates-per-rollout 1"


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(variant: str, train: Train) -> Path:
    """An undisturbed run of six steps with the variant."""
    return train(variant, *flags(variant))


def flags(variant: str) -> list[str]:
    return f"{VARIANTS[variant]} --lora.dropout 0 {KL}".split()


def policy(folder: Path) -> Policy:
    """Load the policy that a run has trained."""
    model = ModelConfig(path="model", device="cpu", adapter=folder / "adapter")
    return Policy.load(model, LoraConfig(), OptimConfig(), temperature=1.0, total_updates=1)


def test_it_trains_from_the_base_model(run: Path) -> None:
    first, *_, last = rows(run)
    assert abs(first["kl"]) <= 1e-6
    assert last["kl"] > 0
    for row in rows(run):
        assert row["grad_norm"] > 0
        assert row["sampling/sampling_logp_difference/mean"] <= 1e-4
    trained = policy(run)
    assert sum(float(p.abs().sum()) for n, p in named(trained, "lora_B")) > 0
    trained.model.eval()
    base = reopened(Path("model"))
    with trained.base_model():
        torch.testing.assert_close(
            trained.eval_logprobs(micro_batch()), plain_logprobs(base), rtol=0, atol=1e-4
        )


def named(policy: Policy, part: str) -> list[tuple[str, torch.Tensor]]:
    return [(n, p.detach()) for n, p in policy.weights().tensors.items() if part in n]


def test_it_resumes_bit_by_bit(variant: str, run: Path, train: Train) -> None:
    folder = train(f"{variant} resumed", *flags(variant), "--steps", "4")
    train(f"{variant} resumed", *flags(variant), "--run.resume")
    assert_same_run(run, folder)
    assert same(adapter(folder), adapter(run))


def test_merged_weights_are_the_trained_policy(variant: str, run: Path) -> None:
    out = Path(f"{variant} merged")
    assert cli.main(["export", str(run), "--to", "merged", "--out", str(out)]) == 0
    want = policy(run).eval_logprobs(micro_batch())
    moved = plain_logprobs(reopened(Path("model"))) - want
    off = plain_logprobs(reopened(out)) - want
    assert float(off.abs().mean()) <= min(0.02, float(moved.abs().mean()) / 2)


def test_its_adapter_can_be_continued(variant: str, run: Path, train: Train) -> None:
    more = ("--model.adapter", str(run / "adapter"), "--lora.dropout", "0", *KL.split(), *QUICK)
    folder = train(f"{variant} continued", *more)
    assert abs(rows(folder)[0]["kl"]) <= 1e-6  # the adapter is the reference
    assert adapter(folder).keys() == adapter(run).keys()
    config = (folder / "adapter" / "adapter_config.json").read_text()
    assert f'"use_{variant}": true' in config


def test_it_changes_what_is_learnt(variant: str, run: Path, train: Train) -> None:
    plain = train("plain", "--lora.dropout", "0", *KL.split(), *QUICK)
    first: Any = load_file(run / "checkpoints" / "step_00002" / "adapter.safetensors")
    other = load_file(plain / "checkpoints" / "step_00002" / "adapter.safetensors")
    assert not same({n: t for n, t in first.items() if n in other}, other, "lora_B")
