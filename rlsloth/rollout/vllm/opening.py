"""Opening the vLLM engine: the size of its cache, its start, and a trial of what it samples."""

from __future__ import annotations

from dataclasses import replace

import torch

from rlsloth.config import RolloutConfig
from rlsloth.errors import UserError
from rlsloth.memory.out_of_memory import advise
from rlsloth.memory.plan import fit_cache, make_plan
from rlsloth.memory.report import describe
from rlsloth.memory.shape import read_shape
from rlsloth.memory.terms import GIB, Cache, Phase
from rlsloth.memory.workload import Request, Sampling
from rlsloth.policy.policy import Policy
from rlsloth.rollout.engine import Engine, EngineKind, Opening
from rlsloth.rollout.trial import PROMPT_TOKENS, SAMPLED_TOKENS, probe
from rlsloth.rollout.vllm.engine import VllmEngine, check_temperature
from rlsloth.rollout.vllm.memory import VLLM_MEMORY, completion_bytes
from rlsloth.rollout.vllm.start import check_installed, import_vllm

CPU_CACHE = 2 * GIB
"""vLLM's cache on a CPU at most, unless one completion needs more."""


def open_vllm(opening: Opening) -> Engine:
    """Start vLLM on the policy's base weights and try it out.

    Raises:
        UserError: vLLM is not installed, cannot sample from this policy or at these temperatures,
            has no room, or samples from another distribution than the trainer computes.
    """
    policy, rollout, run = opening.policy, opening.sampling.rollout, opening.run
    for temperature in opening.temperatures:
        check_temperature(temperature)
    check_installed()
    if not rollout.cuda_graphs:
        run.say("--rollout.cuda-graphs false has no effect on vLLM")
    context = max(opening.context, PROMPT_TOKENS + SAMPLED_TOKENS)
    cache = size_cache(opening.request, opening.sampling, policy, context)
    engine = VllmEngine(
        policy.model,
        policy.tokenizer if rollout.stop else None,  # it costs a second
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
    """Size vLLM's cache for completions that reach ``context`` tokens with their prompts.

    It is the plan's for this GPU, but no more than is really free next to what is still to be
    allocated.

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
            f"{free / GIB:.1f} of the GPU's {total / GIB:.1f} GiB are free next to the model, but "
            f"sampling needs {beside / GIB:.1f} and {plan.cache.size / GIB:.2f} for one completion "
            f"of {context} tokens: lower --rollout.max-tokens or --rollout.max-sequences, pass "
            f"{'--rollout.overlap false, ' if request.overlap else ''}"
            "--model.precision nf4, or --rollout.engine transformers"
        )
    return plan.cache


def why_not(device_type: str) -> str:
    """Return why ``rollout.engine auto`` leaves vLLM out here; empty where it is used."""
    if device_type != "cuda":
        return "no GPU"
    try:
        check_installed()
    except UserError as error:
        return str(error)
    return ""


def preload(device: torch.device, rollout: RolloutConfig) -> None:
    """Import vLLM. Raises UserError where it is missing."""
    check_installed()
    import_vllm(device, rollout.kv_cache)


VLLM = EngineKind(
    VLLM_MEMORY,
    open_vllm,
    why_not=why_not,
    why="vLLM is installed, and there is a GPU",
    preload=preload,
    kv_caches=frozenset({"auto", "fp8", "fp8_per_token_head"}),
    supports_overlap=True,
)
