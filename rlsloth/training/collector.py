"""Opening the rollout engine of a run, and the evaluator that samples with it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from rlsloth.config import ProblemsConfig
from rlsloth.config.sft import SupervisedConfig
from rlsloth.data.renderer import Renderer
from rlsloth.evaluation.evaluator import Evaluator
from rlsloth.evaluation.problems import Problems, heldout_problems, longest_prompt
from rlsloth.memory.workload import Request
from rlsloth.policy.policy import Policy
from rlsloth.rollout.collector import Collector
from rlsloth.rollout.opening import open_engine
from rlsloth.run.run import Run
from rlsloth.training.memory import evaluation_request


def open_collector(
    cfg: ProblemsConfig,
    problems: Problems,
    request: Request,
    policy: Policy,
    renderer: Renderer,
    run: Run,
    stack: ExitStack,
    *,
    seed: int,
    longest: int,
    temperatures: Iterable[float],
) -> Collector:
    """Start the rollout engine on the policy's weights.

    Args:
        cfg: the sections about problems.
        problems: environment and rewards.
        request: the run as the memory plan takes it; it sizes the engine's cache.
        policy: the loaded policy.
        renderer: turns messages into tokens and back.
        run: for messages.
        stack: closes the engine when it is closed.
        seed: the run's seed.
        longest: tokens of the longest prompt with the longest completion.
        temperatures: temperatures that the engine will sample with.

    Raises:
        UserError: the engine cannot run this model, or lacks memory.
    """
    context = policy.context
    if problems.env.single_turn:
        context = min(context, longest)
    engine = open_engine(
        request, policy, renderer, run, stack, context=context, temperatures=temperatures
    )
    return Collector(
        engine,
        renderer,
        problems.env,
        problems.scorer,
        cfg.rollout,
        cfg.env.max_turns,
        policy.context,
        policy.embeddings,
        seed,
    )


def open_evaluator(
    cfg: SupervisedConfig, problems: Problems, policy: Policy, run: Run, stack: ExitStack
) -> Evaluator:
    """Open the engine and the evaluator that solves held-out problems (``eval.generate``).

    Raises:
        UserError: there are no held-out problems, or the engine cannot run this model.
    """
    renderer = Renderer(policy.tokenizer, cfg.env, policy.eos_token_ids)
    renderer.check(problems.env.heldout)
    prompts = heldout_problems(problems.env, cfg.eval)
    longest = longest_prompt(renderer, prompts, policy)
    collector = open_collector(
        cfg,
        problems,
        evaluation_request(cfg, longest),
        policy,
        renderer,
        run,
        stack,
        seed=cfg.seed,
        longest=longest + (cfg.eval.max_tokens or cfg.rollout.max_tokens),
        temperatures=(cfg.rollout.temperature, cfg.eval.temperature),
    )
    return Evaluator(cfg.eval, run, policy, collector, problems.deciding)
