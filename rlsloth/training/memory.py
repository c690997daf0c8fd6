"""A run as the memory plan takes it: the request of each loop."""

from __future__ import annotations

from rlsloth.config import GrpoConfig, ProblemsConfig, TrainingConfig
from rlsloth.config.sft import SupervisedConfig
from rlsloth.data.example import Example
from rlsloth.environments.loading import declaration
from rlsloth.memory.activations import Stream
from rlsloth.memory.workload import Request, Sampling, make_workload
from rlsloth.rollout.engines import choose_engine


def grpo_request(cfg: GrpoConfig, longest_prompt: int) -> Request:
    """The request of ``rlsloth grpo``; ``longest_prompt``: its tokens."""
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
    """The request of a run that samples ``group_size`` completions of ``prompts`` prompts a step,
    and those of its evaluations."""
    workload = make_workload(
        cfg.model,
        problems.rollout,
        cfg.eval,
        prompts=prompts,
        group_size=group_size,
        longest_prompt=longest_prompt,
        single_turn=declaration(problems.env).single_turn,
    )
    choice = choose_engine(problems.rollout, "cuda", planned=True)  # a plan is a GPU's
    fallback = choice.fallback.memory if choice.fallback else None
    sampling = Sampling(problems.rollout, workload, choice.kind.memory, fallback)
    return Request(cfg.model, cfg.lora, cfg.optim, cfg.tokens_per_microbatch, sampling)


def examples_request(cfg: SupervisedConfig, longest: Example) -> Request:
    """The request of training on examples, of which this one has the longest stream."""
    answers = len(longest.answers)
    prompt = len(longest.prompt_ids) if answers > 1 else 0
    stream = Stream(prompt, -(-(longest.packed - prompt) // answers), answers)
    return Request(
        cfg.model,
        cfg.lora,
        cfg.optim,
        cfg.tokens_per_microbatch,
        stream=stream,
        longest_example=longest.packed,
    )


def evaluation_request(cfg: SupervisedConfig, longest_prompt: int) -> Request:
    """The request of an engine that answers held-out problems (eval.generate)."""
    return sampling_request(cfg, cfg, longest_prompt, prompts=1, group_size=2)
