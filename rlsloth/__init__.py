"""rlsloth: train reasoning models from reward scripts on one GPU.

The public names are here, each loaded on first use: functions that do what the commands do, their
configurations, and the types for environments.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsloth.api.evaluate import evaluate
    from rlsloth.api.loops import dpo, grpo, kto, orpo, sft, simpo
    from rlsloth.api.models import distill, export, quantize
    from rlsloth.api.result import RunResult
    from rlsloth.config import (
        AdvantageConfig,
        EnvConfig,
        EvalConfig,
        GrpoConfig,
        LoraConfig,
        LossConfig,
        ModelConfig,
        OptimConfig,
        RewardConfig,
        RolloutConfig,
        RunConfig,
    )
    from rlsloth.config.data import KtoDataConfig, PreferenceDataConfig, SftDataConfig
    from rlsloth.config.distill import DistillConfig, EndpointConfig, TracesConfig
    from rlsloth.config.evaluation import SupervisedEvalConfig
    from rlsloth.config.export import ExportConfig
    from rlsloth.config.optim import PreferenceOptimConfig, SftOptimConfig
    from rlsloth.config.quantize import QuantizeConfig
    from rlsloth.config.sft import SftConfig
    from rlsloth.environments.protocol import Environment, Episode, Reply, SingleTurn
    from rlsloth.errors import UserError
    from rlsloth.losses.preference.methods import (
        DpoConfig,
        DpoLossConfig,
        KtoConfig,
        KtoLossConfig,
        OrpoConfig,
        OrpoLossConfig,
        SimpoConfig,
        SimpoLossConfig,
    )
    from rlsloth.records import Message, Prompt

__version__ = "0.1.0"

_HOMES = {
    "api.loops": "grpo sft dpo orpo simpo kto",
    "api.evaluate": "evaluate",
    "api.models": "distill export quantize",
    "api.result": "RunResult",
    "config": "AdvantageConfig EnvConfig EvalConfig GrpoConfig LoraConfig LossConfig ModelConfig"
    " OptimConfig RewardConfig RolloutConfig RunConfig",
    "config.data": "SftDataConfig PreferenceDataConfig KtoDataConfig",
    "config.distill": "DistillConfig EndpointConfig TracesConfig",
    "config.evaluation": "SupervisedEvalConfig",
    "config.export": "ExportConfig",
    "config.quantize": "QuantizeConfig",
    "config.optim": "SftOptimConfig PreferenceOptimConfig",
    "config.sft": "SftConfig",
    "environments.protocol": "Environment Episode Reply SingleTurn",
    "errors": "UserError",
    "losses.preference.methods": "DpoConfig DpoLossConfig OrpoConfig OrpoLossConfig SimpoConfig"
    " SimpoLossConfig KtoConfig KtoLossConfig",
    "records": "Message Prompt",
}
"""Module under rlsloth to the public names that it holds."""
_MODULES = {name: f"rlsloth.{home}" for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AdvantageConfig",
    "DistillConfig",
    "DpoConfig",
    "DpoLossConfig",
    "EndpointConfig",
    "EnvConfig",
    "Environment",
    "Episode",
    "EvalConfig",
    "ExportConfig",
    "GrpoConfig",
    "KtoConfig",
    "KtoDataConfig",
    "KtoLossConfig",
    "LoraConfig",
    "LossConfig",
    "Message",
    "ModelConfig",
    "OptimConfig",
    "OrpoConfig",
    "OrpoLossConfig",
    "PreferenceDataConfig",
    "PreferenceOptimConfig",
    "Prompt",
    "QuantizeConfig",
    "Reply",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "RunResult",
    "SftConfig",
    "SftDataConfig",
    "SftOptimConfig",
    "SimpoConfig",
    "SimpoLossConfig",
    "SingleTurn",
    "SupervisedEvalConfig",
    "TracesConfig",
    "UserError",
    "distill",
    "dpo",
    "evaluate",
    "export",
    "grpo",
    "kto",
    "orpo",
    "quantize",
    "sft",
    "simpo",
]


if not TYPE_CHECKING:  # a type checker would take any name for an attribute

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'rlsloth' has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value  # the next use does not come here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
