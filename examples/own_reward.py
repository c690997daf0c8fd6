"""A reward of your own, from Python: completions should be short and name the right sum.

    python examples/own_reward.py FOLDER_OR_GGUF [STEPS]

The command takes it, too: --rewards ./examples/own_reward.py:short_and_right
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import rlsloth

Messages = list[dict[str, Any]]


def short_and_right(completions: list[Messages], answer: list[str], **_: Any) -> list[float]:
    """1 for the right last word, minus a little for every word."""
    scores = []
    for completion, gold in zip(completions, answer, strict=True):
        words = completion[0]["content"].split()
        right = bool(words) and words[-1].strip(".") == gold
        scores.append(float(right) - 0.01 * len(words))
    return scores


def main(model: str, steps: int = 20, folder: Path = Path("runs/own_reward")) -> Path:
    """Train ``model`` on one-digit sums with the reward above; returns the run folder."""
    sums = [(a, b) for a in range(10) for b in range(10)]
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in sums]
    config = rlsloth.GrpoConfig(
        steps=steps,
        prompts_per_step=8,
        model=rlsloth.ModelConfig(path=model),
        env=rlsloth.EnvConfig(heldout=20),
        rollout=rlsloth.RolloutConfig(max_tokens=32),
        eval=rlsloth.EvalConfig(samples=4, correct_at=0.5),
        run=rlsloth.RunConfig(dir=folder),
    )
    return rlsloth.grpo(config, rewards=[short_and_right], data=rows).folder


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20)
