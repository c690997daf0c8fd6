"""The parts of a run, put together from its configuration; what the loops share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch

from rlsloth import checkpoint
from rlsloth.chat import Renderer
from rlsloth.config import GrpoConfig
from rlsloth.data import PromptSampler, SamplerState
from rlsloth.engines import open_engine
from rlsloth.environment import Environment, SingleTurn, load_environment, overlap_warning
from rlsloth.evaluate import EvalResult, assess, describe, reward_index
from rlsloth.evaluate_stats import Estimate
from rlsloth.imports import beside, import_sampler, import_transformers
from rlsloth.memory.oom import advise
from rlsloth.planning import decide
from rlsloth.policy.policy import Policy
from rlsloth.probe import trial_backward
from rlsloth.records import Group, Prompt, SamplingParams, UserError
from rlsloth.rollout.collect import collect
from rlsloth.rollout.engine import Engine
from rlsloth.run.folder import SUMMARY
from rlsloth.run.run import Run
from rlsloth.scoring.scorer import Scorer
from rlsloth.seeding import derive_seed


@dataclass(slots=True)
class Progress:
    """Where a run stands."""

    next_step: int
    num_tokens: int
    before: EvalResult | None
    """The evaluation before training."""


@dataclass(slots=True)
class Assembly:
    """Environment, rewards, run folder, policy, engine and prompts of one run."""

    cfg: GrpoConfig
    env: Environment
    scorer: Scorer
    run: Run
    policy: Policy
    renderer: Renderer
    engine: Engine
    prompts: PromptSampler
    longest_prompt: int
    """Tokens of the longest training prompt."""

    @classmethod
    def open(cls, cfg: GrpoConfig, stack: ExitStack, *, trains: bool = True) -> Assembly:
        """Make every part, the cheap ones that can refuse bad input first. Raises UserError."""
        with beside(import_transformers, partial(import_sampler, cfg)):
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
        run = stack.enter_context(Run.start(cfg))
        _refuse_changes(run)
        if text := overlap_warning(env):
            run.warn(text)
        asked = cfg.tokens_per_microbatch
        if trains:
            cfg = decide(cfg, env.train, run.say, run.warn)
        policy = _load_policy(cfg, run)
        renderer = Renderer(policy.tokenizer, cfg.env, policy.eos_token_ids)
        renderer.check([*env.train, *env.heldout])
        longest = _longest(renderer, env.train, policy.context)
        heldout = _longest(renderer, env.heldout[: cfg.eval.problems], policy.context)
        if trains:
            with advise("trial", policy.model):
                trial_backward(policy)
        if asked is None:
            one = min(longest + cfg.rollout.max_tokens, policy.context)
            cfg = cfg.model_copy(update={"tokens_per_microbatch": max(cfg.microbatch, one)})
        context = policy.context
        if isinstance(env, SingleTurn):
            tokens = max(cfg.rollout.max_tokens, cfg.eval.max_tokens or 0)
            context = min(context, max(longest, heldout) + tokens)
        engine = open_engine(cfg, policy, renderer, run, stack, context=context)
        prompts = PromptSampler(env.train, cfg.seed)
        run.say(
            f"{len(env.train)} training prompts, {len(env.heldout)} held out; rewards: "
            f"{', '.join(scorer.names)}; {policy.device}, attention {policy.backend}"
        )
        return cls(cfg, env, scorer, run, policy, renderer, engine, prompts, longest)

    def check_training(self) -> None:
        """Refuse before the first step what training would stumble over later. Raises UserError."""
        cfg = self.cfg
        if cfg.eval.at_start or cfg.eval.every or cfg.eval.at_end:
            self.problems()
        total = min(self.longest_prompt + cfg.rollout.max_tokens, self.policy.context)
        if total > cfg.microbatch:
            raise UserError(
                f"a prompt of {self.longest_prompt} tokens with --rollout.max-tokens "
                f"{cfg.rollout.max_tokens} may not fit --tokens-per-microbatch "
                f"{cfg.microbatch}; raise it to {total}, or lower --rollout.max-tokens"
            )

    def problems(self) -> Sequence[Prompt]:
        """Held-out prompts to evaluate on. Raises UserError when there are none."""
        problems = self.env.heldout[: self.cfg.eval.problems]
        if not problems:
            raise UserError(
                "no held-out problems to evaluate on: pass --env.validation FILE, raise "
                "--env.heldout, or switch evaluation off: --eval.at-start false --eval.at-end false"
            )
        return problems

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

    def save(self, progress: Progress, prompts: SamplerState) -> None:
        """Write a checkpoint from which ``resume`` continues to the same next step, with these
        prompts."""
        tensors, policy = self.policy.state()
        before = progress.before
        state = {
            "next_step": progress.next_step,
            "num_tokens": progress.num_tokens,
            "before": _plain(before) if before else None,
            "prompts": prompts,
            "policy": policy,
        }
        checkpoint.save(
            self.run.dir / "checkpoints", progress.next_step - 1, tensors, state, self.cfg.run.keep
        )

    def resume(self) -> Progress:
        """Where to start: at the newest sound checkpoint if this run resumes, else at step 1."""
        if not self.cfg.run.resume:
            return Progress(1, 0, None)
        found = checkpoint.load_latest(self.run.dir / "checkpoints")
        if found is None:
            self.run.truncate_after(-1)
            self.run.accept_config(self.cfg)
            self.run.say("no checkpoint yet: starting at step 1")
            return Progress(1, 0, None)
        if found.step >= self.cfg.steps and (self.run.dir / SUMMARY).exists():
            raise UserError(
                f"{self.run.dir} has finished its {found.step} steps; raise --steps to train on"
            )
        for warning in found.warnings:
            self.run.warn(warning)
        self.policy.restore(found.tensors, found.state["policy"])
        self.engine.load(self.policy.adapter())
        self.prompts.restore(found.state["prompts"])
        self.run.truncate_after(found.step)
        self.run.accept_config(self.cfg)
        self.run.say(f"resumed from {found.path} after step {found.step}")
        before = found.state["before"]
        return Progress(
            found.state["next_step"], found.state["num_tokens"], _result(before) if before else None
        )

    def summary(
        self, before: EvalResult | None, after: EvalResult | None, seconds: float
    ) -> dict[str, Any]:
        """What summary.json holds."""
        row: dict[str, Any] = {}
        for when, result in (("before", before), ("after", after)):
            if result is not None:
                row[f"accuracy_{when}"] = result.avg.value
                row[f"interval_{when}"] = [result.avg.low, result.avg.high]
                row["problems"], row["samples"] = result.problems, result.samples
        device = self.policy.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return row | {"steps": self.cfg.steps, "seconds": round(seconds, 1), "device": name}


def _load_policy(cfg: GrpoConfig, run: Run) -> Policy:
    """Raises UserError."""
    run.say(f"loading {cfg.model.path}")
    if cfg.model.adapter is not None:
        run.say(f"continuing {cfg.model.adapter}: its rank, alpha and targets, not --lora.*")
    torch.manual_seed(cfg.seed)  # the adapter's starting weights
    policy = Policy.load(
        cfg.model,
        cfg.lora,
        cfg.optim,
        temperature=cfg.rollout.temperature,
        total_updates=cfg.steps * cfg.updates_per_rollout,
    )
    if policy.wrapped is not None:
        run.say(policy.wrapped.line())
    return policy


def _refuse_changes(run: Run) -> None:
    """What a checkpoint's tensors and cursors are made of cannot change on resume."""
    fixed = ("seed", "model.path", "model.revision", "model.adapter", "lora.", "optim.name", "env.")
    for key, (old, new) in run.changes.items():
        if key.startswith(fixed):
            raise UserError(
                f"{run.dir} was made with {key} {old}, which cannot become {new} on resume; start "
                "another run (--model.adapter continues from this one's adapter)"
            )


def _plain(result: EvalResult) -> dict[str, Any]:
    row = {name: getattr(result, name) for name in EvalResult.__slots__}
    for name in ("avg", "majority"):
        row[name] = astuple(row[name])
    return row | {"passed": [(j, astuple(e)) for j, e in result.passed]}


def _result(row: Mapping[str, Any]) -> EvalResult:
    estimates = {name: Estimate(*row[name]) for name in ("avg", "majority")}
    passed = tuple((j, Estimate(*e)) for j, e in row["passed"])
    return EvalResult(**{**row, **estimates, "passed": passed, "scores": tuple(row["scores"])})


def _longest(renderer: Renderer, prompts: Sequence[Prompt], context: int) -> int:
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
