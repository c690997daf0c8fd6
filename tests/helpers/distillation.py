"""Configuration of a distillation on a tiny model."""

from __future__ import annotations

from typing import Any

CONFIG: dict[str, Any] = {
    "rewards": ["./reward.py:letters"],
    "model": {"path": "model", "device": "cpu"},
    "env": {"train": "data.jsonl", "heldout": 4, "system_prompt": "Letters!"},
    "rollout": {"max_tokens": 16, "temperature": 0.9},
    "reward": {"workers": 1},
    "traces": {"samples": 4, "chunk": 4, "correct_at": 0.05},
}
