"""Runs with variants of LoRA: they train, continue, and export the policy that they trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.grpo_runs import QUICK, Train, adapter, assert_same_run, rows, same
from helpers.supervised import PAIRS, SFT, command, make_folder, steps
from helpers.trained_runs import micro_batch, plain_logprobs, reopened
from rlsloth.cli import main as cli
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.policy.lora import dora_setting
from rlsloth.policy.policy import Policy

pytestmark = pytest.mark.slow

VARIANTS = {"rslora": "--lora.rslora true", "dora": "--lora.dora true"}
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
    card = (out / "README.md").read_text()
    assert "rank-stabilised scale" in card if variant == "rslora" else "DoRA" in card
    assert float(off.abs().mean()) <= min(0.02, float(moved.abs().mean()) / 2)


def test_an_exported_adapter_is_the_trained_one(variant: str, run: Path) -> None:
    out = Path(f"{variant} exported")
    assert cli.main(["export", str(run), "--to", "adapter", "--out", str(out)]) == 0
    assert same(adapter(run), load_file(out / "adapter_model.safetensors"))
    # vLLM does not serve a DoRA.
    assert ("vllm serve" in (out / "README.md").read_text()) == (variant == "rslora")


def test_its_adapter_can_be_continued(variant: str, run: Path, train: Train) -> None:
    more = ("--model.adapter", str(run / "adapter"), "--lora.dropout", "0", *KL.split(), *QUICK)
    folder = train(f"{variant} continued", *more)
    assert abs(rows(folder)[0]["kl"]) <= 1e-6  # the adapter is the reference
    assert adapter(folder).keys() == adapter(run).keys()
    config = (folder / "adapter" / "adapter_config.json").read_text()
    assert f'"use_{variant}": true' in config


def test_it_changes_what_is_learnt(variant: str, run: Path, train: Train) -> None:
    plain = train(f"{variant} plain", "--lora.dropout", "0", *KL.split(), *QUICK)
    first: Any = load_file(run / "checkpoints" / "step_00002" / "adapter.safetensors")
    other = load_file(plain / "checkpoints" / "step_00002" / "adapter.safetensors")
    assert not same({n: t for n, t in first.items() if n in other}, other, "lora_B")


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_dora_trains_on_examples(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    make_folder(tmp_path, sft=SFT, dpo=PAIRS)
    monkeypatch.chdir(tmp_path)
    assert command(name, name, "--lora.dora", "true", "--steps", "6") == 0
    said = capsys.readouterr().out
    assert "--lora.dora: adapted layers run on PEFT's own modules" in said
    assert command(name, name, "--lora.dora", "true", "--steps", "3", "--run.dir", "part") == 0
    resumed = ["--run.dir", "part", "--run.resume", "--steps", "6"]
    assert command(name, name, "--lora.dora", "true", *resumed) == 0
    whole, again = adapter(Path("run")), adapter(Path("part"))
    assert any("magnitude" in tensor for tensor in whole)
    assert same(whole, again)
    assert steps()[-1]["loss"] < steps()[0]["loss"]
    capsys.readouterr()
    assert command(name, name, "--run.dir", "part", "--run.resume", "--steps", "9") == 2
    assert "lora.dora is now False" in capsys.readouterr().err


REFUSED = {
    "--lora.dora true --rollout.engine vllm --lora.dropout 0": (
        "--rollout.engine vllm does not support --lora.dora",
        "pass --rollout.engine transformers",
    ),
    "--lora.dora true --lora.dropout 0.1": ("lora: dora with dropout 0.1", "leave dropout at 0"),
    "--lora.dora true --lora.dropout 0 --lora.targets all-linear lm_head": (
        "DoraLinearVariant",
        "leave the head out",
    ),
}


@pytest.mark.parametrize("options", REFUSED)
def test_refusals_of_dora(options: str, train: Train, capsys) -> None:
    train("refused", *options.split(), status=2)
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    for words in REFUSED[options]:
        assert words in line


def test_plans_with_dora_name_the_engine_and_the_weights(workplace: Path, capsys) -> None:
    plan = ["plan", "--model.path", "model", "--memory-gb", "8", "--longest-prompt", "20"]
    assert cli.main([*plan, "--lora.dora", "true"]) == 0
    said = capsys.readouterr().out
    assert "transformers (auto: vllm does not support --lora.dora)" in said
    assert "DoRA: weights of the largest layer" in said
    assert cli.main([*plan, "--lora.dora", "true", "--rollout.engine", "vllm"]) == 2
    assert "does not support --lora.dora" in capsys.readouterr().err


def test_a_dora_adapter_is_known_by_its_folder(tmp_path: Path) -> None:
    model = ModelConfig(adapter=tmp_path)
    assert dora_setting(LoraConfig(dora=True), model) == ""  # PEFT's folder decides
    (tmp_path / "adapter_config.json").write_text('{"use_dora": true}')
    assert str(tmp_path) in dora_setting(LoraConfig(), model)
    assert dora_setting(LoraConfig(dora=True), ModelConfig()) == "--lora.dora"
