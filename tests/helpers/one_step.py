"""One step of `rlsloth grpo` on a tiny random model, to see that a plugin is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.cli import main as cli

OPTIONS = (
    "--model.path model --model.device cpu --env.heldout 2 --steps 1 --prompts-per-step 2 "
    "--group-size 2 --rollout.max-tokens 4 --reward.workers 1 --eval.at-start false "
    "--eval.at-end false --run.dir run"
)
QUESTIONS = "--env.train data.jsonl"


def make_place(folder: Path) -> None:
    """Write ``model``, and ``data.jsonl`` with eight questions and their answers."""
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"question": f"Question {i}?", "answer": str(i)} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def take_step(options: str) -> dict[str, Any]:
    """Train one step in the working directory with more options, and return its metrics."""
    assert cli.main(["grpo", *OPTIONS.split(), *options.split()]) == 0
    (row,) = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    return dict(row)
