"""Export, quantisation and distillation from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlsloth.api.cleanup import freeing_memory
from rlsloth.api.objects import Reward, Rows, checked, of_kind, passing_objects
from rlsloth.config.distill import DistillConfig
from rlsloth.config.export import ExportConfig
from rlsloth.config.quantize import QuantizeConfig


def export(config: ExportConfig) -> Path:
    """Write a trained model in a form that others run, as ``rlsloth export`` does.

    Returns:
        The folder, ``config.out``.

    Raises:
        UserError: the input is bad or a check failed; the folder is then left as it was.
    """
    from rlsloth.exports.export import run_export

    config = of_kind(config, ExportConfig)
    assert config.out is not None  # the configuration refuses that
    with freeing_memory():
        run_export(config)
    return config.out.expanduser()


def quantize(config: QuantizeConfig) -> Path:
    """Write a model in 4 bits that are chosen on your texts, as ``rlsloth quantize`` does.

    Returns:
        The folder, ``config.out``.

    Raises:
        UserError: the input is bad or a check failed; the folder is then left as it was.
    """
    from rlsloth.exports.four_bit.quantize import run_quantize

    config = of_kind(config, QuantizeConfig)
    assert config.out is not None  # the configuration refuses that
    with freeing_memory():
        run_quantize(config)
    return config.out.expanduser()


def distill(
    config: DistillConfig | None = None,
    *,
    rewards: Sequence[Reward] | None = None,
    data: Rows | None = None,
    validation: Rows | None = None,
    environment: Callable[..., Any] | None = None,
) -> Path:
    """Sample a teacher and keep what the rewards verify, as ``rlsloth distill`` does.

    ``data`` are the problems; arguments are as for ``grpo``.

    Returns:
        The dataset's file.

    Raises:
        UserError: bad input, a teacher that cannot be reached, or not one trace to keep.
    """
    from rlsloth.distillation.pipeline import distill

    with (
        freeing_memory(),
        passing_objects(
            checked(config, DistillConfig),
            rewards=rewards,
            data=data,
            validation=validation,
            environment=environment,
        ) as named,
    ):
        return distill(named)
