"""A run of any loop: configuration, run folder, policy, data, evaluation and progress."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from rlsloth.config import TrainingConfig
from rlsloth.data.example import Example
from rlsloth.data.sampler import EpochSampler, SamplerState
from rlsloth.errors import UserError
from rlsloth.evaluation.evaluator import Evaluator
from rlsloth.evaluation.result import EvalResult, result_summary
from rlsloth.memory.out_of_memory import advise, again
from rlsloth.policy.activations.placement import Placements
from rlsloth.policy.device import wider_than_half
from rlsloth.policy.policy import Policy
from rlsloth.policy.trainable import save_trained
from rlsloth.records import PackedBatch, StepStats
from rlsloth.run.run import Run
from rlsloth.seeding import derive_seed
from rlsloth.training.gradients import Budget
from rlsloth.training.heaviest import Heaviest, try_heaviest
from rlsloth.training.policy import write_plan
from rlsloth.training.progress import Contents, Progress, resume, run_summary, save
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
    heaviest: Heaviest | None = None
    """The heaviest micro-batch, which is tried before the first step; None: nothing is trained."""
    cursor: Callable[[], SamplerState] | None = None
    """Returns the position in the data for a checkpoint; None: the sampler's own."""
    progress: Progress = field(default_factory=lambda: Progress(1, 0))
    skips: Skips = field(init=False)
    budget: Budget = field(init=False)
    """The number of tokens in a micro-batch; every step and evaluation packs by it."""
    contents: Contents = field(default_factory=dict)
    """Digests of the run's inputs, which a resume compares."""
    started: float = field(default_factory=time.monotonic)
    """Reading of the monotonic clock, in seconds, when opening began."""
    _planned: tuple[int, Placements] = field(init=False)
    """Settings in plan.json."""
    _rest: SamplerState | None = field(init=False, default=None)
    """Position in the data while the policy is between two steps; None: an update is under way."""
    _saved: int = field(init=False, default=0)
    """Step of the newest checkpoint; 0: there is none."""
    _missing: bool = field(init=False, default=False)
    """Whether the last step's evaluation is due and not complete."""

    def __post_init__(self) -> None:
        half = self.policy.dtype == torch.float16
        wider = wider_than_half(self.policy.device) if half else ""
        self.skips = Skips(self.cfg.optim.max_skipped, wider)
        self.budget = Budget(self.cfg.microbatch)
        self._planned = self.budget.tokens, self.policy.placements

    def begin(self) -> None:
        """Restore the newest undamaged checkpoint if the run resumes; else evaluate before step 1.

        On a GPU the heaviest micro-batch is tried before that, unless a single step is left, which
        would not gain by it. An evaluation that is missing after the checkpoint's step is made.

        Raises:
            UserError: the run cannot be resumed, or has nothing to evaluate on.
        """
        self.progress, missing = resume(
            self.run, self.cfg, self.policy, self.sampler, self.skips, self.contents
        )
        self._saved = self.progress.next_step - 1
        if self.evaluator is not None:
            self.evaluator.collector.engine.set_weights(self.policy.weights())
        self._rest = self.sampler.state()
        done = self.progress.next_step - 1
        if done + 1 < self.cfg.steps and self.policy.device.type == "cuda":
            self.try_heaviest()
        if done == 0 and self.cfg.eval.at_start:
            self.progress.loss_before, self.progress.before = self.evaluate(0)
        elif missing and self._evaluates_after(done):
            self.evaluate(done)

    def try_heaviest(self) -> None:
        """Try the heaviest micro-batch, and change what does not fit, with the memory of an update.

        Raises:
            UserError: the GPU's memory ran out with the smallest micro-batch.
        """
        if self.heaviest is None:
            return
        if self.evaluator is not None:
            self.evaluator.collector.engine.release()
        with advise(self.heaviest.phase, self.policy.model):
            try_heaviest(self.policy, self.heaviest, self.budget, self.run.say, self.run.warn)
        self._write_changed_plan()

    def steps(self) -> Iterator[int]:
        """Yield the number of each remaining step, with torch's generator seeded for it."""
        # What is there now stays: else each full collection of garbage would traverse all modules,
        # half a million objects, which takes 0.3 s in the middle of a step.
        gc.collect()
        gc.freeze()
        try:
            for step in self.run.steps(self.progress.next_step, self.cfg.steps):
                # For dropout; sampling has a generator of its own.
                torch.manual_seed(derive_seed(self.cfg.seed, "dropout", step))
                yield step
        finally:
            gc.unfreeze()

    @contextmanager
    def updating(self, what: str) -> Iterator[None]:
        """Time an update, and turn out-of-memory errors into advice; ``what`` is its key.

        From here to the step's end in ``end_step`` no signal stops the run. If an error ends the
        step before it has changed the policy, ``leave`` can save a checkpoint of the step before.
        """
        self.run.stopper.hold()
        rest, self._rest = self._rest, None
        before = self.policy.version, self.policy.scheduler.last_epoch
        try:
            with self.run.timed("update"), advise(what, self.policy.model):
                yield
        except Exception:
            if before == (self.policy.version, self.policy.scheduler.last_epoch):
                self.policy.optimizer.zero_grad(set_to_none=True)
                self._rest = rest
            raise
        self._write_changed_plan()

    def _write_changed_plan(self) -> None:
        """Write plan.json again if memory that ran out has changed its settings."""
        now = self.budget.tokens, self.policy.placements
        if now != self._planned:
            self._planned = now
            engine = self.evaluator.collector.engine if self.evaluator else None
            write_plan(self.run, now[0], self.policy, engine)

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
            Stopped: a signal came during the update.
        """
        cfg = self.cfg
        scale = self.policy.loss_scale.value
        self.skips.check(skipped, batch, self.run, step, scale=scale)
        self._rest = self.cursor() if self.cursor else self.sampler.state()
        self._missing = self._evaluates_after(step)
        self.run.stopper.release()
        if self._missing:
            self.evaluate(step)
            self._missing = False
        if step == cfg.steps or (cfg.run.save_every and step % cfg.run.save_every == 0):
            with self.run.timed("checkpoint"), self.run.stopper.finishing():
                # The last step's evaluation is part of the run's end, which may never come.
                self._save(missing=step == cfg.steps)

    def _evaluates_after(self, step: int) -> bool:
        every = self.cfg.eval.every
        return bool(every and step % every == 0 and 0 < step < self.cfg.steps)

    def _save(self, *, missing: bool) -> None:
        """Save a checkpoint of the last step; ``missing``: its evaluation may still be missing."""
        assert self._rest is not None
        save(
            self.run,
            self.policy,
            self.progress,
            self._rest,
            self.skips,
            self.contents,
            missing=missing,
            keep=self.cfg.run.keep,
        )
        self._saved = self.progress.next_step - 1

    def leave(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Save a checkpoint when an exception or a signal ends the run between two updates.

        The step that it interrupts is made again on resume.
        """
        done = self.progress.next_step - 1
        if kind is None or self._rest is None or done == self._saved:
            return
        with self.run.stopper.closing():
            try:
                self._save(missing=self._missing or done == self.cfg.steps)
            except (UserError, OSError) as failure:
                self.run.warn(f"no checkpoint of step {done}: {failure}")
            else:
                self.run.say(f"checkpoint of step {done} saved; --run.resume continues from it")

    def evaluate(self, step: int) -> tuple[float | None, EvalResult | None]:
        """Measure and log the held-out loss and the accuracy on held-out problems.

        Each is None if the run does not have it.
        """
        loss = None
        if self.heldout_loss is not None:
            with self.run.timed("eval"), advise("examples", self.policy.model), torch.no_grad():
                measure = partial(self.heldout_loss, self.heldout)
                metrics = again(measure, "the held-out loss", self.run.warn)
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
        """Write what was trained, evaluate, and write the summary. Returns the run folder."""
        cfg, run = self.cfg, self.run
        save_trained(self.policy.model, self.policy.tokenizer, run.dir)
        loss, result = self.evaluate(cfg.steps) if cfg.eval.at_end else (None, None)
        losses = {"eval_loss_before": self.progress.loss_before, "eval_loss_after": loss}
        summary: dict[str, Any] = {k: v for k, v in losses.items() if v is not None}
        summary |= result_summary(self.progress.before, result)
        seconds = time.monotonic() - self.started
        run.finish(summary | run_summary(cfg, self.policy, seconds))
        return run.dir
