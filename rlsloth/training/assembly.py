"""The parts of a run, put together from its configuration; what the loops share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from rlsloth.config import GrpoConfig
from rlsloth.data.heldout import overlap_warning, questions_of
from rlsloth.data.renderer import Renderer
from rlsloth.data.sampler import EpochSampler, SamplerState
from rlsloth.errors import UserError
from rlsloth.evaluation.evaluator import Examiner, longest_prompt, open_problems
from rlsloth.memory.decide import DEFAULT_PROMPT, decide
from rlsloth.memory.out_of_memory import advise
from rlsloth.memory.planned_model import longest_prompt as estimate_longest
from rlsloth.memory.workload import Request
from rlsloth.records import Prompt
from rlsloth.rollout.opening import open_engine
from rlsloth.rollout.trial import trial_backward
from rlsloth.run.run import Run
from rlsloth.training.memory import grpo_request
from rlsloth.training.preload import beside, import_sampler, import_transformers
from rlsloth.training.progress import Progress, load_policy, refuse_changes, resume, save


@dataclass(slots=True)
class Assembly(Examiner):
    """Environment, rewards, run folder, policy, engine and prompts of one run."""

    prompts: EpochSampler[Prompt]
    longest_prompt: int
    """Tokens of the longest training prompt."""

    @classmethod
    def open(cls, cfg: GrpoConfig, stack: ExitStack, *, trains: bool = True) -> Assembly:
        """Make every part, the cheap ones that can refuse bad input first. Raises UserError."""
        with beside(import_transformers, partial(import_sampler, cfg)):
            env, scorer = open_problems(cfg, stack)
        run = stack.enter_context(Run.start(cfg))
        refuse_changes(run, "env.")
        if text := overlap_warning(questions_of(env.train), questions_of(env.heldout)):
            run.warn(text)
        asked = cfg.tokens_per_microbatch
        if trains:
            asks = partial(_request, cfg, env.train)
            cfg = decide(cfg, asks, run.say, run.warn).applied(cfg)
        policy = load_policy(
            cfg,
            run,
            temperature=cfg.rollout.temperature,
            total_updates=cfg.steps * cfg.updates_per_rollout,
        )
        renderer = Renderer(policy.tokenizer, cfg.env, policy.eos_token_ids)
        renderer.check([*env.train, *env.heldout])
        longest = longest_prompt(renderer, env.train, policy.context)
        heldout = longest_prompt(renderer, env.heldout[: cfg.eval.problems], policy.context)
        if trains:
            with advise("trial", policy.model):
                trial_backward(policy)
        if asked is None:
            one = min(longest + cfg.rollout.max_tokens, policy.context)
            cfg = cfg.model_copy(update={"tokens_per_microbatch": max(cfg.microbatch, one)})
        context = policy.context
        if env.single_turn:
            tokens = max(cfg.rollout.max_tokens, cfg.eval.max_tokens or 0)
            context = min(context, max(longest, heldout) + tokens)
        engine = open_engine(
            grpo_request(cfg, longest),
            policy,
            renderer,
            run,
            stack,
            context=context,
            temperatures=(cfg.rollout.temperature, cfg.eval.temperature),
        )
        prompts = EpochSampler(env.train, cfg.seed)
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

    def save(self, progress: Progress, prompts: SamplerState) -> None:
        """Write a checkpoint from which ``resume`` continues to the same next step, with these
        prompts."""
        save(self.run, self.policy, progress, prompts, self.cfg.run.keep)

    def resume(self) -> Progress:
        """Where to start: at the newest sound checkpoint if this run resumes, else at step 1."""
        progress = resume(self.run, self.cfg, self.policy, self.prompts)
        self.engine.set_weights(self.policy.weights())
        return progress


def _request(cfg: GrpoConfig, prompts: Sequence[Prompt]) -> Request:
    """The run as the memory plan takes it, before the model is loaded."""
    longest = estimate_longest(cfg.model, cfg.env, prompts) or DEFAULT_PROMPT
    return grpo_request(cfg, longest)
