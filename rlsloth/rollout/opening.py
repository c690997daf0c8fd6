"""Which rollout engine a run samples with."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from rlsloth.config import RolloutConfig
from rlsloth.data.renderer import Renderer
from rlsloth.errors import UserError
from rlsloth.memory.out_of_memory import advise
from rlsloth.memory.plan import fit_cache, make_plan
from rlsloth.memory.report import describe
from rlsloth.memory.shape import read_shape
from rlsloth.memory.terms import GIB, Cache, Phase
from rlsloth.memory.workload import EngineMemory, Request, Sampling
from rlsloth.policy.policy import Policy
from rlsloth.rollout.embedded.engine import TransformersEngine
from rlsloth.rollout.embedded.memory import EMBEDDED_MEMORY
from rlsloth.rollout.engine import Engine
from rlsloth.rollout.trial import PROMPT_TOKENS, SAMPLED_TOKENS, probe
from rlsloth.rollout.vllm.engine import VllmEngine, check_temperature
from rlsloth.rollout.vllm.memory import VLLM_MEMORY, completion_bytes
from rlsloth.rollout.vllm.start import check_installed, free_memory
from rlsloth.run.run import Run

CPU_CACHE = 2 * GIB
"""vLLM's cache on a CPU at most, unless one completion needs more."""


@dataclass(frozen=True, slots=True)
class PlannedEngine:
    """The engine that a run would try first, for its memory plan."""

    engine: EngineMemory
    fallback: EngineMemory | None
    """The engine that samples where the first cannot."""
    text: str
    """``transformers (auto: no vLLM that rlsloth knows is installed)``."""


def plan_engine(rollout: RolloutConfig) -> PlannedEngine:
    """The engine to plan for. vLLM that is chosen by name need not be installed for a plan."""
    if rollout.engine != "auto":
        engine = VLLM_MEMORY if rollout.engine == "vllm" else EMBEDDED_MEMORY
        return PlannedEngine(engine, None, engine.name)
    try:
        check_installed()
    except UserError:
        text = "transformers (auto: no vLLM that rlsloth knows is installed)"
        return PlannedEngine(EMBEDDED_MEMORY, None, text)
    text = "vllm (auto: a vLLM that rlsloth knows is installed)"
    return PlannedEngine(VLLM_MEMORY, EMBEDDED_MEMORY, text)


def open_engine(
    request: Request,
    policy: Policy,
    renderer: Renderer,
    run: Run,
    stack: ExitStack,
    *,
    context: int,
    temperatures: Iterable[float],
) -> Engine:
    """The engine that the rollout section names, tried out with the policy's adapter; it is closed
    with ``stack``.

    Args:
        context: tokens of the longest prompt and completion that it will see.
        temperatures: those that it will sample with.

    Raises:
        UserError: vllm was asked for by name and cannot sample from this policy, or packed training
            does not support it.
    """
    assert request.sampling is not None
    rollout = request.sampling.rollout
    if rollout.engine != "transformers":
        try:
            for temperature in temperatures:
                check_temperature(temperature)
            return _open_vllm(request, request.sampling, policy, renderer, run, stack, context)
        except UserError as error:
            if rollout.engine == "vllm":
                raise UserError(f"--rollout.engine vllm: {error}") from error
            if rollout.overlap:
                raise UserError(f"--rollout.overlap needs vLLM: {error}") from error
            run.say(f"{error}; sampling with transformers")
        free_memory()  # what the failed engine had, which the error has kept until here
    engine = TransformersEngine(
        policy.model,
        policy.tokenizer,
        transform=policy.logit_transform,
        stop_ids=renderer.stop_ids,
        context=policy.context,
        max_sequences=rollout.max_sequences,
        device=policy.device,
        cuda_graphs=rollout.cuda_graphs,
    )
    with advise("rollout", policy.model):
        probe(policy, engine)
    return engine


def _open_vllm(
    request: Request,
    sampling: Sampling,
    policy: Policy,
    renderer: Renderer,
    run: Run,
    stack: ExitStack,
    context: int,
) -> VllmEngine:
    check_installed()
    rollout = sampling.rollout
    if not rollout.cuda_graphs:
        run.say("--rollout.cuda-graphs false has no effect with --rollout.engine vllm")
    context = max(context, PROMPT_TOKENS + SAMPLED_TOKENS)
    cache = size_cache(request, sampling, policy, context)
    engine = VllmEngine(
        policy.model,
        policy.tokenizer if rollout.stop else None,  # it costs a second
        stop_ids=renderer.stop_ids,
        context=context,
        max_sequences=cache.asked,
        dtype=policy.dtype,
        device=policy.device,
        kv_cache=rollout.kv_cache,
        kv_bytes=cache.size,
        kv_stays=cache.stays,
    )
    try:
        with advise("rollout", policy.model):
            engine.set_weights(policy.weights())
            probe(policy, engine, kv_cache=rollout.kv_cache)
    except BaseException:
        engine.close()
        raise
    stack.callback(engine.close)
    run.say(f"vLLM: {describe(cache)}")
    return engine


def size_cache(request: Request, sampling: Sampling, policy: Policy, context: int) -> Cache:
    """vLLM's cache for completions that reach ``context`` tokens with their prompts: by the plan
    for this GPU, but no more than is really free next to what is still to be allocated.

    Raises:
        UserError: the GPU has no room for one completion.
    """
    shape = read_shape(policy.model)
    if policy.device.type == "cpu":
        kind = sampling.rollout.kv_cache
        one = completion_bytes(shape, kind, context, policy.dtype.itemsize)
        return fit_cache(one, sampling.at_once, context, max(one, CPU_CACHE))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(policy.device)
    longest_prompt = max(1, context - sampling.rollout.max_tokens)
    workload = replace(sampling.workload, longest_prompt=longest_prompt)
    request = replace(request, sampling=replace(sampling, workload=workload))
    plan = make_plan(shape, request, total, engine=VLLM_MEMORY, context=context, free=free)
    assert plan.cache is not None  # of a plan with vLLM
    if plan.cache.holds == 0:
        phases: tuple[Phase, ...] = ("rollout", "update") if request.overlap else ("rollout",)
        beside = max(plan.peak(phase, to_come=True) for phase in phases) - plan.cache.size
        raise UserError(
            f"of the GPU's {total / GIB:.1f} GiB {free / GIB:.1f} are free beside the model, but "
            f"sampling needs {beside / GIB:.1f} and {plan.cache.size / GIB:.2f} for one completion "
            f"of {context} tokens: lower --rollout.max-tokens or --rollout.max-sequences, pass "
            f"{'--rollout.overlap false, ' if request.overlap else ''}"
            "--model.precision nf4, or --rollout.engine transformers"
        )
    return plan.cache
