"""A reward of your own, from Python: completions should be short and name the right sum.

    python examples/own_reward.py FOLDER_OR_GGUF [STEPS]

Writes its training rows next to the run folder, so that it needs no dataset from the hub.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlsloth.config import EnvConfig, EvalConfig, GrpoConfig, ModelConfig, RolloutConfig, RunConfig
from rlsloth.training.grpo import train

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
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = folder.with_suffix(".jsonl")
    sums = [(a, b) for a in range(10) for b in range(10)]
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in sums]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train(
        GrpoConfig(
            steps=steps,
            prompts_per_step=8,
            rewards=[f"{__file__}:short_and_right"],
            model=ModelConfig(path=model),
            env=EnvConfig(train=str(data), heldout=20),
            rollout=RolloutConfig(max_tokens=32),
            eval=EvalConfig(problems=20, samples=4, correct_at=0.5),
            run=RunConfig(dir=folder),
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20)
