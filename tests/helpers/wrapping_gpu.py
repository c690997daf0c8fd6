"""Decoding on a GPU, with and without CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

from rlsloth.policy.policy import Policy
from rlsloth.records import SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine

PROMPTS = [[3, 5, 7], [11] * 20, [13, 17], [23] * 9]


def decoder(policy: Policy, graphs: bool, rows: int) -> Callable[[], list[float]]:
    """Make a function that samples first tokens, and returns their log-probs."""
    engine = TransformersEngine(
        policy.model, policy.tokenizer, stop_ids=[1], context=4096, max_sequences=rows,
        device=policy.device, cuda_graphs=graphs,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=2, temperature=0.0)

    def decode() -> list[float]:
        out = engine.generate(PROMPTS, max(1, rows // len(PROMPTS)), sampling)
        return [x for completions in out for c in completions for x in c.logprobs]

    return decode
