"""Configuration and reward of a run that vLLM samples."""

from __future__ import annotations

from typing import Any

CONFIG: dict[str, Any] = {
    "steps": 5,
    "prompts_per_step": 2,
    "group_size": 4,
    "model": {"device": "cpu", "gradient_checkpointing": False, "max_context": 256},
    "env": {"name": "reasoning_gym:chain_sum", "params": {"min_terms": 2, "max_terms": 2}},
    "rewards": ["./reward.py:short"],
    "rollout": {"engine": "vllm", "max_tokens": 12, "max_sequences": 16},
    "reward": {"workers": 1},
    "eval": {"at_start": False, "at_end": False, "problems": 2, "samples": 2},
    "optim": {"lr": 1e-3},
    "run": {"save_every": 0, "show_samples": 0},
}
REWARD = """
def short(completions, **_): return [float(len(c[0]["content"])) for c in completions]
"""
