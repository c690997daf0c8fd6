"""Opening the vLLM engine: the size of its cache, its start, and a trial of its log-probs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from rlsloth.config import ModelConfig, RolloutConfig
from rlsloth.errors import UserError
from rlsloth.memory.out_of_memory import advise
from rlsloth.memory.plan import fit_cache, make_plan
from rlsloth.memory.read_shape import read_shape
from rlsloth.memory.report import describe
from rlsloth.memory.search import decide_sequences
from rlsloth.memory.terms import GIB, Cache, Phase
from rlsloth.memory.workload import Request, Sampling
from rlsloth.policy.gpu_limit import CONTEXT
from rlsloth.policy.policy import Policy
from rlsloth.rollout.engine import Engine, EngineKind, Opening
from rlsloth.rollout.trial import PROMPT_TOKENS, SAMPLED_TOKENS, probe
from rlsloth.rollout.vllm.engine import VllmEngine
from rlsloth.rollout.vllm.memory import VLLM_MEMORY, completion_bytes
from rlsloth.rollout.vllm.requests import check_temperature
from rlsloth.rollout.vllm.start import check_installed, import_vllm

CPU_CACHE = 2 * GIB
"""Largest key-value cache on a CPU in bytes, unless one completion needs more."""


def open_vllm(opening: Opening) -> Engine:
    """Start vLLM on the policy's base weights and compare its log-probs with the trainer's.

    Raises:
        UserError: vLLM is not installed, cannot sample from this policy or at these temperatures,
            lacks memory, or its log-probs differ from the trainer's.
    """
    policy, rollout, run = opening.policy, opening.sampling.rollout, opening.run
    for temperature in opening.temperatures:
        check_temperature(temperature)
    check_installed()
    if not rollout.cuda_graphs:
        run.say("--rollout.cuda-graphs false has no effect with --rollout.engine vllm")
    context = max(opening.context, PROMPT_TOKENS + SAMPLED_TOKENS)
    cache = size_cache(opening.request, opening.sampling, policy, context)
    engine = VllmEngine(
        policy.model,
        policy.tokenizer if rollout.stop else None,  # loading it takes a second
        stop_ids=opening.renderer.stop_ids,
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
    opening.stack.callback(engine.close)
    run.say(f"vLLM: {describe(cache)}")
    return engine


def size_cache(request: Request, sampling: Sampling, policy: Policy, context: int) -> Cache:
    """Size vLLM's key-value cache for completions of ``context`` tokens with their prompts.

    It is what the memory plan gives for this GPU, bounded by the memory that is free now less what
    is still to be allocated.

    Args:
        request: the run as the memory plan takes it.
        sampling: the request's sampling.
        policy: the loaded policy.
        context: tokens of the longest prompt with its completion.

    Raises:
        UserError: the GPU's free memory does not hold one completion.
    """
    shape = read_shape(policy.model)
    if policy.device.type == "cpu":
        kind = sampling.rollout.kv_cache
        one = completion_bytes(shape, kind, context, policy.dtype.itemsize)
        return fit_cache(one, sampling.at_once, context, max(one, CPU_CACHE))
    torch.cuda.empty_cache()
    free, total = _memory(request.model, policy.device)
    longest_prompt = max(1, context - sampling.rollout.max_tokens)
    workload = replace(sampling.workload, longest_prompt=longest_prompt)
    sampling = replace(sampling, workload=workload, engine=VLLM_MEMORY, fallback=None)
    request = replace(request, sampling=sampling)
    planned = partial(make_plan, shape, total=total, engine=VLLM_MEMORY, context=context, free=free)
    plan = planned(decide_sequences(planned, shape, request))
    assert plan.cache is not None  # plans with vLLM have one
    if plan.cache.holds == 0:
        phases: tuple[Phase, ...] = ("rollout", "update") if request.overlap else ("rollout",)
        rest = max(plan.peak(phase, to_come=True) for phase in phases) - plan.cache.size
        raise UserError(
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB GPU memory are free; sampling with vLLM "
            f"needs {rest / GIB:.1f} GiB and {plan.cache.size / GIB:.2f} GiB for one completion "
            f"of {context} tokens: lower --rollout.max-tokens or --rollout.max-sequences, pass "
            f"{'--rollout.overlap false, ' if request.overlap else ''}"
            "--model.precision nf4"
            f"{'' if request.overlap else ', or --rollout.engine transformers'}"
        )
    return plan.cache


def _memory(model: ModelConfig, device: torch.device) -> tuple[int, int]:
    """Return the bytes of a GPU that are free for the run, and those that it may take in all."""
    free, total = torch.cuda.mem_get_info(device)
    if model.memory_gb is None:
        return free, total
    most = min(total, int(model.memory_gb * GIB))
    return min(free, most - torch.cuda.memory_reserved(device) - CONTEXT), most


def why_not(device_type: str) -> str:
    """Return the reason why ``rollout.engine auto`` does not choose vLLM; empty if it does.

    Args:
        device_type: cpu or cuda.
    """
    if device_type != "cuda":
        return "no GPU"
    try:
        check_installed()
    except UserError as error:
        return str(error)
    return ""


def preload(device: torch.device, rollout: RolloutConfig) -> None:
    """Import vLLM. Raises UserError if it is not installed."""
    check_installed()
    import_vllm(device, rollout.kv_cache)


VLLM = EngineKind(
    VLLM_MEMORY,
    open_vllm,
    why_not=why_not,
    why="vLLM is installed; for a GPU",
    preload=preload,
    kv_caches=frozenset({"auto", "fp8", "fp8_per_token_head"}),
    supports_overlap=True,
)
