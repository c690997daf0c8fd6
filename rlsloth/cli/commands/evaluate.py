"""``rlsloth eval``: avg@k, pass@k and maj@k of a model, and of an adapter, on held-out problems."""

from __future__ import annotations

import json
from contextlib import ExitStack

import yaml

from rlsloth.cli.loops import read_loop
from rlsloth.config import GrpoConfig
from rlsloth.errors import UserError
from rlsloth.evaluation.intervals import difference_estimate
from rlsloth.run.folder import CONFIG

ABOUT = """Measure avg@k, pass@k and maj@k of a model, with and without an adapter, on held-out
problems. Writes eval.json into a new run folder.

The options are those of rlsloth grpo: pass the config.yaml of a run to evaluate its adapter."""


def run(name: str, argv: list[str]) -> int:
    """Evaluate. Returns the exit status."""
    run_eval(read_loop(name, GrpoConfig, argv, loop="grpo", about=ABOUT))
    return 0


def run_eval(cfg: GrpoConfig) -> None:
    """Evaluate the base model and, if there is one, the adapter, on the same problems.

    With the configuration of a training run, the adapter is the one that the run trained. Writes
    eval.json into a new run folder.

    Raises:
        UserError: bad input, a run without an adapter, or a folder that holds an evaluation.
    """
    from rlsloth.training.opening import open_grpo

    cfg = _with_trained_adapter(cfg)
    with ExitStack() as stack:
        session = open_grpo(cfg, stack, trains=False)
        run, evaluator = session.run, session.evaluator
        assert evaluator is not None  # `rlsloth grpo` always has one
        base = evaluator.evaluate(0, name="base", base=True)
        figures: dict[str, object] = {"base": base.metrics()}
        if cfg.model.adapter is None:
            run.say("no --model.adapter: only the base model was evaluated")
        if cfg.model.adapter is not None:
            adapter = evaluator.evaluate(0, name="adapter")
            gain = difference_estimate(base.scores, adapter.scores)
            run.say(
                f"adapter - base: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] "
                f"avg@{base.samples}, paired by problem"
            )
            figures |= {
                "adapter": adapter.metrics(),
                "difference": [gain.value, gain.low, gain.high],
            }
        (run.dir / "eval.json").write_text(json.dumps(figures, indent=1))
        run.finish({"problems": base.problems, "samples": base.samples, **figures})


def _with_trained_adapter(cfg: GrpoConfig) -> GrpoConfig:
    """The configuration of a training run, changed to evaluate its adapter in a new folder.

    If model.adapter is not the adapter that the run started from, the user has set it: it is kept.

    Raises:
        UserError: the folder holds an evaluation, or the run has no adapter yet.
    """
    folder = cfg.run.dir
    if folder is None or not (folder / CONFIG).is_file():
        return cfg
    if (folder / "eval.json").exists():
        raise UserError(f"--run.dir {folder} holds an evaluation: pass another folder")
    run = cfg.run.model_copy(update={"dir": None, "resume": False})
    started_from = yaml.safe_load((folder / CONFIG).read_text())["model"]["adapter"]
    model = cfg.model
    if started_from == (str(model.adapter) if model.adapter else None):
        if not (folder / "adapter").is_dir():
            raise UserError(
                f"{folder} has no adapter yet: let the run finish (rlsloth grpo {folder / CONFIG} "
                "--run.resume), or pass an adapter with --model.adapter"
            )
        model = model.model_copy(update={"adapter": folder / "adapter"})
    return cfg.model_copy(update={"model": model, "run": run})
