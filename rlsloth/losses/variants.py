"""The table of policy losses. A new loss is one entry here, and its surrogate if that is new too.

Its name is then an option of ``rlsloth grpo --loss.name``, with its line in the help.
"""

from __future__ import annotations

from rlsloth.config import LossConfig
from rlsloth.losses.base import (
    PolicyLoss,
    ScoredTokens,
    Surrogate,
    rollouts,
    sum_of_rollout_means,
    token_budget,
)

CISPO_CAP = 5.0
"""ScaleRL (arXiv:2510.13786) and TRL's documentation recommend it. TRL's own default falls back to
the lower epsilon, 0.2, which would shrink every on-policy token's gradient fivefold."""


def clipped_surrogate(tokens: ScoredTokens, cfg: LossConfig) -> Surrogate:
    """-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) (PPO, arXiv:1707.06347, eq. 7).

    epsilon_high above epsilon_low is clip-higher (DAPO, arXiv:2503.14476, eq. 10). ``delta`` caps
    the unclipped ratio, which bounds the loss where advantages are negative (two-sided clipping,
    INTELLECT-2, arXiv:2505.07291); it is meant to exceed 1 + epsilon_high.
    """
    ratio_N, advantages_N = tokens.ratio, tokens.advantages
    low = 1 - cfg.epsilon_low
    high = 1 + (cfg.epsilon_low if cfg.epsilon_high is None else cfg.epsilon_high)
    clipped_N = ratio_N.clamp(low, high)
    if cfg.delta is not None:
        ratio_N = ratio_N.clamp(max=cfg.delta)
    return Surrogate(
        loss=-(ratio_N * advantages_N).minimum(clipped_N * advantages_N),
        clipped_low=(ratio_N < low) & (advantages_N < 0),
        clipped_high=(ratio_N > high) & (advantages_N > 0),
    )


def capped_reinforce(tokens: ScoredTokens, cfg: LossConfig) -> Surrogate:
    """-min(r, epsilon_high).detach() A log p (MiniMax-M1, arXiv:2506.13585, eq. 4).

    epsilon_high caps the ratio itself, as in TRL, not its excess over 1; there is no lower clip,
    and no token loses its gradient. Tokens of both signs of advantage are capped, and counted when
    they are.
    """
    cap = CISPO_CAP if cfg.epsilon_high is None else cfg.epsilon_high
    ratio_N = tokens.ratio.detach()
    return Surrogate(
        loss=-ratio_N.clamp(max=cap) * tokens.advantages * tokens.logprobs,
        clipped_high=ratio_N > cap,
    )


VARIANTS: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss(
        clipped_surrogate,
        "mean over a rollout's tokens, then over rollouts (arXiv:2402.03300, eq. 3)",
        total=sum_of_rollout_means,
        normalizer=rollouts,
        clipping="both",
    ),
    "dr_grpo": PolicyLoss(
        clipped_surrogate,
        "token sums over a constant length, so that no length is favoured; pairs with "
        "--advantage.normalize none (arXiv:2503.20783)",
        normalizer=token_budget,
        clipping="both",
    ),
    "dapo": PolicyLoss(
        clipped_surrogate,
        "mean over the tokens of the whole step (arXiv:2503.14476, eq. 12)",
        clipping="both",
    ),
    "gspo": PolicyLoss(
        clipped_surrogate,
        "grpo with one ratio a rollout, which moves little: the paper clips at 3e-4 and 4e-4 "
        "(arXiv:2507.18071, eq. 5)",
        ratio="sequence",
        total=sum_of_rollout_means,
        normalizer=rollouts,
        clipping="both",
    ),
    "cispo": PolicyLoss(
        capped_reinforce,
        "log-probs weighted by the capped ratio, mean over the tokens of the whole step "
        "(arXiv:2506.13585)",
        reads=frozenset({"ratio", "epsilon_high"}),
        clipping="high",
    ),
}
"""Name to loss."""

EQUALS = {
    "bnpo": (
        "dapo",
        "TRL's bnpo takes the mean over the tokens of each micro-batch; here a step's loss does "
        "not depend on how it is cut, and the mean is over the tokens of the whole step",
    )
}
"""TRL's names for a loss that the table has under another name: that name, and why."""
