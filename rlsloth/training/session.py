"""A run of any loop: configuration, run folder, policy, data, evaluation and progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from rlsloth.config import TrainingConfig
from rlsloth.data.example import Example
from rlsloth.data.sampler import EpochSampler, SamplerState
from rlsloth.evaluation.evaluator import Evaluator
from rlsloth.evaluation.result import EvalResult, result_summary
from rlsloth.memory.out_of_memory import advise
from rlsloth.policy.lora import save_adapter
from rlsloth.policy.policy import Policy
from rlsloth.records import PackedBatch, StepStats
from rlsloth.run.run import Run
from rlsloth.seeding import derive_seed
from rlsloth.training.progress import Progress, resume, run_summary, save
from rlsloth.training.skips import Skips

Config = TypeVar("Config", bound=TrainingConfig)
Item = TypeVar("Item")
Metrics = dict[str, float]
HeldoutLoss = Callable[[Sequence[Example]], Metrics]
"""Function from held-out examples to the figures of an evaluation, with ``loss`` among them."""


def step_metrics(stats: StepStats) -> Metrics:
    """Return the figures of an optimizer update that every loop logs."""
    return {"grad_norm": stats.grad_norm, "learning_rate": stats.learning_rate}


@dataclass(slots=True)
class Session(Generic[Config, Item]):
    """A run of a loop. The loop computes updates; the session does everything around them."""

    cfg: Config
    """The configuration with the memory plan's decisions; config.yaml has only the user's."""
    run: Run
    policy: Policy
    sampler: EpochSampler[Item]
    """Training prompts or examples, in the order of their epochs."""
    evaluator: Evaluator | None = None
    """Solves held-out problems; None: the run does not sample."""
    heldout: Sequence[Example] = ()
    """Examples for the held-out loss."""
    heldout_loss: HeldoutLoss | None = None
    """Measures the held-out loss; None: the run has none."""
    cursor: Callable[[], SamplerState] | None = None
    """Returns the position in the data for a checkpoint; None: the sampler's own."""
    progress: Progress = field(default_factory=lambda: Progress(1, 0))
    skips: Skips = field(init=False)
    started: float = field(default_factory=time.monotonic)
    """Reading of the monotonic clock, in seconds, when opening began."""

    def __post_init__(self) -> None:
        self.skips = Skips(self.cfg.optim.max_skipped)

    def begin(self) -> None:
        """Restore the newest undamaged checkpoint if the run resumes; else evaluate before step 1.

        Raises:
            UserError: the run cannot be resumed, or has nothing to evaluate on.
        """
        self.progress = resume(self.run, self.cfg, self.policy, self.sampler, self.skips)
        if self.evaluator is not None:
            self.evaluator.collector.engine.set_weights(self.policy.weights())
        if self.progress.next_step == 1 and self.cfg.eval.at_start:
            self.progress.loss_before, self.progress.before = self.evaluate(0)

    def steps(self) -> Iterator[int]:
        """Yield the number of each remaining step, with torch's generator seeded for it."""
        for step in self.run.steps(self.progress.next_step, self.cfg.steps):
            # For dropout; sampling has a generator of its own.
            torch.manual_seed(derive_seed(self.cfg.seed, "dropout", step))
            yield step

    @contextmanager
    def updating(self, what: str) -> Iterator[None]:
        """Time an update, and turn out-of-memory errors into advice; ``what`` is its key."""
        with self.run.timed("update"), advise(what, self.policy.model):
            yield

    def close_step(
        self, step: int, metrics: Mapping[str, float], batch: PackedBatch, *, tokens: int
    ) -> None:
        """Log a step's figures; ``tokens`` is the number that the step trained on or sampled."""
        self.progress.num_tokens += tokens
        self.progress.next_step = step + 1
        counts = {
            "num_tokens": float(self.progress.num_tokens),
            "trained_tokens": float(batch.trained_tokens),
        }
        self.run.log(step, {**metrics, **counts})

    def end_step(self, step: int, batch: PackedBatch, *, skipped: bool) -> None:
        """Count a skipped update; evaluate and save a checkpoint if they are due.

        Raises:
            UserError: too many updates in a row were skipped.
        """
        cfg = self.cfg
        self.skips.check(skipped, batch, self.run, step)
        if cfg.eval.every and step % cfg.eval.every == 0 and step < cfg.steps:
            self.evaluate(step)
        if step == cfg.steps or (cfg.run.save_every and step % cfg.run.save_every == 0):
            with self.run.timed("checkpoint"):
                cursor = self.cursor() if self.cursor else self.sampler.state()
                save(self.run, self.policy, self.progress, cursor, self.skips, cfg.run.keep)

    def evaluate(self, step: int) -> tuple[float | None, EvalResult | None]:
        """Measure and log the held-out loss and the accuracy on held-out problems.

        Each is None if the run does not have it.
        """
        loss = None
        if self.heldout_loss is not None:
            with self.run.timed("eval"), advise("examples", self.policy.model), torch.no_grad():
                metrics = self.heldout_loss(self.heldout)
            self.run.log_eval(step, "", metrics)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.run.say(f"evaluation after step {step}: {shown} ({len(self.heldout)} examples)")
            loss = metrics["loss"]
        if self.evaluator is None:
            return loss, None
        if self.heldout_loss is None:
            return None, self.evaluator.evaluate(step)
        engine = self.evaluator.collector.engine
        engine.set_weights(self.policy.weights())
        result = self.evaluator.evaluate(step)
        engine.release()  # the update needs its memory
        return loss, result

    def finish(self) -> Path:
        """Write the adapter, evaluate, and write the summary. Returns the run folder."""
        cfg, run = self.cfg, self.run
        save_adapter(self.policy.model, run.dir / "adapter")
        loss, result = self.evaluate(cfg.steps) if cfg.eval.at_end else (None, None)
        losses = {"eval_loss_before": self.progress.loss_before, "eval_loss_after": loss}
        summary: dict[str, Any] = {k: v for k, v in losses.items() if v is not None}
        summary |= result_summary(self.progress.before, result)
        seconds = time.monotonic() - self.started
        run.finish(summary | run_summary(cfg, self.policy, seconds))
        return run.dir
