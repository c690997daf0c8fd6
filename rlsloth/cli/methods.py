"""The preference methods as commands: help, configuration and kind of examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlsloth.config.preference import (
    DpoConfig,
    KtoConfig,
    OrpoConfig,
    PreferenceConfig,
    SimpoConfig,
)


@dataclass(frozen=True, slots=True)
class PreferenceMethod:
    """One entry of ``METHODS``."""

    help: str
    config: type[PreferenceConfig]
    examples: Literal["pairs", "labelled"] = "pairs"


METHODS = {
    "dpo": PreferenceMethod("learn from pairs, against the starting policy", DpoConfig),
    "orpo": PreferenceMethod("learn from pairs, likelihood and preference at once", OrpoConfig),
    "simpo": PreferenceMethod("learn from pairs, mean log-probs with a margin", SimpoConfig),
    "kto": PreferenceMethod("learn from completions labelled good or bad", KtoConfig, "labelled"),
}
"""Command to method, in the order in which ``rlsloth --help`` lists them."""
