"""Evaluation from Python: held-out accuracy of a model, and of the adapter of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlsloth.api.cleanup import freeing_memory
from rlsloth.api.objects import Reward, Rows, checked, passing_objects
from rlsloth.api.result import RunResult
from rlsloth.config import GrpoConfig, ModelConfig
from rlsloth.errors import UserError, nearest
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

    Given the configuration of a training run, the adapter is the one it trained; of a run that
    trained weights of the model itself (``model.trained``), these are evaluated. Arguments are
    those of ``grpo``. The result's ``summary`` has the figures under ``base``, ``adapter`` (or
    ``trained``) and ``difference``.

    Raises:
        UserError: bad input, a run that has trained nothing yet, or a folder that holds an
            evaluation, or no run where what one trained is meant.
    """
    config, whole = _with_trained(checked(config, GrpoConfig))
    with (
        freeing_memory(),
        passing_objects(
            config, rewards=rewards, data=data, validation=validation, environment=environment
        ) as named,
    ):
        return _measure(named, whole)


def _measure(cfg: GrpoConfig, whole: Path | None) -> RunResult:
    from rlsloth.policy.whole import load_weights
    from rlsloth.training.data_lines import describe_evaluated
    from rlsloth.training.opening import open_grpo

    evaluated = describe_evaluated(cfg.model, whole)
    with ExitStack() as stack:
        session = open_grpo(cfg, stack, evaluated=evaluated)
        run, evaluator = session.run, session.evaluator
        assert evaluator is not None  # reinforcement learning always has one
        base = evaluator.evaluate(0, name="base", base=True)
        figures: dict[str, object] = {"base": base.metrics()}
        if cfg.model.adapter is None and whole is None:
            run.say(f"{evaluated} (--model.adapter names one)")
        else:
            name = "adapter" if whole is None else "trained"
            if whole is not None:
                load_weights(session.policy.model, whole)
                evaluator.collector.engine.set_weights(session.policy.weights())
            trained = evaluator.evaluate(0, name=name)
            gain = difference_estimate(*paired_scores(base, trained))
            run.say(
                f"{name} - base: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] "
                f"avg@{base.samples}, paired by problem"
            )
            figures |= {
                name: trained.metrics(),
                "difference": [gain.value, gain.low, gain.high],
            }
        write_json(run.dir / EVALUATION, figures)
        run.finish(
            {"evaluated": evaluated, "problems": base.problems, "samples": base.samples, **figures}
        )
        return RunResult(run.dir)


def _with_trained(cfg: GrpoConfig) -> tuple[GrpoConfig, Path | None]:
    """The configuration of a training run, changed to evaluate what it trained in a new folder.

    If model.adapter is not the adapter that the run started from, the user has set it: it is kept.

    Returns:
        The configuration, and the folder of a whole model that the run trained, if it did.

    Raises:
        UserError: the folder is not there or holds an evaluation, or the run has trained nothing.
    """
    from rlsloth.policy.trainable import ADAPTER, MODEL
    from rlsloth.training.source import read_config

    folder = cfg.run.dir
    if folder is None:
        return cfg, None
    if not (folder / CONFIG).is_file():
        _refuse_missing(folder, cfg.model)
        return cfg, None
    if (folder / EVALUATION).exists():
        raise UserError(f"--run.dir {folder} holds an evaluation: pass another folder")
    run = cfg.run.model_copy(update={"dir": None, "resume": False})
    started_from = read_config(folder)["model"].get("adapter")
    model = cfg.model
    if not model.trains_adapter:
        saved = read_config(folder)["model"]
        for key in ("path", "trained"):
            if saved.get(key) != getattr(model, key):
                raise UserError(
                    f"{folder} trained with model.{key} {saved.get(key)}, not "
                    f"{getattr(model, key)}: set it back, or pass --model.path without the run"
                )
        if not (folder / MODEL).is_dir():
            raise UserError(
                f"{folder} has no trained model yet: let the run finish (rlsloth grpo "
                f"{folder / CONFIG} --run.resume)"
            )
        return cfg.model_copy(update={"run": run}), folder / MODEL
    if started_from == (str(model.adapter) if model.adapter else None):
        if not (folder / ADAPTER).is_dir():
            raise UserError(
                f"{folder} has no adapter yet: let the run finish (rlsloth grpo {folder / CONFIG} "
                "--run.resume), or pass an adapter with --model.adapter"
            )
        model = model.model_copy(update={"adapter": folder / ADAPTER})
    return cfg.model_copy(update={"model": model, "run": run}), None


def _refuse_missing(folder: Path, model: ModelConfig) -> None:
    """Refuse a folder without a run if the adapter to evaluate might be the one of that run.

    Raises:
        UserError: no adapter is named, and the folder is not an empty one for the results.
    """
    if model.adapter is not None or (folder.is_dir() and not any(folder.iterdir())):
        return
    runs = [path.name for path in folder.absolute().parent.glob("*") if (path / CONFIG).is_file()]
    raise UserError(
        f"--run.dir {folder}: there is no run to evaluate{nearest(folder.name, runs)} (current "
        f"folder: {Path.cwd()}); pass the folder of a run, or the adapter with --model.adapter; to "
        "evaluate the base model alone leave --run.dir out, or make an empty folder for the result"
    )
