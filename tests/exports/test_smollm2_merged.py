"""Models trained from GGUF files and exported as merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.gguf_models import make_folder
from helpers.smollm2 import gguf
from helpers.trained_runs import make_run, micro_batch, plain_logprobs
from rlsloth.cli import main as cli
from rlsloth.exports.gguf.write import write_gguf

pytestmark = pytest.mark.slow

TEXT = "What is 1725 + 42? It's  12.5\n\n\tYes — naïve 日本語"
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "nf4"])


def check_merged(file: Path, precision: str, tmp_path: Path, size: float) -> None:
    policy = make_run(tmp_path / "run", file, precision=precision, size=size)
    want = policy.eval_logprobs(micro_batch())
    template, ids = policy.tokenizer.chat_template, policy.tokenizer(TEXT)["input_ids"]
    with policy.base_model():
        base = policy.eval_logprobs(micro_batch())
    del policy
    out = tmp_path / "merged"
    assert cli.main(["export", str(tmp_path / "run"), "--to", "merged", "--out", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    got = plain_logprobs(model)
    assert (got - want).abs().mean() <= 0.02
    assert (base - want).abs().mean() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer(TEXT)["input_ids"] == ids
    assert tokenizer.chat_template == template
    assert tokenizer.model_max_length == model.config.max_position_embeddings


@PRECISIONS
def test_merged_from_a_gguf(precision: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "smollm", intermediate_size=128)
    write_gguf(folder, tmp_path / "model.gguf", "q8_0")
    check_merged(tmp_path / "model.gguf", precision, tmp_path, size=0.05)


@pytest.mark.long
@PRECISIONS
def test_smollm2(precision: str, tmp_path: Path) -> None:
    check_merged(gguf(), precision, tmp_path, size=0.01)
