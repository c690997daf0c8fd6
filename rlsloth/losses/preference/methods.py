"""The table of preference methods: ``rlsloth dpo``, ``orpo``, ``simpo`` and ``kto``.

A new method is its loss in a file of this folder and, here, its options and one entry of
``METHODS``. The command, its help, its memory plan, the reader of its data and its training loop
follow from that entry. Nothing here imports torch, so that the command line can read the table
quickly. Defaults are those of TRL 1.16.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from rlsloth.config.data import KtoDataConfig, PreferenceDataConfig
from rlsloth.config.optim import PreferenceOptimConfig
from rlsloth.config.preference import PreferenceConfig
from rlsloth.config.section import Section
from rlsloth.config.sft import SupervisedConfig


class DpoLossConfig(Section):
    """The loss of a preference pair, measured against the starting policy."""

    name: Literal["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "apo_zero", "apo_down"] = (
        "sigmoid"
    )
    """sigmoid: DPO. sigmoid_norm: DPO on means over tokens instead of sums (Tulu 3). ipo: squared
    distance of the mean log-ratios to 1 / (2 beta). hinge: SLiC. robust: unbiased under flipped
    labels. apo_zero: raises chosen completions, lowers rejected ones. apo_down: lowers both, the
    rejected ones further; for chosen completions that are worse than the model's own."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the starting policy. Losses on means over tokens need a value
    larger by about the length of a completion: sigmoid_norm is used with 5."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs with flipped labels: conservative DPO for sigmoid and sigmoid_norm
    (whose label smoothing TRL ignores), the correction of robust."""
    sft_weight: float = Field(default=0.0, ge=0)
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
    """Likelihood of the chosen completion, and its odds against the rejected one."""

    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds-ratio term (lambda in the paper)."""
    nll_prompt: bool = True
    """Whether the likelihood term covers the prompt too, as in TRL. Off: the chosen completion
    alone, as in the paper."""


class SimpoLossConfig(Section):
    """Mean log-probs of a pair with a target margin. The paper's own settings are beta 2 to 10,
    gamma 0.3 to 0.5 times beta, and nll_weight 0."""

    beta: float = Field(default=0.1, gt=0)
    """Scale of the mean log-probs, which are the rewards."""
    gamma: float = Field(default=0.5, ge=0)
    """Margin by which the chosen reward is to exceed the rejected one."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs with flipped labels."""
    nll_weight: float = Field(default=1.0, ge=0)
    """Weight of the negative log-likelihood of the chosen completions, a mean over tokens (CPO's
    term, TRL's cpo_alpha); 0 is SimPO proper."""


class KtoLossConfig(Section):
    """The loss of single completions labelled good or bad, against the starting policy."""

    name: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto: rewards are measured from the policy's KL to the starting one. apo_zero_unpaired: from
    0, without the two passes that estimate the KL."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the starting policy."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of good completions. The paper keeps (desirable_weight x good) / (undesirable_weight x
    bad) between 1 and 4/3."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of bad completions."""


class DpoConfig(PreferenceConfig):
    """Direct preference optimization: pairs against the starting policy."""

    data: PreferenceDataConfig = PreferenceDataConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    loss: DpoLossConfig = DpoLossConfig()
    precompute_reference: bool = False
    """Score all examples under the starting policy once, before the first step: saves a forward a
    step from the second epoch on."""


class OrpoConfig(PreferenceConfig):
    """Odds-ratio preference optimization: likelihood and preference at once, no reference."""

    data: PreferenceDataConfig = PreferenceDataConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    loss: OrpoLossConfig = OrpoLossConfig()


class SimpoConfig(PreferenceConfig):
    """Simple preference optimization: mean log-probs with a margin, no reference."""

    data: PreferenceDataConfig = PreferenceDataConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    loss: SimpoLossConfig = SimpoLossConfig()


class KtoConfig(PreferenceConfig):
    """Kahneman-Tversky optimization: single completions labelled good or bad."""

    samples_per_step: int = Field(default=16, ge=2)
    """Examples per update; the KL is estimated on these, each put after another one's prompt."""

    data: KtoDataConfig = KtoDataConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    loss: KtoLossConfig = KtoLossConfig()


Needs = Callable[[Any], bool]
"""A configuration of the method to whether the loss needs something."""


def never(_cfg: PreferenceConfig) -> bool:
    """False: the loss never needs it."""
    return False


def always(_cfg: PreferenceConfig) -> bool:
    """True: the loss always needs it."""
    return True


@dataclass(frozen=True, slots=True)
class PreferenceMethod:
    """One entry of ``METHODS``."""

    help: str
    """A few words for the list of commands."""
    config: type[PreferenceConfig]
    """All options of the command. Has a section ``loss``, which the loss function receives."""
    loss: str | Callable[..., Any]
    """``module:function``, imported on first use, or the function itself: (logps, cfg.loss,
    normalizer) -> PreferenceOutput. ``logps`` is a PairLogps or a LabelledLogps."""
    examples: Literal["pairs", "labelled"] = "pairs"
    """pairs: a chosen and a rejected completion a row. labelled: a completion marked good or
    bad."""
    needs_reference: Needs = never
    """Whether ``logps`` holds log-probs of the starting policy."""
    needs_prompts: Needs = never
    """Whether ``logps`` holds log-probs of the prompts (pairs)."""
    needs_kl: Needs = never
    """Whether ``logps`` holds an estimate of the KL to the starting policy (labelled)."""
    precomputes_reference: Needs = never
    """Whether the reference is computed for all examples before the first step (pairs)."""

    def load_loss(self) -> Callable[..., Any]:
        """The loss function, imported where the table only names it."""
        if not isinstance(self.loss, str):
            return self.loss
        module, _, function = self.loss.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found


METHODS: dict[str, PreferenceMethod] = {
    "dpo": PreferenceMethod(
        help="learn from pairs, against the starting policy",
        config=DpoConfig,
        loss="rlsloth.losses.preference.dpo:dpo_loss",
        needs_reference=always,
        precomputes_reference=lambda cfg: cfg.precompute_reference,
    ),
    "orpo": PreferenceMethod(
        help="learn from pairs, likelihood and preference at once",
        config=OrpoConfig,
        loss="rlsloth.losses.preference.orpo:orpo_loss",
        needs_prompts=lambda cfg: cfg.loss.nll_prompt,
    ),
    "simpo": PreferenceMethod(
        help="learn from pairs, mean log-probs with a margin",
        config=SimpoConfig,
        loss="rlsloth.losses.preference.simpo:simpo_loss",
    ),
    "kto": PreferenceMethod(
        help="learn from completions labelled good or bad",
        config=KtoConfig,
        loss="rlsloth.losses.preference.kto:kto_loss",
        examples="labelled",
        needs_reference=always,
        needs_kl=lambda cfg: cfg.loss.name == "kto",
    ),
}
"""Command to method, in the order in which ``rlsloth --help`` lists them."""


def method_of(cfg: SupervisedConfig) -> PreferenceMethod | None:
    """The method that a configuration belongs to, by its type or the nearest base of that; None
    for a configuration of another kind, such as ``SftConfig``."""
    by_config = {method.config: method for method in METHODS.values()}
    return next((by_config[kind] for kind in type(cfg).__mro__ if kind in by_config), None)
