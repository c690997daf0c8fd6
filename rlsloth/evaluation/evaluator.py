"""Evaluation by sampling: complete held-out problems and measure the accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from rlsloth.config import EvalConfig
from rlsloth.evaluation.problems import heldout_problems
from rlsloth.evaluation.result import EvalResult, assess, describe, verdict_counts
from rlsloth.memory.out_of_memory import advise
from rlsloth.policy.policy import Policy
from rlsloth.records import Group
from rlsloth.rollout.collector import Collector
from rlsloth.run.run import Run


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluate a policy on held-out problems."""

    cfg: EvalConfig
    run: Run
    policy: Policy
    collector: Collector
    deciding: int
    """Position of the reward that decides whether a completion is correct."""

    def evaluate(self, step: int, *, name: str = "", base: bool = False) -> EvalResult:
        """Evaluate the policy, or with ``base`` the model without its adapter, and log the result.

        Raises:
            UserError: there are no held-out problems, or none gets a score of the deciding reward.
        """
        cfg, collector, run = self.cfg, self.collector, self.run
        problems = heldout_problems(collector.env, cfg)
        sampling = replace(
            collector.sampling("evaluation"),
            temperature=cfg.temperature,
            max_tokens=cfg.max_tokens or collector.rollout.max_tokens,
            cut_tail=1.0,
        )
        weights = collector.engine.base_model() if base else nullcontext()
        with run.timed("eval"), advise("rollout", self.policy.model), weights:
            samples = cfg.samples if cfg.temperature else 1  # more would be copies
            groups = collector.collect(problems, samples, sampling, step=step)
            report = collector.scorer.score(groups, step=step)
        examples = {(each.reward, each.kind): f"; e.g. {each.detail}" for each in report.details}
        for reward in report.rewards:
            for kind, count in reward.failures.items():
                example = examples.get((reward.name, kind), "")
                run.warn(
                    f"evaluation: reward {reward.name} failed on {count} completions "
                    f"({kind}{example}), which are left out"
                )
        self._warn_unreachable(groups)
        result = assess(groups, self.deciding, cfg.correct_at)
        self._warn_left_out(groups)
        run.log_eval(step, name, result.metrics())
        run.say(f"evaluation {name or f'after step {step}'}: {describe(result)}")
        for line in verdict_counts(groups):
            run.say(line)
        return result

    def _warn_left_out(self, groups: Sequence[Group]) -> None:
        """Name the problems to which the deciding reward does not apply."""
        rows = [
            group.prompt.index + 1
            for group in groups
            if all(r.scores[self.deciding].value is None for r in group.rollouts)
        ]
        if rows:
            named = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            self.run.warn(
                f"evaluation: {len(rows)} of {len(groups)} held-out problems are left out, since "
                f"reward {groups[0].rollouts[0].scores[self.deciding].name} gives them no score "
                f"(row {named}): check the gold of these rows, or pass another reward with "
                "--eval.reward"
            )

    def _warn_unreachable(self, groups: Sequence[Group]) -> None:
        """Warn if no score reaches ``eval.correct_at``, which makes the accuracy 0."""
        values = [r.scores[self.deciding].value for g in groups for r in g.rollouts]
        best = max((value for value in values if value is not None), default=0.0)
        if 0 < best < self.cfg.correct_at:
            self.run.warn(
                f"no completion counts as correct: the best score is {best:g}, below "
                f"--eval.correct-at {self.cfg.correct_at:g}; lower it if that score is right"
            )
