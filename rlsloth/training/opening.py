"""Opening a session: the parts that can refuse bad input come first, then the model."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from rlsloth.config import GrpoConfig, TrainingConfig
from rlsloth.config.distill import TeacherConfig
from rlsloth.config.sft import SupervisedConfig
from rlsloth.data.example import Example, fingerprint
from rlsloth.data.examples import Reader, load_examples
from rlsloth.data.heldout import overlap_warning, questions_of
from rlsloth.data.renderer import Renderer
from rlsloth.data.sampler import EpochSampler
from rlsloth.environments.protocol import Environment
from rlsloth.errors import UserError
from rlsloth.evaluation.evaluator import Evaluator
from rlsloth.evaluation.problems import (
    Problems,
    heldout_problems,
    longest_prompt,
    open_problems,
    warn_of_open_tag,
)
from rlsloth.memory.decide import DEFAULT_PROMPT, decide
from rlsloth.memory.out_of_memory import advise
from rlsloth.memory.planned_model import longest_prompt as estimate_longest
from rlsloth.memory.report import cut_by_context
from rlsloth.memory.workload import Request
from rlsloth.policy.device import pick_device
from rlsloth.policy.lora import dora_setting
from rlsloth.policy.policy import Policy
from rlsloth.policy.tokenizer import load_tokenizer, read_limits
from rlsloth.records import Prompt
from rlsloth.rollout.collector import Collector
from rlsloth.rollout.engines import Choice, choose_engine
from rlsloth.rollout.trial import probe_packing, trial_backward
from rlsloth.run.run import Run
from rlsloth.training import contents
from rlsloth.training.collector import open_collector, open_evaluator
from rlsloth.training.data_lines import (
    describe_sampling,
    fitting_problems,
    say_of_prompts,
)
from rlsloth.training.examples import check_longest, show_first, warn_of_data, warn_of_overlap
from rlsloth.training.memory import (
    examples_request,
    grpo_request,
    heaviest_of,
    sampling_request,
)
from rlsloth.training.policy import open_policy, write_plan
from rlsloth.training.preload import (
    finish_imports,
    import_sampler,
    import_transformers,
    in_parallel,
)
from rlsloth.training.progress import refuse_changes
from rlsloth.training.session import Session

Training = TypeVar("Training", bound=TrainingConfig)
Supervised = TypeVar("Supervised", bound=SupervisedConfig)


def open_grpo(
    cfg: GrpoConfig, stack: ExitStack, *, evaluated: str | None = None
) -> Session[GrpoConfig, Prompt]:
    """Open a session that trains on its own samples.

    ``evaluated`` is the line that says what is evaluated, if nothing is trained.

    Raises:
        UserError: bad input.
    """
    started, trains = time.monotonic(), evaluated is None
    problems, run = _start_sampling(cfg, stack, evaluated)
    env = problems.env
    named = cfg.tokens_per_microbatch
    if trains:
        decided = decide(cfg, partial(_grpo_request, cfg, env.train), run.say, run.warn)
        cfg = decided.applied(cfg)
    policy = open_policy(
        cfg,
        run,
        decided.placements if trains else None,
        temperature=cfg.rollout.temperature,
        total_updates=cfg.steps * cfg.updates_per_rollout * trains,
    )
    renderer = Renderer(policy.tokenizer, cfg.env, policy.eos_token_ids)
    renderer.check([*env.train, *env.heldout])
    longest = longest_prompt(renderer, env.train, policy)
    heldout = longest_prompt(renderer, env.heldout[: cfg.eval.problems], policy)
    if trains:
        with advise("trial", policy.model):
            trial_backward(policy)
    one = min(longest + cfg.rollout.max_tokens, policy.context)
    cfg = _with_room(cfg, named, one)
    request = grpo_request(cfg, longest).placed_as(policy.placements if trains else None)
    collector = open_collector(
        cfg,
        problems,
        request,
        policy,
        renderer,
        run,
        stack,
        seed=cfg.seed,
        longest=max(longest, heldout) + max(cfg.rollout.max_tokens, cfg.eval.max_tokens or 0),
        temperatures=(cfg.rollout.temperature, cfg.eval.temperature),
    )
    if trains:
        write_plan(run, cfg.microbatch, policy, collector.engine)
        _check_grpo(cfg, env, longest, policy.context)
        if cut := cut_by_context(policy.context, longest, cfg.rollout.max_tokens):
            run.say(cut)
    describe_sampling(run, problems, policy)
    warn_of_open_tag(run, renderer, problems, cfg.reward)
    evaluator = Evaluator(cfg.eval, run, policy, collector, problems.deciding)
    sampler = EpochSampler(env.train, cfg.seed, digest=contents.hash_prompts(env, env.train))
    inputs = contents.of_model(cfg.model, policy) | contents.of_problems(cfg, env)
    session = Session(cfg, run, policy, sampler, evaluator, contents=inputs, started=started)
    session.heaviest = heaviest_of(request, one) if trains else None
    stack.push(session.leave)
    return session


def open_examples(cfg: Supervised, stack: ExitStack, read: Reader) -> Session[Supervised, Example]:
    """Open a session that trains on a dataset of examples.

    Args:
        cfg: the configuration.
        stack: closes the session's parts.
        read: makes examples of the dataset's rows.

    Raises:
        UserError: bad input.
    """
    started = time.monotonic()
    finish_imports()
    problems = engine = None
    if cfg.eval.generate:
        engine = _choose_engine(cfg)
        problems = open_problems(cfg, cfg.seed, cfg.eval.reward, stack)
        problems = fitting_problems(cfg.model, cfg.env, problems)
        heldout_problems(problems.env, cfg.eval)
    data = load_examples(cfg, read, load_tokenizer(cfg.model), *read_limits(cfg.model))
    check_longest(cfg, data)
    run = stack.enter_context(Run.start(cfg))
    refuse_changes(run, "data.")
    if engine is not None:
        run.say(f"rollout engine: {engine.text}")
    warn_of_data(run, data)
    total = None
    if not cfg.steps:
        total = math.ceil((cfg.epochs or 1) * len(data.train))
        steps = math.ceil(total / cfg.samples_per_step)
        cfg = cfg.model_copy(update={"steps": steps, "epochs": None})
    named = cfg.tokens_per_microbatch
    decided = decide(cfg, partial(examples_request, cfg, data.longest), run.say, run.warn)
    cfg = decided.applied(cfg)
    cfg = _with_room(cfg, named, data.longest.packed)
    policy = open_policy(cfg, run, decided.placements, temperature=1.0, total_updates=cfg.steps)
    show_first(run, policy, data)
    with advise("trial", policy.model):
        probe_packing(policy, data.train[0].group())
        trial_backward(policy)
    evaluator = open_evaluator(cfg, problems, policy, run, stack) if problems else None
    if problems is not None:
        say_of_prompts(run, problems)
        warn_of_overlap(problems.env, data, run)
    engine_used = evaluator.collector.engine if evaluator else None
    write_plan(run, cfg.microbatch, policy, engine_used)
    sampler = EpochSampler(data.train, cfg.seed, "examples", fingerprint(data.train), total)
    run.say(
        f"{len(data.train)} examples, {len(data.heldout)} held out; {cfg.steps} steps of "
        f"{cfg.samples_per_step}; {policy.device}, attention {policy.backend}"
    )
    inputs = contents.of_model(cfg.model, policy) | contents.of_examples(data.heldout)
    if problems is not None:
        inputs |= contents.of_problems(cfg, problems.env)
    session = Session(
        cfg, run, policy, sampler, evaluator, data.heldout, contents=inputs, started=started
    )
    session.heaviest = heaviest_of(examples_request(cfg, data.longest), data.longest.packed)
    stack.push(session.leave)
    return session


def open_teacher(
    cfg: TeacherConfig, stack: ExitStack, *, prompts: int, samples: int
) -> tuple[Run, Policy, Collector]:
    """Open a run that samples but does not train.

    Args:
        cfg: the configuration.
        stack: closes the run's parts.
        prompts: prompts that are sampled together.
        samples: completions of each prompt.

    Raises:
        UserError: bad input.
    """
    problems, run = _start_sampling(cfg, stack)
    env = problems.env
    policy = open_policy(cfg, run, temperature=cfg.rollout.temperature, total_updates=1)
    renderer = Renderer(policy.tokenizer, cfg.env, policy.eos_token_ids)
    renderer.check([*env.train, *env.heldout])
    longest = longest_prompt(renderer, env.train, policy)
    collector = open_collector(
        cfg,
        problems,
        sampling_request(cfg, cfg, longest, prompts=prompts, group_size=samples).placed_as(None),
        policy,
        renderer,
        run,
        stack,
        seed=cfg.seed,
        longest=longest + cfg.rollout.max_tokens,
        temperatures=(cfg.rollout.temperature,),
    )
    describe_sampling(run, problems, policy)
    return run, policy, collector


def _start_sampling(
    cfg: GrpoConfig | TeacherConfig, stack: ExitStack, evaluated: str | None = None
) -> tuple[Problems, Run]:
    """Open the problems while libraries are imported, then start the run. Raises UserError."""
    engine = _choose_engine(cfg)
    sampler = partial(import_sampler, engine.kind, cfg.model, cfg.rollout)
    with in_parallel(import_transformers, sampler):
        problems = open_problems(cfg, cfg.seed, cfg.eval.reward, stack)
    problems = fitting_problems(cfg.model, cfg.env, problems)
    run = stack.enter_context(Run.start(cfg))
    refuse_changes(run, "env.")
    run.say(f"rollout engine: {engine.text}")
    say_of_prompts(run, problems)
    env = problems.env
    if text := overlap_warning(questions_of(env.train), questions_of(env.heldout)):
        run.warn(text)
    if evaluated is not None:
        run.say(evaluated)
    return problems, run


def _choose_engine(cfg: GrpoConfig | TeacherConfig | SupervisedConfig) -> Choice:
    device = pick_device(cfg.model.device)
    return choose_engine(cfg.rollout, device.type, dora=dora_setting(cfg.lora, cfg.model))


def _with_room(cfg: Training, named: int | None, least: int) -> Training:
    """Copy a configuration with micro-batches of at least ``least`` tokens, unless the user has
    ``named`` their size."""
    if named is not None:
        return cfg
    return cfg.model_copy(update={"tokens_per_microbatch": max(cfg.microbatch, least)})


def _grpo_request(cfg: GrpoConfig, prompts: Sequence[Prompt]) -> Request:
    """Make the run's request to the memory plan before the model is loaded."""
    longest = estimate_longest(cfg.model, cfg.env, prompts) or DEFAULT_PROMPT
    return grpo_request(cfg, longest)


def _check_grpo(cfg: GrpoConfig, env: Environment, longest: int, context: int) -> None:
    """Raise UserError before step 1 for input that would only fail later."""
    if cfg.evaluates():
        heldout_problems(env, cfg.eval)
    total = min(longest + cfg.rollout.max_tokens, context)
    if total > cfg.microbatch:
        raise UserError(
            f"a prompt of {longest} tokens with a completion of --rollout.max-tokens "
            f"{cfg.rollout.max_tokens} does not fit --tokens-per-microbatch {cfg.microbatch}; "
            f"raise it to {total}, or lower --rollout.max-tokens"
        )
