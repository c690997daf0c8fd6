"""Log-probs by transformers' own modules, to compare ours with."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsloth.policy.attention.interface import NAME
from rlsloth.policy.policy import Policy
from rlsloth.policy.wrap.wrap import unwrapped


@torch.no_grad()
def plain_logprobs(policy: Policy, prompt_ids: list[int], token_ids: list[int]) -> Tensor:
    """Score one completion with transformers' own modules, to compare ours with.

    Returns:
        [len(token_ids)] log-probs in nats at the sampling temperature, on the CPU.
    """
    policy.model.eval()
    base = policy.model.get_base_model()
    experts = getattr(base.config, "_experts_implementation", None)
    try:
        base.set_attn_implementation("eager")
        base.set_experts_implementation("eager")
        ids = torch.tensor([prompt_ids + token_ids], device=policy.device)
        with unwrapped(policy.model):
            logits = policy.model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    finally:
        base.set_attn_implementation(NAME)
        base.set_experts_implementation(experts)
    logprobs: Tensor = (logits[len(prompt_ids) - 1 : -1] / policy.temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(token_ids)[:, None])[:, 0]
