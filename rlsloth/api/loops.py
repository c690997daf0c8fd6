"""Training from Python: one function for each loop, with the command line's defaults.

``rewards``, ``data``, ``validation`` and ``environment`` take Python objects; each takes the place
of the setting that would name it. All else is in the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlsloth.api.cleanup import freeing_memory
from rlsloth.api.objects import Reward, Rows, checked, passing_objects
from rlsloth.api.result import RunResult
from rlsloth.config import GrpoConfig
from rlsloth.config.preference import PreferenceConfig
from rlsloth.config.sft import SftConfig, SupervisedConfig
from rlsloth.losses.preference.methods import DpoConfig, KtoConfig, OrpoConfig, SimpoConfig


def grpo(
    config: GrpoConfig | None = None,
    *,
    rewards: Sequence[Reward] | None = None,
    data: Rows | None = None,
    validation: Rows | None = None,
    environment: Callable[..., Any] | None = None,
) -> RunResult:
    """Train with reinforcement learning from rewards, as ``rlsloth grpo`` does.

    Args:
        config: all settings; default: those of ``rlsloth grpo`` without options.
        rewards: functions ``(prompts, completions, **columns) -> list of numbers or None``, plain
            or async, also names and files, in any mixture. Functions run in worker processes.
        data: rows with a prompt column, in place of ``env.train``.
        validation: held-out rows, in place of ``env.validation``.
        environment: class of tools, or class or function of an Environment, in place of
            ``env.name``.

    Raises:
        UserError: bad input; its text says what to do.
    """
    from rlsloth.training.grpo import train

    config = checked(config, GrpoConfig)
    with (
        freeing_memory(config.run.dir),
        passing_objects(
            config, rewards=rewards, data=data, validation=validation, environment=environment
        ) as named,
    ):
        return RunResult(train(named))


def sft(
    config: SftConfig | None = None,
    *,
    data: Rows | None = None,
    validation: Rows | None = None,
    rewards: Sequence[Reward] | None = None,
    environment: Callable[..., Any] | None = None,
) -> RunResult:
    """Train on the completions of a dataset, as ``rlsloth sft`` does.

    Args:
        config: all settings; default: those of ``rlsloth sft`` without options.
        data: rows to learn from, in place of ``data.train``.
        validation: held-out rows, in place of ``data.validation``.
        rewards, environment: for ``eval.generate`` alone, as for ``grpo``.

    Raises:
        UserError: bad input; its text says what to do.
    """
    from rlsloth.training.sft import train

    return _learn(
        train,
        checked(config, SftConfig),
        data=data,
        validation=validation,
        rewards=rewards,
        environment=environment,
    )


def dpo(
    config: DpoConfig | None = None,
    *,
    data: Rows | None = None,
    validation: Rows | None = None,
    rewards: Sequence[Reward] | None = None,
    environment: Callable[..., Any] | None = None,
) -> RunResult:
    """Train on pairs, against the starting policy, as ``rlsloth dpo`` does.

    ``data`` and ``validation`` are rows of chosen and rejected completions; the rest is
    as for ``sft``.
    """
    return prefer(
        checked(config, DpoConfig),
        data=data,
        validation=validation,
        rewards=rewards,
        environment=environment,
    )


def orpo(
    config: OrpoConfig | None = None,
    *,
    data: Rows | None = None,
    validation: Rows | None = None,
    rewards: Sequence[Reward] | None = None,
    environment: Callable[..., Any] | None = None,
) -> RunResult:
    """Train on pairs, likelihood and preference at once, as ``rlsloth orpo`` does.

    ``data`` and ``validation`` are rows of chosen and rejected completions; the rest is
    as for ``sft``.
    """
    return prefer(
        checked(config, OrpoConfig),
        data=data,
        validation=validation,
        rewards=rewards,
        environment=environment,
    )


def simpo(
    config: SimpoConfig | None = None,
    *,
    data: Rows | None = None,
    validation: Rows | None = None,
    rewards: Sequence[Reward] | None = None,
    environment: Callable[..., Any] | None = None,
) -> RunResult:
    """Train on pairs, without a reference, as ``rlsloth simpo`` does.

    ``data`` and ``validation`` are rows of chosen and rejected completions; the rest is
    as for ``sft``.
    """
    return prefer(
        checked(config, SimpoConfig),
        data=data,
        validation=validation,
        rewards=rewards,
        environment=environment,
    )


def kto(
    config: KtoConfig | None = None,
    *,
    data: Rows | None = None,
    validation: Rows | None = None,
    rewards: Sequence[Reward] | None = None,
    environment: Callable[..., Any] | None = None,
) -> RunResult:
    """Train on completions labelled good or bad, as ``rlsloth kto`` does.

    ``data`` and ``validation`` are rows of prompt, completion and label; the rest is
    as for ``sft``.
    """
    return prefer(
        checked(config, KtoConfig),
        data=data,
        validation=validation,
        rewards=rewards,
        environment=environment,
    )


def prefer(config: PreferenceConfig, **objects: Any) -> RunResult:
    """Train with the preference method that the configuration belongs to; see ``dpo``."""
    from rlsloth.training.preference import train

    return _learn(train, config, **objects)


def _learn(train: Callable[[Any], Path], config: SupervisedConfig, **objects: Any) -> RunResult:
    with freeing_memory(config.run.dir), passing_objects(config, **objects) as named:
        return RunResult(train(named))
