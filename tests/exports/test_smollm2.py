"""A real model, trained from a GGUF file, through every export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.smollm2 import gguf
from helpers.trained_runs import make_run, micro_batch, plain_logprobs
from rlsloth.cli import main as cli
from rlsloth.policy.policy import Policy

TEXT = "What is 1725 + 42? It's  12.5\n\n\tYes — naïve 日本語"


def trained(run: Path, precision: str) -> Policy:
    return make_run(run, gguf(), precision=precision, size=0.01)


def export(run: Path, to: str, out: Path, *flags: str) -> Path:
    assert cli.main(["export", str(run), "--to", to, "--out", str(out), *flags]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_merged_from_a_gguf(precision: str, tmp_path: Path) -> None:
    policy = trained(tmp_path / "run", precision)
    want = policy.eval_logprobs(micro_batch())
    template, ids = policy.tokenizer.chat_template, policy.tokenizer(TEXT)["input_ids"]
    with policy.base_model():
        base = policy.eval_logprobs(micro_batch())
    del policy
    out = export(tmp_path / "run", "merged", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    got = plain_logprobs(model)
    assert (got - want).abs().mean() <= 0.02
    assert (base - want).abs().mean() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer(TEXT)["input_ids"] == ids
    assert tokenizer.chat_template == template
    assert tokenizer.model_max_length == model.config.max_position_embeddings


@pytest.mark.gguf
@pytest.mark.slow
def test_gguf_files_and_modelfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check_gguf runs each of them in llama.cpp beside transformers."""
    trained(tmp_path / "run", "fp32")
    out = export(tmp_path / "run", "gguf", tmp_path / "sums", "--gguf", "q8_0", "q4_k_m")
    assert {p.name for p in out.iterdir()} == {
        "Modelfile", "README.md", "rlsloth.json", "sums-Q4_K_M.gguf", "sums-Q8_0.gguf",
    }  # fmt: skip
    assert json.loads((out / "rlsloth.json").read_bytes())["export"] == "gguf"
    assert (out / "Modelfile").read_text().startswith("FROM ./sums-Q8_0.gguf\n")
    said = capsys.readouterr().out
    assert said.count("nats from transformers'") == 2
    assert (out / "sums-Q4_K_M.gguf").stat().st_size < (out / "sums-Q8_0.gguf").stat().st_size
