"""Losses and gradients against TRL's own code, run on the same tensors as one micro-batch."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.micro_batches import make_batch, make_micro
from rlsloth.config import LossConfig
from rlsloth.losses.base import PolicyLoss
from rlsloth.losses.opening import open_loss
from rlsloth.losses.policy_loss import normalizer, policy_loss

pytestmark = pytest.mark.slow

GRPOTrainer = pytest.importorskip("trl").GRPOTrainer
MAX_TOKENS = 11
TOLERANCE = 1e-5


@dataclass
class Case:
    """Padded [B, T] tensors of a step; row 2 is masked out whole, row 1 has tool tokens inside."""

    logprobs: Tensor
    old: Tensor
    reference: Tensor
    rollout: Tensor
    advantages: Tensor
    completion_mask: Tensor
    tool_mask: Tensor

    @property
    def mask(self) -> Tensor:
        return self.completion_mask * self.tool_mask


def make_case(seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 10, 0, 7, 1, 9])
    rows, columns = len(lengths), 10
    completion_mask_BT = (torch.arange(columns) < lengths[:, None]).long()
    tool_mask_BT = torch.ones_like(completion_mask_BT)
    tool_mask_BT[1, 4:7] = 0
    logprobs_BT = -3 * torch.rand(rows, columns, generator=generator)
    old, reference, rollout = 0.4 * torch.randn(3, rows, columns, generator=generator)
    rollout_BT = logprobs_BT + rollout
    rollout_BT[3, 2] = math.nan
    advantages_B = torch.tensor([1.3, -0.7, 0.5, -1.6, 0.9, 0.4])
    return Case(
        logprobs=logprobs_BT,
        old=logprobs_BT + old,
        reference=logprobs_BT + reference,
        rollout=rollout_BT,
        advantages=advantages_B,
        completion_mask=completion_mask_BT,
        tool_mask=tool_mask_BT,
    )


def trl_correction(trainer: SimpleNamespace, case: Case) -> Tensor:
    """TRL's importance-sampling ratio, by running that very block of its source."""
    function = GRPOTrainer._generate_and_score_completions
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (block,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and any(
            isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "per_token_logps_diff"
            for s in node.body
        )
    ]
    names: dict[str, Any] = {
        "self": trainer,
        "torch": torch,
        "math": math,
        "completion_mask": case.completion_mask,
        "tool_mask": case.tool_mask,
        "old_per_token_logps": case.old,
        "sampling_per_token_logps": case.rollout,
    }
    exec(compile(ast.Module([block], []), "trl", "exec"), names)
    ratio: Tensor = names["vllm_importance_sampling_ratio"]
    return ratio


