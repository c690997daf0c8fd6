"""Requests to the memory plan: each kind of run in the plan's terms, and its heaviest part."""

from __future__ import annotations

from rlsloth.config import GrpoConfig, ProblemsConfig, TrainingConfig
from rlsloth.config.sft import SupervisedConfig
from rlsloth.data.example import Example
from rlsloth.environments.loading import declaration
from rlsloth.memory.activations import Stream
from rlsloth.memory.workload import Request, Sampling, make_workload
from rlsloth.policy.lora import dora_setting
from rlsloth.rollout.engines import choose_engine, later_engines
from rlsloth.training.heaviest import Heaviest


def grpo_request(cfg: GrpoConfig, longest_prompt: int) -> Request:
    """Make the request of ``rlsloth grpo``; ``longest_prompt`` is in tokens."""
    return sampling_request(
        cfg, cfg, longest_prompt, prompts=cfg.prompts_per_step, group_size=cfg.group_size
    )


def sampling_request(
    cfg: TrainingConfig,
    problems: ProblemsConfig,
    longest_prompt: int,
    *,
    prompts: int,
    group_size: int,
) -> Request:
    """Make the request of a run that samples, in its steps and its evaluations.

    Args:
        cfg: the sections about training.
        problems: the sections about problems.
        longest_prompt: tokens of the longest prompt.
        prompts: prompts of a step.
        group_size: completions of each prompt.
    """
    workload = make_workload(
        cfg.model,
        problems.rollout,
        cfg.eval,
        prompts=prompts,
        group_size=group_size,
        longest_prompt=longest_prompt,
        single_turn=declaration(problems.env).single_turn,
    )
    dora = dora_setting(cfg.lora, cfg.model)
    choice = choose_engine(problems.rollout, "cuda", dora=dora, planned=True)  # plans are for GPUs
    fallback = choice.fallback.memory if choice.fallback else None
    other = next((kind.memory for kind in later_engines(problems.rollout, choice.kind, dora)), None)
    sampling = Sampling(problems.rollout, workload, choice.kind.memory, fallback, other)
    return Request(cfg.model, cfg.lora, cfg.optim, cfg.tokens_per_microbatch, sampling)


def examples_request(cfg: SupervisedConfig, longest: Example) -> Request:
    """Make the request of training on examples; ``longest`` has the longest stream of all."""
    answers = len(longest.answers)
    prompt = len(longest.prompt_ids) if answers > 1 else 0
    stream = Stream(prompt, -(-(longest.packed - prompt) // answers), answers)
    request = Request(
        cfg.model,
        cfg.lora,
        cfg.optim,
        cfg.tokens_per_microbatch,
        stream=stream,
        samples=cfg.samples_per_step,
        longest_example=longest.packed,
    )
    if not cfg.eval.generate:
        return request
    dora = dora_setting(cfg.lora, cfg.model)
    choice = choose_engine(cfg.rollout, "cuda", dora=dora, planned=True)
    return request.with_shared_weights() if choice.kind.memory.shares_weights else request


def heaviest_of(request: Request, longest: int) -> Heaviest:
    """Describe a run's heaviest micro-batch.

    Args:
        request: the run.
        longest: tokens of the longest example, or of the longest prompt with its completion.
    """
    phase = "examples" if request.sampling is None else "update"
    return Heaviest(request.micro_batch_stream(), longest, phase, request.most_tokens)


def evaluation_request(cfg: SupervisedConfig, longest_prompt: int) -> Request:
    """Make the request of an engine that only solves held-out problems (``eval.generate``)."""
    return sampling_request(cfg, cfg, longest_prompt, prompts=1, group_size=2)
