"""Losses and gradients of all LoRA weights against TRL's preference trainers, on a tiny model.

Both sides score the very token ids that TRL's trainer made of the rows: TRL as one padded batch, we
as two packed micro-batches of one step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from torch import Tensor

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack
from rlsloth.losses.preference.base import (
    LabelledLogps,
    Normalizer,
    PreferenceOutput,
    metrics,
    normalizer,
    pair_logps,
    score_prompts,
)
from rlsloth.losses.preference.dpo import dpo_loss
from rlsloth.losses.preference.kto import kl_baseline, kto_loss
from rlsloth.losses.preference.methods import (
    DpoLossConfig,
    KtoLossConfig,
    OrpoLossConfig,
    SimpoLossConfig,
)
from rlsloth.losses.preference.orpo import orpo_loss
from rlsloth.losses.preference.simpo import simpo_loss
from rlsloth.losses.ratio import rollout_sum
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy
from rlsloth.records import Group, MicroBatch, Prompt, Rollout

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

pytestmark = pytest.mark.slow

RANK, ALPHA = 4, 8.0
TOLERANCE = 3e-5
ROWS = [
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5, I think, or 6"},
    {"prompt": "Name a colour of the sky:", "chosen": " blue, mostly", "rejected": " x"},
    {"prompt": "a", "chosen": "bcdefghijklmnop", "rejected": "b"},
    {"prompt": "To be or not", "chosen": " to be.", "rejected": " to bee?"},
]
UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row, side in zip([*ROWS, ROWS[0]], ["chosen", "rejected"] * 2 + ["chosen"], strict=True)
]
NAMES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
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


DPO = {
    "sigmoid": DpoLossConfig(),
    "sigmoid_norm": DpoLossConfig(name="sigmoid_norm", beta=2.0),
    "ipo": DpoLossConfig(name="ipo", beta=0.3),
    "hinge": DpoLossConfig(name="hinge"),
    "robust": DpoLossConfig(name="robust", label_smoothing=0.2),
    "apo_zero": DpoLossConfig(name="apo_zero", beta=0.5),
    "apo_down": DpoLossConfig(name="apo_down"),
    "sft": DpoLossConfig(sft_weight=0.7),
}


@pytest.mark.parametrize("cfg", DPO.values(), ids=DPO)
def test_dpo_trainer(cfg: DpoLossConfig, tmp_path: Path) -> None:
    policy = make_policy()
    sft = {"loss_type": [cfg.name, "sft"], "loss_weights": [1.0, cfg.sft_weight]}
    trainer = make_trainer(
        policy,
        trl.DPOTrainer,
        trl.DPOConfig,
        ROWS,
        tmp_path,
        beta=cfg.beta,
        label_smoothing=cfg.label_smoothing,
        **(sft if cfg.sft_weight else {"loss_type": cfg.name}),
    )
    groups = dpo_groups(trainer)

    def loss(part: list[Group]) -> PreferenceOutput:
        micro = packed(part)
        reference_N = policy.reference_logprobs(micro)
        logps = pair_logps(policy.logprobs(micro).logprobs, micro, reference_N)
        return dpo_loss(logps, cfg, normalizer(groups))

    check(policy, groups, loss, trl_step(trainer), (*NAMES, "rewards/accuracies"))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_trainer(beta: float, tmp_path: Path) -> None:
    policy = make_policy()
    trainer = make_trainer(policy, ORPOTrainer, ORPOConfig, ROWS, tmp_path, beta=beta)
    groups = labelled_groups(trainer)

    def loss(part: list[Group]) -> PreferenceOutput:
        micro = score_prompts(packed(part))
        logps = pair_logps(policy.logprobs(micro).logprobs, micro)
        return orpo_loss(logps, OrpoLossConfig(beta=beta), normalizer(groups, nll_prompt=True))

    own = ("rewards/accuracies", "nll_loss", "log_odds_ratio", "log_odds_chosen")
    check(policy, groups, loss, trl_step(trainer), (*NAMES, *own))


SIMPO = {
    "defaults": SimpoLossConfig(),
    "paper": SimpoLossConfig(beta=2.0, gamma=1.0, nll_weight=0.0),
    "smoothed": SimpoLossConfig(beta=2.5, gamma=0.5, nll_weight=0.3, label_smoothing=0.1),
}


@pytest.mark.parametrize("cfg", SIMPO.values(), ids=SIMPO)
def test_simpo_trainer(cfg: SimpoLossConfig, tmp_path: Path) -> None:
    policy = make_policy()
    trainer = make_trainer(
        policy,
        CPOTrainer,
        CPOConfig,
        ROWS,
        tmp_path,
        loss_type="simpo",
        beta=cfg.beta,
        simpo_gamma=cfg.gamma,
        cpo_alpha=cfg.nll_weight,
        label_smoothing=cfg.label_smoothing,
    )
    groups = labelled_groups(trainer)

    def loss(part: list[Group]) -> PreferenceOutput:
        micro = packed(part)
        logps = pair_logps(policy.logprobs(micro).logprobs, micro)
        return simpo_loss(logps, cfg, normalizer(groups))

    own = ("rewards/accuracies", *(["nll_loss"] if cfg.nll_weight else []))
    check(policy, groups, loss, trl_step(trainer), (*NAMES, *own))


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto_trainer(name: Any, tmp_path: Path) -> None:
    policy = make_policy()
    cfg = KtoLossConfig(name=name, beta=0.3, desirable_weight=1.3, undesirable_weight=0.8)
    trainer = make_trainer(
        policy,
        trl.KTOTrainer,
        trl.KTOConfig,
        UNPAIRED,
        tmp_path,
        loss_type=name,
        beta=cfg.beta,
        desirable_weight=cfg.desirable_weight,
        undesirable_weight=cfg.undesirable_weight,
    )
    rows = trainer.train_dataset
    groups = make_groups([(r["prompt_ids"], [all_scored(r["completion_ids"])]) for r in rows])
    kl = None
    if name == "kto":
        mismatched = [
            (group.prompt_ids, [all_scored(groups[i - 1].rollouts[0].token_ids)])
            for i, group in enumerate(groups)
        ]
        assert [a[0][0] for _, a in mismatched] == list(rows["KL_completion_ids"])
        micro = packed(make_groups(mismatched))
        kl = kl_baseline(
            rollout_sum(policy.eval_logprobs(micro), micro),
            rollout_sum(policy.reference_logprobs(micro), micro),
        )
        assert kl > 0.01

    def loss(part: list[Group]) -> PreferenceOutput:
        micro = packed(part)
        logps = LabelledLogps(
            rollout_sum(policy.logprobs(micro).logprobs, micro),
            torch.tensor([rows[part[g].prompt.index]["label"] for g, _ in micro.source]),
            rollout_sum(policy.reference_logprobs(micro), micro),
            kl,
        )
        return kto_loss(logps, cfg, Normalizer(len(groups)))

    own = ("kl",) if name == "kto" else ()
    check(policy, groups, loss, trl_step(trainer), (*NAMES, *own))
