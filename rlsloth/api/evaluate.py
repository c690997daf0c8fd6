"""Evaluation from Python: held-out accuracy of a model, and of the adapter of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from rlsloth.api.cleanup import freeing_memory
from rlsloth.api.objects import Reward, Rows, checked, passing_objects
from rlsloth.api.result import RunResult
from rlsloth.config import GrpoConfig
from rlsloth.errors import UserError
from rlsloth.evaluation.intervals import difference_estimate
from rlsloth.evaluation.result import paired_scores
from rlsloth.files import write_json
from rlsloth.run.folder import CONFIG

EVALUATION = "eval.json"
"""File of figures that marks a folder as an evaluation."""


def evaluate(
    config: GrpoConfig | None = None,
    *,
    rewards: Sequence[Reward] | None = None,
    data: Rows | None = None,
    validation: Rows | None = None,
    environment: Callable[..., Any] | None = None,
) -> RunResult:
    """Evaluate the base model and, if there is one, the adapter, as ``rlsloth eval`` does.

    Given the configuration of a training run, the adapter is the one it trained. Arguments are
    those of ``grpo``. The result's ``summary`` has the figures under ``base``, ``adapter`` and
    ``difference``.

    Raises:
        UserError: bad input, a run without an adapter, or a folder that holds an evaluation.
    """
    config = _with_trained_adapter(checked(config, GrpoConfig))
    with (
        freeing_memory(),
        passing_objects(
            config, rewards=rewards, data=data, validation=validation, environment=environment
        ) as named,
    ):
        return _measure(named)


def _measure(cfg: GrpoConfig) -> RunResult:
    from rlsloth.training.opening import open_grpo

    with ExitStack() as stack:
        session = open_grpo(cfg, stack, trains=False)
        run, evaluator = session.run, session.evaluator
        assert evaluator is not None  # reinforcement learning always has one
        base = evaluator.evaluate(0, name="base", base=True)
        figures: dict[str, object] = {"base": base.metrics()}
        if cfg.model.adapter is None:
            run.say("no --model.adapter: only the base model was evaluated")
        else:
            adapter = evaluator.evaluate(0, name="adapter")
            gain = difference_estimate(*paired_scores(base, adapter))
            run.say(
                f"adapter - base: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] "
                f"avg@{base.samples}, paired by problem"
            )
            figures |= {
                "adapter": adapter.metrics(),
                "difference": [gain.value, gain.low, gain.high],
            }
        write_json(run.dir / EVALUATION, figures)
        run.finish({"problems": base.problems, "samples": base.samples, **figures})
        return RunResult(run.dir)


def _with_trained_adapter(cfg: GrpoConfig) -> GrpoConfig:
    """The configuration of a training run, changed to evaluate its adapter in a new folder.

    If model.adapter is not the adapter that the run started from, the user has set it: it is kept.

    Raises:
        UserError: the folder holds an evaluation, or the run has no adapter yet.
    """
    from rlsloth.training.source import read_config

    folder = cfg.run.dir
    if folder is None or not (folder / CONFIG).is_file():
        return cfg
    if (folder / EVALUATION).exists():
        raise UserError(f"--run.dir {folder} holds an evaluation: pass another folder")
    run = cfg.run.model_copy(update={"dir": None, "resume": False})
    started_from = read_config(folder)["model"].get("adapter")
    model = cfg.model
    if started_from == (str(model.adapter) if model.adapter else None):
        if not (folder / "adapter").is_dir():
            raise UserError(
                f"{folder} has no adapter yet: let the run finish (rlsloth grpo {folder / CONFIG} "
                "--run.resume), or pass an adapter with --model.adapter"
            )
        model = model.model_copy(update={"adapter": folder / "adapter"})
    return cfg.model_copy(update={"model": model, "run": run})
