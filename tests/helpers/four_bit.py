"""A tiny model with rows for calibration, and ``rlsloth quantize`` on them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.tiny import tiny_tokenizer
from rlsloth.cli.main import main

LINEARS = 14
"""Number of linear layers of the tiny model."""


def make_folder(path: Path) -> Path:
    """Write a tiny model with tied embeddings, and rows for calibration."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    text = "The sum of 17 and 25 is 42, and the product of 3 and 4 is 12. "
    rows = [json.dumps({"text": f"{i} {text * 4}"}) for i in range(40)]
    (path / "rows.jsonl").write_text("\n".join(rows))
    return path


def quantize(folder: Path, out: Path, *more: str) -> int:
    words = ["--data.train", str(folder / "rows.jsonl"), "--samples", "8", "--tokens", "64"]
    return main(["quantize", str(folder / "model"), "--out", str(out), *words, "--device", "cpu",
                 *more])  # fmt: skip
