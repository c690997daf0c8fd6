"""Log-probs and gradients of a policy on a GPU."""

from __future__ import annotations

import torch

from helpers.policies import make_groups
from rlsloth.data.packing import pack, to_device
from rlsloth.policy.policy import Policy

VOCAB = 97


def logprobs_and_gradient(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    batch = pack(make_groups(2), 400, mask_truncated=False, keep_zero_advantage=True)
    outs = []
    for micro in batch.microbatches:
        micro = to_device(micro, policy.device)
        out = policy.logprobs(micro).logprobs
        (out * micro.advantages).sum().backward()
        outs.append(out.detach())
    grads = [p.grad.flatten().float() for p in policy.weights().tensors.values()]
    return torch.cat(outs), torch.cat(grads)
