"""What answers held-out problems: environment, rewards, policy and engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from rlsloth.config import EvalConfig, GrpoConfig
from rlsloth.data.renderer import Renderer
from rlsloth.environments.loading import load_environment
from rlsloth.environments.protocol import Environment
from rlsloth.errors import UserError
from rlsloth.evaluation.result import EvalResult, assess, describe, reward_index
from rlsloth.memory.out_of_memory import advise
from rlsloth.policy.policy import Policy
from rlsloth.records import Group, Prompt, SamplingParams
from rlsloth.rollout.collect import collect
from rlsloth.rollout.engine import Engine
from rlsloth.run.run import Run
from rlsloth.scoring.scorer import Scorer
from rlsloth.seeding import derive_seed


def open_problems(cfg: GrpoConfig, stack: ExitStack) -> tuple[Environment, Scorer]:
    """The environment and its rewards, tried on its prompts; closed with ``stack``. Raises
    UserError."""
    env = load_environment(cfg.env, cfg.seed)
    rewards = cfg.rewards or list(env.default_rewards)
    if not rewards:
        raise UserError(
            f"environment {env.name} brings no reward of its own: pass --rewards NAME "
            "(see `rlsloth rewards list`)"
        )
    scorer = stack.enter_context(Scorer(rewards, cfg.reward))
    reward_index(cfg, scorer.names)
    scorer.wait_ready()
    scorer.check([*env.train, *env.heldout])
    return env, scorer


def heldout_problems(env: Environment, cfg: EvalConfig) -> Sequence[Prompt]:
    """Prompts to evaluate on. Raises UserError when there are none."""
    problems = env.heldout[: cfg.problems]
    if not problems:
        raise UserError(
            "no held-out problems to evaluate on: pass --env.validation FILE, raise "
            "--env.heldout, or switch evaluation off: --eval.at-start false --eval.at-end false"
        )
    return problems


@dataclass(slots=True)
class Examiner:
    """The parts that an evaluation by sampling needs."""

    cfg: GrpoConfig
    env: Environment
    scorer: Scorer
    run: Run
    policy: Policy
    renderer: Renderer
    engine: Engine

    def problems(self) -> Sequence[Prompt]:
        """Held-out prompts to evaluate on. Raises UserError when there are none."""
        return heldout_problems(self.env, self.cfg.eval)

    def sampling(self, *use: int | str) -> SamplingParams:
        """Training's sampling parameters; random numbers depend on the run's seed and the use
        alone."""
        cfg = self.cfg.rollout
        return SamplingParams(
            max_tokens=cfg.max_tokens,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            top_k=cfg.top_k,
            min_p=cfg.min_p,
            stop=tuple(cfg.stop),
            seed=derive_seed(self.cfg.seed, *use),
            cut_tail=cfg.cut_tail,
        )

    def collect(
        self, prompts: Sequence[Prompt], n: int, sampling: SamplingParams, *, step: int
    ) -> list[Group]:
        """``n`` rollouts of each prompt, unscored; the scorer begins with each group as soon as it
        is complete."""
        return collect(
            self.engine,
            self.renderer,
            self.env,
            prompts,
            n,
            sampling,
            max_turns=self.cfg.env.max_turns,
            context=self.policy.context,
            on_group=lambda group: self.scorer.submit(group, step=step),
        )

    def evaluate(self, step: int, *, name: str = "", base: bool = False) -> EvalResult:
        """Evaluate the policy (or, with ``base``, the model without any adapter) and log it."""
        cfg = self.cfg.eval
        problems = self.problems()
        sampling = replace(
            self.sampling("evaluation"),
            temperature=cfg.temperature,
            max_tokens=cfg.max_tokens or self.cfg.rollout.max_tokens,
            cut_tail=1.0,
        )
        policy = self.engine.base_model() if base else nullcontext()
        with self.run.timed("eval"), advise("rollout", self.policy.model), policy:
            groups = self.collect(problems, cfg.samples, sampling, step=step)
            report = self.scorer.score(groups, step=step)
        for reward in report.rewards:
            for kind, count in reward.failures.items():
                self.run.warn(f"evaluation: reward {reward.name} failed on {count} ({kind})")
        self._warn_unreachable(groups)
        result = assess(groups, reward_index(self.cfg, self.scorer.names), cfg.correct_at)
        self.run.log_eval(step, name, result.metrics())
        self.run.say(f"evaluation {name or f'after step {step}'}: {describe(result)}")
        return result

    def _warn_unreachable(self, groups: Sequence[Group]) -> None:
        """A reward whose best is below ``eval.correct_at`` would read as accuracy 0 for ever."""
        index = reward_index(self.cfg, self.scorer.names)
        values = [r.scores[index].value for g in groups for r in g.rollouts]
        best = max((value for value in values if value is not None), default=0.0)
        if 0 < best < self.cfg.eval.correct_at:
            self.run.warn(
                f"no answer scored more than {best:g}, which is below --eval.correct-at "
                f"{self.cfg.eval.correct_at:g}: none counts as correct"
            )


def result_summary(before: EvalResult | None, after: EvalResult | None) -> dict[str, Any]:
    """What summary.json says of the evaluations by sampling."""
    row: dict[str, Any] = {}
    for when, result in (("before", before), ("after", after)):
        if result is not None:
            row[f"accuracy_{when}"] = result.avg.value
            row[f"interval_{when}"] = [result.avg.low, result.avg.high]
            row["problems"], row["samples"] = result.problems, result.samples
    return row


def longest_prompt(renderer: Renderer, prompts: Sequence[Prompt], context: int) -> int:
    """Tokens of the longest prompt; refuses one that fills the context. Raises UserError."""
    longest = 0
    for prompt in prompts:
        length = len(renderer.prompt_ids(prompt))
        if length >= context:
            raise UserError(
                f"prompt {prompt.index + 1} has {length} tokens and leaves no room in the model's "
                f"context of {context}; drop it or raise --model.max-context"
            )
        longest = max(longest, length)
    return longest
