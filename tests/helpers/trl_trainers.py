"""TRL's preference trainers on a tiny policy, and a check of loss and gradients against them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig as PeftLora
from torch import Tensor

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack
from rlsloth.losses.preference.base import PreferenceOutput, metrics
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy
from rlsloth.records import Group, MicroBatch, Prompt, Rollout

RANK, ALPHA = 4, 8.0
TOLERANCE = 3e-5
Answer = tuple[list[int], list[bool]]
"""Token ids of a completion, and which are scored."""


def make_policy() -> Policy:
    attention.register()
    model = tiny_llama()
    model.requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    loaded = LoadedModel(model, tiny_tokenizer(), torch.device("cpu"), torch.float32)
    policy = Policy(
        loaded,
        ModelConfig(gradient_checkpointing=False),
        LoraConfig(rank=RANK, alpha=ALPHA),
        OptimConfig(name="adamw"),
        temperature=1.0,
        total_updates=1,
    )
    torch.manual_seed(1)
    with torch.no_grad():  # PEFT starts B at zero: no reward, and no gradient of A
        for name, p in policy.weights().tensors.items():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    return policy


def make_trainer(
    policy: Policy,
    trainer: Any,
    config: Any,
    rows: list[dict[str, Any]],
    folder: Path,
    **options: Any,
) -> Any:
    """A TRL trainer on the same base with the same adapter."""
    args = config(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=len(rows),
        **options,
    )
    lora = PeftLora(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    made = trainer(
        model=tiny_llama(),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=lora,
    )
    ours = policy.weights().tensors
    trained = {n: p for n, p in made.model.named_parameters() if p.requires_grad}
    assert trained.keys() == ours.keys()
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(ours[name])
    return made


def trl_step(trainer: Any) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """(loss, gradients, metrics) of all rows as one batch."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    stored = trainer._stored_metrics if hasattr(trainer, "_stored_metrics") else trainer._metrics
    return float(loss.detach()), gradients, {n: v[0] for n, v in stored["train"].items()}


def rollout(answer: Answer) -> Rollout:
    ids, mask = answer
    return Rollout(
        token_ids=ids,
        loss_mask=mask,
        logprobs=[0.0] * len(ids),
        policy_version=[-1] * len(ids),
        finish="stop",
        text="",
        messages=[],
    )


def make_groups(rows: list[tuple[list[int], list[Answer]]]) -> list[Group]:
    return [
        Group(Prompt(i, "", {}), prompt, [rollout(answer) for answer in answers])
        for i, (prompt, answers) in enumerate(rows)
    ]


def packed(groups: list[Group]) -> MicroBatch:
    (micro,) = pack(groups, 10**6, mask_truncated=False, keep_zero_advantage=True).microbatches
    return micro


def all_scored(ids: list[int]) -> Answer:
    return ids, [True] * len(ids)


def dpo_groups(trainer: Any) -> list[Group]:
    rows = trainer.train_dataset
    sides = ("chosen_ids", "rejected_ids")
    return make_groups([(r["prompt_ids"], [all_scored(r[s]) for s in sides]) for r in rows])


def labelled_groups(trainer: Any) -> list[Group]:
    """Rows for ORPO and CPO: prompt and completion joined, labels -100 over the prompt."""
    rows = []
    for row in trainer.train_dataset:
        sides = []
        for side in ("chosen", "rejected"):
            ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
            prompt = labels.count(-100)
            assert labels[prompt:] == ids[prompt:]
            sides.append((ids[:prompt], ids[prompt:]))
        (prompt, chosen), (same, rejected) = sides
        assert prompt == same
        rows.append((prompt, [all_scored(chosen), all_scored(rejected)]))
    return make_groups(rows)


def check(
    policy: Policy,
    groups: list[Group],
    loss: Callable[[list[Group]], PreferenceOutput],
    wanted: tuple[float, dict[str, Tensor], dict[str, float]],
    names: tuple[str, ...],
) -> None:
    stats = []
    for part in (groups[:1], groups[1:]):
        output = loss(part)
        output.total.backward()
        stats.append(output.stats)
    got = metrics(stats)
    value, gradients, figures = wanted
    assert got["loss"] == pytest.approx(value, rel=TOLERANCE)
    for name, p in policy.weights().tensors.items():
        assert p.grad is not None
        scale = gradients[name].abs().max()
        assert scale > 0
        assert (p.grad - gradients[name]).abs().max() <= TOLERANCE * scale, name
    for name in names:  # differences of sums: TRL's own float32 is no closer
        assert got[name] == pytest.approx(figures[name], rel=1e-3, abs=1e-5), name
