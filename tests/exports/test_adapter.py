"""Exported adapters: they run in plain PEFT, and damaged ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoTokenizer

from helpers.trained_runs import (
    Export,
    make_base,
    make_run,
    micro_batch,
    plain_logprobs,
    reopened,
    rewrite,
    scale_b,
)
from rlsloth.policy.identity import FILE, read_identity

pytestmark = pytest.mark.slow


def test_plain_peft_gives_the_trainers_logprobs(
    trained: tuple[Path, torch.Tensor], base: Path, export: Export
) -> None:
    run, want = trained
    out = export(run)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (plain_logprobs(model) - want).abs().max() <= 1e-5
    assert (plain_logprobs(reopened(base)) - want).abs().mean() > 0.05  # the adapter shows
    assert {p.name for p in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        FILE, "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == str(base)
    assert read_identity(out) == read_identity(run / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_an_exported_adapter_is_a_source_again(
    trained: tuple[Path, torch.Tensor], export: Export
) -> None:
    first = export(trained[0])
    second = export(first, out="second")
    assert same_files(
        first, second, "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"
    )
    merged = export(first, "--to", "merged", out="merged")
    assert (plain_logprobs(reopened(merged)) - trained[1]).abs().mean() <= 0.02


def same_files(one: Path, two: Path, *names: str) -> bool:
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_adapters_next_to_experts_fit(family: str, tmp_path: Path, export: Export) -> None:
    base = make_base(tmp_path / "base", family)
    policy = make_run(tmp_path / "run", base)
    want = policy.eval_logprobs(micro_batch())
    model = peft.AutoPeftModelForCausalLM.from_pretrained(
        export(tmp_path / "run"), dtype=torch.float32
    )
    assert (plain_logprobs(model) - want).abs().max() <= 1e-4


def test_weights_that_diverged_or_do_not_fit(run: Path, refused: Callable[..., None]) -> None:
    scale_b(run, float("nan"))
    refused(run, "--to", "merged", words=("merged weight model.layers.0", "NaN"))
    file = run / "adapter" / "adapter_model.safetensors"
    rewrite(file, lambda name, value: None if "layers.1.mlp.up_proj" in name else value)
    refused(run, words=("2 tensors are missing", "up_proj", "--base"))
    file.unlink()
    refused(run, words=("has no adapter_model.safetensors",))
