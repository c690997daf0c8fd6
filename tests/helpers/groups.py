"""Groups of rollouts to score, made from texts."""

from __future__ import annotations

from typing import Any

from rlsloth.records import Group, Prompt, Rollout


def make_group(*texts: str, index: int = 0, chat: bool = False, **columns: Any) -> Group:
    rollouts = [
        Rollout(
            token_ids=list(range(len(text))),
            loss_mask=[True] * len(text),
            logprobs=[0.0] * len(text),
            policy_version=[0] * len(text),
            finish="length" if text == "cut" else "stop",
            text=text,
            messages=[{"role": "assistant", "content": text}],
        )
        for text in texts
    ]
    asked = ({"role": "user", "content": "q"},) if chat else "q"
    return Group(Prompt(index, asked, columns), [], rollouts)