def trl_loss(case: Case, cfg: LossConfig, on_policy: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(loss, its gradient [B, T], metrics) of ``GRPOTrainer._compute_loss``."""
    logprobs_BT = case.logprobs.clone().requires_grad_()
    corrected = cfg.correction != "none"
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            logprobs_BT,
            torch.zeros_like(logprobs_BT),
            None,
        ),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=cfg.kl_ratio_weighted,
            delta=cfg.delta,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
        ),
        aux_loss_enabled=False,
        beta=cfg.beta,
        current_gradient_accumulation_steps=1,
        epsilon_low=cfg.epsilon_low,
        epsilon_high=cfg.epsilon_low if cfg.epsilon_high is None else cfg.epsilon_high,
        importance_sampling_level=cfg.ratio or ("sequence" if cfg.name == "gspo" else "token"),
        loss_type="grpo" if cfg.name == "gspo" else cfg.name,
        max_completion_length=MAX_TOKENS,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        vllm_importance_sampling_mode=cfg.correction,
        vllm_importance_sampling_clip_max=cfg.correction_max,
        vllm_importance_sampling_clip_min=cfg.correction_min,
    )
    prompt_B1 = torch.zeros(case.advantages.numel(), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": prompt_B1,
        "prompt_mask": prompt_B1 + 1,
        "completion_ids": torch.zeros_like(case.completion_mask),
        "completion_mask": case.completion_mask,
        "tool_mask": case.tool_mask,
        "advantages": case.advantages,
        "old_per_token_logps": None if on_policy else case.old,
        "ref_per_token_logps": case.reference,
        "num_items_in_batch": case.mask.sum(),
    }
    if corrected:
        inputs["importance_sampling_ratio"] = trl_correction(trainer, case)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    assert logprobs_BT.grad is not None
    return loss.detach(), logprobs_BT.grad, trainer._metrics["train"]


def compare(
    cfg: LossConfig, on_policy: bool = False, seed: int = 0, loss: PolicyLoss | None = None
) -> None:
    variant = loss or open_loss(cfg)
    case = make_case(seed)
    wanted, wanted_gradient_BT, metrics = trl_loss(case, cfg, on_policy)
    mask_BT = case.mask.bool()
    scored_B = mask_BT.sum(1)
    micro = make_micro(
        [n for n in scored_B.tolist() if n > 0],
        case.advantages.repeat_interleave(scored_B),
        case.rollout[mask_BT],
    )
    logprobs_N = case.logprobs[mask_BT].requires_grad_()
    output = policy_loss(
        variant,
        logprobs_N,
        micro,
        cfg,
        old_logprobs_N=None if on_policy else case.old[mask_BT],
        reference_logprobs_N=case.reference[mask_BT] if cfg.beta > 0 else None,
    )
    batch = make_batch([micro], rollouts=len(scored_B), scored_tokens=int(scored_B.sum()))
    value = output.total / normalizer(variant, batch, max_tokens=MAX_TOKENS)
    value.backward()
    assert logprobs_N.grad is not None
    gradient_BT = torch.zeros_like(case.logprobs)
    gradient_BT[mask_BT] = logprobs_N.grad
    assert (value - wanted).abs() <= TOLERANCE
    assert (gradient_BT - wanted_gradient_BT).abs().max() <= TOLERANCE
    assert wanted_gradient_BT.abs().max() > 100 * TOLERANCE
    if cfg.beta > 0:
        assert output.stats.kl / output.stats.tokens == pytest.approx(metrics["kl"][0], abs=1e-5)
    sequences = cfg.ratio == "sequence" or cfg.name == "gspo"
    if variant.clipping == "both" and not sequences:
        low, high = (metrics[f"clip_ratio/{side}_mean"][0] for side in ("low", "high"))
        assert output.stats.clipped_low / output.stats.tokens == pytest.approx(low)
        assert output.stats.clipped_high / output.stats.tokens == pytest.approx(high)
        assert on_policy or (low > 0 and high > 0)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip_higher": {"epsilon_low": 0.1, "epsilon_high": 0.28},
    "two_sided": {"delta": 1.5},
    "kl": {"beta": 0.2},
    "kl_unweighted": {"beta": 0.2, "kl_ratio_weighted": False},
    "token_ratio": {"ratio": "token", "beta": 0.1},
    "sequence_ratio": {"ratio": "sequence", "epsilon_low": 0.02, "beta": 0.1},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_clipped_losses(name: str, options: dict[str, Any]) -> None:
    for seed in range(3):
        compare(LossConfig(name=name, **options), seed=seed)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("cap", [5.0, 1.1])
def test_cispo(cap: float, ratio: Any) -> None:
    for beta in (0.0, 0.2):
        compare(LossConfig(name="cispo", epsilon_high=cap, ratio=ratio, beta=beta))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_exactly_on_policy(name: Any) -> None:
    for beta in (0.0, 0.2):
        compare(LossConfig(name=name, epsilon_high=5.0, beta=beta), on_policy=True)


def test_the_loss_of_the_example() -> None:
    """examples/own_loss.py is TRL's sapo."""
    file = Path(__file__).parents[2] / "examples" / "own_loss.py"
    sapo = open_loss(LossConfig(name=f"{file}:sapo"))
    for seed, beta in enumerate((0.0, 0.2)):
        for on_policy in (True, False):
            compare(LossConfig(name="sapo", beta=beta), on_policy, seed, sapo)


@pytest.mark.parametrize("low", [None, 0.8])
@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
def test_rollout_correction(mode: Any, low: float | None) -> None:
    # cispo's cap is of the ratio itself, and TRL's default for it would be 0.2.
    caps = {"grpo": None, "dr_grpo": None, "dapo": None, "gspo": None, "cispo": 5.0}
    for name, cap in caps.items():
        cfg = LossConfig(
            name=name,
            epsilon_high=cap,
            beta=0.1,
            correction=mode,
            correction_max=1.4,
            correction_min=low,
        )
        compare(cfg, seed=1)
