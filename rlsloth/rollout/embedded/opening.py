"""Opening the embedded engine, which samples with the trained model itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from rlsloth.memory.machine import gpu_bytes
from rlsloth.memory.out_of_memory import advise
from rlsloth.memory.plan import make_plan
from rlsloth.memory.read_shape import read_shape
from rlsloth.memory.search import decide_sequences
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.workload import Workload
from rlsloth.policy.streamed_layers import streamed_layers
from rlsloth.records import SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine
from rlsloth.rollout.embedded.memory import EMBEDDED_MEMORY
from rlsloth.rollout.engine import Engine, EngineKind, Opening
from rlsloth.rollout.trial import probe


def open_transformers(opening: Opening) -> Engine:
    """Open the engine and compare its log-probs with the policy's.

    Raises:
        UserError: packed training or the engine does not support the model.
    """
    policy, rollout = opening.policy, opening.sampling.rollout
    streamed = streamed_layers(policy.model)
    if streamed and rollout.cuda_graphs and policy.device.type == "cuda":
        opening.run.say(
            f"--model.offload-layers {streamed}: decoding steps are not captured as CUDA graphs, "
            "which would not copy these layers' weights"
        )
    engine = TransformersEngine(
        policy.model,
        policy.tokenizer,
        transform=policy.logit_transform,
        stop_ids=opening.renderer.stop_ids,
        context=policy.context,
        max_sequences=most_rows(opening),
        device=policy.device,
        cuda_graphs=rollout.cuda_graphs,
        warn=opening.run.warn,
    )
    with advise("rollout", policy.model):
        probe(policy, engine)
        if policy.device.type == "cuda" and rollout.cuda_graphs and not streamed:
            fill_cache(engine, read_shape(policy.model), opening.sampling.workload)
    return engine


def fill_cache(engine: Engine, shape: ModelShape, workload: Workload) -> None:
    """Sample one token in each row of the cache, so that it is as large as the run needs it.

    With CUDA graphs it stays during updates, so that an update that is tried before the first step
    then has the memory of a later one; and no longer completion makes another cache, whose graphs
    are captured again.
    """
    length = workload.one_turn(shape)
    prompt = min(workload.longest_prompt, length - 1)
    sampling = SamplingParams(max_tokens=length - prompt, cut_tail=0.0)
    engine.generate([[0] * prompt], min(engine.max_sequences, workload.sequences), sampling)


def most_rows(opening: Opening) -> int:
    """Return the value of ``rollout.max_sequences``; ``auto`` is decided for the policy's GPU."""
    named = opening.sampling.rollout.max_sequences
    if named != "auto":
        return named
    shape = read_shape(opening.policy.model)
    total = gpu_bytes(opening.request.model)
    assert total is not None  # on a CPU the number is decided before (rollout/opening.py)
    sampling = replace(opening.sampling, engine=EMBEDDED_MEMORY, fallback=None)
    request = replace(opening.request, sampling=sampling)
    request = request.with_layers(streamed_layers(opening.policy.model))
    decided = decide_sequences(partial(make_plan, shape, total=total), shape, request).sampling
    assert decided is not None
    return decided.at_once


TRANSFORMERS = EngineKind(EMBEDDED_MEMORY, open_transformers, supports_dora=True)
