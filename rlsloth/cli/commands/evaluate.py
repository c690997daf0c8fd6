"""``rlsloth eval``: avg@k, pass@k and maj@k of a model, and of an adapter, on held-out problems."""

from __future__ import annotations

import json
from contextlib import ExitStack

import yaml

from rlsloth.config import GrpoConfig
from rlsloth.errors import UserError
from rlsloth.evaluation.intervals import difference_estimate
from rlsloth.run.folder import CONFIG


def run_eval(cfg: GrpoConfig) -> None:
    """``rlsloth eval``: the base model and, if one is named, the adapter, on the same problems.

    Given the config.yaml of a training run, the adapter is the one it trained. Writes eval.json
    into a run folder of its own.
    """
    from rlsloth.training.assembly import Assembly

    cfg = _with_trained_adapter(cfg)
    with ExitStack() as stack:
        parts = Assembly.open(cfg, stack, trains=False)
        base = parts.evaluate(0, name="base", base=True)
        figures: dict[str, object] = {"base": base.metrics()}
        if cfg.model.adapter is None:
            parts.run.say("no --model.adapter: the base alone was evaluated")
        if cfg.model.adapter is not None:
            adapter = parts.evaluate(0, name="adapter")
            gain = difference_estimate(base.scores, adapter.scores)
            parts.run.say(
                f"adapter - base: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] "
                f"avg@{base.samples}, paired by problem"
            )
            figures |= {
                "adapter": adapter.metrics(),
                "difference": [gain.value, gain.low, gain.high],
            }
        (parts.run.dir / "eval.json").write_text(json.dumps(figures, indent=1))
        parts.run.finish({"problems": base.problems, "samples": base.samples, **figures})


def _with_trained_adapter(cfg: GrpoConfig) -> GrpoConfig:
    """Of the configuration of a training run: evaluate its adapter, and leave its folder alone.

    An adapter other than the one the run started from was asked for, and stays.
    """
    folder = cfg.run.dir
    if folder is None or not (folder / CONFIG).is_file():
        return cfg
    if (folder / "eval.json").exists():
        raise UserError(f"{folder} holds an evaluation; give another folder with --run.dir")
    run = cfg.run.model_copy(update={"dir": None, "resume": False})
    started_from = yaml.safe_load((folder / CONFIG).read_text())["model"]["adapter"]
    model = cfg.model
    if started_from == (str(model.adapter) if model.adapter else None):
        if not (folder / "adapter").is_dir():
            raise UserError(
                f"{folder} has no adapter yet: let the run finish (rlsloth grpo {folder / CONFIG} "
                "--run.resume), or name an adapter with --model.adapter"
            )
        model = model.model_copy(update={"adapter": folder / "adapter"})
    return cfg.model_copy(update={"model": model, "run": run})
