"""Losses and gradients of all LoRA weights against TRL's preference trainers, on a tiny model.

Both sides score the very token ids that TRL's trainer made of the rows: TRL as one padded batch, we
as two packed micro-batches of one step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.trl_trainers import (
    all_scored,
    check,
    dpo_groups,
    labelled_groups,
    make_groups,
    make_policy,
    make_trainer,
    packed,
    trl_step,
)
from rlsloth.losses.preference.base import (
    LabelledLogps,
    Normalizer,
    PreferenceOutput,
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
from rlsloth.records import Group

trl = pytest.importorskip("trl")
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

pytestmark = pytest.mark.slow

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
