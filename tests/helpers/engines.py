"""Embedded engines for a policy."""

from __future__ import annotations

from rlsloth.policy.policy import Policy
from rlsloth.rollout.embedded.engine import TransformersEngine


def engine_of(policy: Policy) -> TransformersEngine:
    return TransformersEngine(
        policy.model,
        policy.tokenizer,
        stop_ids=[1],
        context=policy.context,
        max_sequences=4,
        device=policy.device,
        transform=policy.logit_transform,
    )
