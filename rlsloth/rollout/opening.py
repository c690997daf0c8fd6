"""Which rollout engine a run samples with."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from rlsloth.config import GrpoConfig
from rlsloth.data.renderer import Renderer
from rlsloth.errors import UserError
from rlsloth.memory.out_of_memory import advise
from rlsloth.memory.plan import make_plan
from rlsloth.memory.report import describe
from rlsloth.memory.shape import read_shape
from rlsloth.memory.terms import GIB, Cache, Phase
from rlsloth.memory.workload import sequences_at_once
from rlsloth.policy.policy import Policy
from rlsloth.rollout.embedded.engine import TransformersEngine
from rlsloth.rollout.engine import Engine
from rlsloth.rollout.trial import PROMPT_TOKENS, SAMPLED_TOKENS, probe
from rlsloth.rollout.vllm.engine import VllmEngine, check_temperature
from rlsloth.rollout.vllm.memory import completion_bytes, fit_cache
from rlsloth.rollout.vllm.start import check_installed, free_memory
from rlsloth.run.run import Run

CPU_CACHE = 2 * GIB
"""vLLM's cache on a CPU at most, unless one completion needs more."""


def open_engine(
    cfg: GrpoConfig, policy: Policy, renderer: Renderer, run: Run, stack: ExitStack, *, context: int
) -> Engine:
    """The engine asked for, tried out with the policy's adapter; it is closed with ``stack``.

    Args:
        context: tokens of the longest prompt and completion that it will see.

    Raises:
        UserError: vllm was asked for by name and cannot sample from this policy, or packed training
            does not support it.
    """
    if cfg.rollout.engine != "transformers":
        try:
            return _open_vllm(cfg, policy, renderer, run, stack, context)
        except UserError as error:
            if cfg.rollout.engine == "vllm":
                raise UserError(f"--rollout.engine vllm: {error}") from error
            if cfg.rollout.overlap:
                raise UserError(f"--rollout.overlap needs vLLM: {error}") from error
            run.say(f"{error}; sampling with transformers")
        free_memory()  # what the failed engine had, which the error has kept until here
    engine = TransformersEngine(
        policy.model,
        policy.tokenizer,
        transform=policy.logit_transform,
        stop_ids=renderer.stop_ids,
        context=policy.context,
        max_sequences=cfg.rollout.max_sequences,
        device=policy.device,
        cuda_graphs=cfg.rollout.cuda_graphs,
    )
    with advise("rollout", policy.model):
        probe(policy, engine)
    return engine


def _open_vllm(
    cfg: GrpoConfig, policy: Policy, renderer: Renderer, run: Run, stack: ExitStack, context: int
) -> VllmEngine:
    check_installed()
    for temperature in (cfg.rollout.temperature, cfg.eval.temperature):
        check_temperature(temperature)
    context = max(context, PROMPT_TOKENS + SAMPLED_TOKENS)
    cache = size_cache(cfg, policy, context)
    engine = VllmEngine(
        policy.model,
        policy.tokenizer if cfg.rollout.stop else None,  # it costs a second
        stop_ids=renderer.stop_ids,
        context=context,
        max_sequences=cache.asked,
        dtype=policy.dtype,
        device=policy.device,
        kv_cache=cfg.rollout.kv_cache,
        kv_bytes=cache.size,
        kv_stays=cache.stays,
    )
    try:
        with advise("rollout", policy.model):
            engine.load(policy.adapter())
            probe(policy, engine, kv_cache=cfg.rollout.kv_cache)
    except BaseException:
        engine.close()
        raise
    stack.callback(engine.close)
    run.say(f"vLLM: {describe(cache)}")
    return engine


def size_cache(cfg: GrpoConfig, policy: Policy, context: int) -> Cache:
    """vLLM's cache for completions that reach ``context`` tokens with their prompts: as the plan
    for this GPU says, but of no more than what is really free beside what is still to come.

    Raises:
        UserError: the GPU has no room for one completion.
    """
    shape = read_shape(policy.model)
    if policy.device.type == "cpu":
        one = completion_bytes(shape, cfg.rollout.kv_cache, context, policy.dtype.itemsize)
        return fit_cache(one, sequences_at_once(cfg), context, max(one, CPU_CACHE))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(policy.device)
    longest_prompt = max(1, context - cfg.rollout.max_tokens)
    plan = make_plan(shape, cfg, "vllm", longest_prompt, total, context=context, free=free)
    assert plan.cache is not None  # of a plan with vLLM
    if plan.cache.holds == 0:
        phases: tuple[Phase, ...] = ("rollout", "update") if cfg.rollout.overlap else ("rollout",)
        beside = max(plan.peak(phase, to_come=True) for phase in phases) - plan.cache.size
        raise UserError(
            f"of the GPU's {total / GIB:.1f} GiB {free / GIB:.1f} are free beside the model, but "
            f"sampling needs {beside / GIB:.1f} and {plan.cache.size / GIB:.2f} for one completion "
            f"of {context} tokens: lower --rollout.max-tokens or --rollout.max-sequences, pass "
            f"{'--rollout.overlap false, ' if cfg.rollout.overlap else ''}"
            "--model.precision nf4, or --rollout.engine transformers"
        )
    return plan.cache
