"""The losses of ``rlsloth dpo``, ``orpo``, ``simpo`` and ``kto``. Defaults are TRL 1.16's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlsloth.config.section import Section


class DpoLossConfig(Section):
    """The loss of a preference pair against the starting policy."""

    name: Literal["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "apo_zero", "apo_down"] = (
        "sigmoid"
    )
    """sigmoid: DPO. sigmoid_norm: with means over tokens for sums (Tulu 3). ipo: squared distance
    of the mean log-ratios to 1 / (2 beta). hinge: SLiC. robust: unbiased under flipped labels.
    apo_zero: chosen up, rejected down. apo_down: both down, rejected further; for chosen answers
    worse than the model's own."""
    beta: float = Field(0.1, gt=0)
    """How closely the policy is held to the starting one. With means over tokens it is larger by
    about a completion's length: sigmoid_norm is used with 5."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs whose labels are taken to be flipped: conservative DPO for sigmoid and
    sigmoid_norm (whose label smoothing TRL ignores), the correction of robust."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of an added negative log-likelihood of the chosen completions, a mean over tokens."""

    @model_validator(mode="after")
    def _consistent(self) -> DpoLossConfig:
        if self.label_smoothing and self.name not in ("sigmoid", "sigmoid_norm", "robust"):
            raise ValueError(
                f"label_smoothing has no effect with {self.name}; leave it out, or use sigmoid, "
                "sigmoid_norm or robust"
            )
        return self


class OrpoLossConfig(Section):
    """Likelihood of the chosen completion and its odds against the rejected one; no reference."""

    beta: float = Field(0.1, gt=0)
    """Weight of the odds-ratio term (lambda in the paper)."""
    nll_prompt: bool = True
    """The likelihood term covers the prompt too, as in TRL. Off: the chosen completion alone, as
    in the paper."""


class SimpoLossConfig(Section):
    """Mean log-probs of a pair with a target margin; no reference. The paper's own settings are
    beta 2 to 10, gamma 0.3 to 0.5 times beta, and nll_weight 0."""

    beta: float = Field(0.1, gt=0)
    """Scale of the mean log-probs, which are the rewards."""
    gamma: float = Field(0.5, ge=0)
    """Margin by which the chosen reward is to exceed the rejected one."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs whose labels are taken to be flipped."""
    nll_weight: float = Field(1.0, ge=0)
    """Weight of the negative log-likelihood of the chosen completions, a mean over tokens (CPO's
    term, TRL's cpo_alpha); 0 is SimPO proper."""


class KtoLossConfig(Section):
    """The loss of single completions marked good or bad, against the starting policy."""

    name: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto: rewards are measured from the policy's KL to the starting one. apo_zero_unpaired: from
    0, without the two passes that estimate the KL."""
    beta: float = Field(0.1, gt=0)
    """How closely the policy is held to the starting one."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of good completions. The paper keeps (desirable_weight x good) / (undesirable_weight x
    bad) between 1 and 4/3."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of bad completions."""
