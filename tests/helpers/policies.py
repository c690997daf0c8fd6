"""Policies on a tiny random Llama, and random groups to train on."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy
from rlsloth.policy.wrap.wrap import unwrapped
from rlsloth.records import Group, Prompt, Rollout

VOCAB = 97


def make_policy(
    temperature: float = 1.0,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    rank: int = 4,
    schedule: str = "constant",
    targets: list[str] | None = None,
    dropout: float = 0.0,
    tied: bool = False,
    adapter: Path | None = None,
    warmup_steps: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Policy:
    torch.manual_seed(0)
    attention.register()
    model = tiny_llama(VOCAB, tied=tied).to(dtype)
    model.requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    loaded = LoadedModel(model, tiny_tokenizer(), torch.device("cpu"), dtype)
    policy = Policy(
        loaded,
        ModelConfig(gradient_checkpointing=checkpointing, adapter=adapter),
        LoraConfig(rank=rank, targets=targets or ["all-linear"], dropout=dropout),
        OptimConfig(name=optimizer, schedule=schedule, warmup_steps=warmup_steps),
        temperature=temperature,
        total_updates=10,
    )
    if adapter is not None:
        return policy
    with torch.no_grad():  # PEFT starts B at zero, which would hide A's gradient
        for name, p in policy.weights().tensors.items():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    return policy


def make_groups(seed: int, groups: int = 3, group_size: int = 4) -> list[Group]:
    draw = random.Random(seed)
    made = []
    for g in range(groups):
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 9))]
        rollouts = []
        for _ in range(group_size):
            ids = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 12))]
            mask = [draw.random() < 0.8 for _ in ids]
            mask[draw.randrange(len(ids))] = True
            rollouts.append(
                Rollout(
                    token_ids=ids,
                    loss_mask=mask,
                    logprobs=[-draw.random() * 4 for _ in ids],
                    policy_version=[0] * len(ids),
                    finish="stop",
                    text="",
                    messages=[],
                    reward=draw.random(),
                    advantages=[draw.uniform(-2, 2)] * len(ids),
                )
            )
        made.append(Group(Prompt(g, "", {}), prompt, rollouts))
    return made


def one_by_one(policy: Policy, group: Group, rollout: Rollout, temperature: float) -> torch.Tensor:
    """Log-probs of a rollout's scored tokens by the stock model, attention and head."""
    base = policy.model.get_base_model()
    base.set_attn_implementation("eager")
    ids = torch.tensor([group.prompt_ids + rollout.token_ids])
    with unwrapped(policy.model):
        logits = policy.model(ids).logits[0].float() / temperature
    base.set_attn_implementation(attention.NAME)
    at = [len(group.prompt_ids) + j - 1 for j, on in enumerate(rollout.loss_mask) if on]
    scored = zip(rollout.token_ids, rollout.loss_mask, strict=True)
    targets = torch.tensor([t for t, on in scored if on])
    return logits[at].log_softmax(-1).gather(-1, targets[:, None])[:, 0]
