"""A folder with a tiny model and data to learn from, and the command in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.cli import main as cli

WORDS = [chr(97 + i) for i in range(16)]
SFT = [{"question": f"say {w}", "answer": w * (3 + i % 4)} for i, w in enumerate(WORDS)]
PAIRS = [
    {"question": f"say {w}", "chosen": w * (3 + i % 4), "rejected": f"no {w}" * (1 + i % 3)}
    for i, w in enumerate(WORDS)
]
MARKED = [
    {"question": row["question"], "completion": row[side], "label": side == "chosen"}
    for i, row in enumerate(PAIRS)
    for side in (["chosen"] if i % 2 else ["rejected"])
]
CONFIG: dict[str, Any] = {
    "steps": 6,
    "samples_per_step": 5,
    "tokens_per_microbatch": 150,
    "model": {"path": "model"},
    "lora": {"rank": 4, "alpha": 8},
    "data": {"heldout": 3},
    "optim": {"lr": 0.01, "schedule": "constant"},
    "run": {"save_every": 3, "dir": "run"},
}


def make_folder(folder: Path, **files: Sequence[dict[str, Any]]) -> None:
    """``model``, and a JSON lines file of each name."""
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def command(name: str, data: str, *more: str) -> int:
    return cli.main([name, "c.yaml", "--data.train", f"{data}.jsonl", *more])


def metrics(run: Path | str = "run") -> list[dict[str, Any]]:
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps(run: Path | str = "run") -> list[dict[str, Any]]:
    return [row for row in metrics(run) if "learning_rate" in row]


def evaluations(run: Path | str = "run") -> list[dict[str, Any]]:
    return [row for row in metrics(run) if "eval_loss" in row]
