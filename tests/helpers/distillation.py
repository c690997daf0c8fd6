"""Configuration of a distillation on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Distill = Callable[..., Path]
"""Runs the command with an output folder and flags; returns the dataset's file."""

CONFIG: dict[str, Any] = {
    "rewards": ["./reward.py:letters"],
    "model": {"path": "model", "device": "cpu"},
    "env": {"train": "data.jsonl", "heldout": 4, "system_prompt": "Letters!"},
    "rollout": {"max_tokens": 16, "temperature": 0.9},
    "reward": {"workers": 1},
    "traces": {"samples": 4, "chunk": 4, "correct_at": 0.05},
}


def raw(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "raw.jsonl").read_text().splitlines()]


def undated(problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in p.items() if key != "date"} for p in problems]
