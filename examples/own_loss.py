"""A policy loss of your own: SAPO, which fades a token out where PPO's clip cuts it off.

    rlsloth grpo my.yaml --loss.name examples/own_loss.py:sapo
    python examples/own_loss.py FOLDER_OR_GGUF [STEPS]

Source: Gao et al. 2025, "Soft Adaptive Policy Optimization", arXiv:2511.20347. With a ratio r and
a temperature T the loss of a token is -sigmoid(T (r - 1)) 4 / T A: at r = 1 its gradient is that of
the policy gradient, and it falls off smoothly on both sides.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import rlsloth
from rlsloth.losses.base import PolicyLoss, ScoredTokens, rollouts, sum_of_rollout_means

RISE, FALL = 1.0, 1.05  # temperatures for positive and other advantages, those of the paper


def soft_gate(tokens: ScoredTokens, _: rlsloth.LossConfig) -> torch.Tensor:
    """The loss of each token, [N]. A function like this is a loss already: ``:soft_gate``."""
    temperature_N = torch.where(tokens.advantages > 0, RISE, FALL)
    gate_N = torch.sigmoid(temperature_N * (tokens.ratio - 1)) * 4 / temperature_N
    return -gate_N * tokens.advantages


sapo = PolicyLoss(
    soft_gate,
    total=sum_of_rollout_means,  # as in the paper; a bare function is averaged over all tokens
    normalizer=rollouts,
    reads=frozenset({"ratio"}),  # so that --loss.epsilon-low, without effect here, is refused
)


def main(model: str, steps: int = 20, folder: Path = Path("runs/own_loss")) -> Path:
    """Train ``model`` on small sums with the loss above; returns the run folder."""
    config = rlsloth.GrpoConfig(
        steps=steps,
        prompts_per_step=4,
        updates_per_rollout=2,  # the first is on-policy, where all losses agree
        model=rlsloth.ModelConfig(path=model),
        env=rlsloth.EnvConfig(name="reasoning_gym:chain_sum", heldout=20),
        rollout=rlsloth.RolloutConfig(max_tokens=32),
        loss=rlsloth.LossConfig(name=f"{__file__}:sapo"),
        eval=rlsloth.EvalConfig(problems=20, samples=4, correct_at=0.5),
        run=rlsloth.RunConfig(dir=folder),
    )
    return rlsloth.grpo(config).folder


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20)
