"""Options that change a run's memory, each as a function that changes it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from rlsloth.kernels.lora.layer import ALIGNMENT
from rlsloth.memory.placing import choose
from rlsloth.memory.plan import precision_of
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.streamed import eighths, may_stream
from rlsloth.memory.terms import Plan
from rlsloth.memory.workload import EngineMemory, Request, Sampling
from rlsloth.policy.activations.placement import Checkpointing

Planner = Callable[[ModelShape, Request], Plan]
"""Function that plans a request for a model."""
Changed = tuple[str, ModelShape, Request]
"""An option as it is typed, and the model and the request with it."""
Knob = Callable[[Planner, ModelShape, Request], Changed | None]
"""Function that changes one option of a request; None if there is nothing to change."""


def _four_bits(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    experts = any(weight.group == "experts" for weight in shape.weights)  # NF4 does not take them
    if experts or shape.whole or precision_of(request.model, shape) == "nf4":
        return None
    model = request.model.model_copy(update={"precision": "nf4"})
    return "--model.precision nf4", shape, replace(request, model=model)


def _checkpointing(
    value: Checkpointing, planner: Planner, shape: ModelShape, request: Request
) -> Changed | None:
    model = request.model.model_copy(update={"gradient_checkpointing": value})
    wanted = replace(
        request, model=model, placements=None, tokens_per_microbatch=request.microbatch
    )
    chosen = choose(partial(planner, shape), shape, wanted, request.microbatch)
    return f"--model.gradient-checkpointing {str(value).lower()}", shape, chosen


def _embeddings(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    engine = None if request.sampling is None else request.sampling.engine
    shared = engine is not None and engine.shares_weights
    if shared or not shape.embedding or request.model.offload_embeddings is True:
        return None
    return "--model.offload-embeddings true", shape, request.with_embeddings(True)


def _states(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    if request.optim.offload:
        return None
    optim = request.optim.model_copy(update={"offload": True})
    return "--optim.offload true", shape, replace(request, optim=optim)


def _layers(planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    """Stream as many layers as make the run fit; half of them if it fits already."""
    more = [count for count in eighths(shape) if count > request.streamed]
    if not may_stream(request) or not more or shape.whole:
        return None
    if planner(shape, request).fits:
        count = next((n for n in more if 2 * n >= len(shape.layers)), more[-1])
    else:
        count = next((n for n in more if planner(shape, request.with_layers(n)).fits), more[-1])
    return f"--model.offload-layers {count}", shape, request.with_layers(count)


def _micro_batch(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    tokens = max(request.microbatch // 2, request.least_tokens(shape))
    if tokens >= request.microbatch:
        return None
    return f"--tokens-per-microbatch {tokens}", shape, _with_tokens(request, shape, tokens)


def _rank(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    rank = request.lora.rank // 2
    if request.model.adapter is not None or not rank or shape.whole:
        return None
    lora = request.lora.model_copy(update={"rank": rank})
    smaller = with_rank(shape, request.lora.rank, rank)
    return f"--lora.rank {rank}", smaller, replace(request, lora=lora)


def _optimizer(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    if request.optim.name != "adamw":
        return None
    optim = request.optim.model_copy(update={"name": "adamw_8bit"})
    return "--optim.name adamw_8bit", shape, replace(request, optim=optim)


def _sequences(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    if request.sampling is None or request.sampling.at_once < 2:
        return None
    rows = request.sampling.at_once // 2
    return f"--rollout.max-sequences {rows}", shape, request.with_sequences(rows)


def _cache_type(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    sampling = request.sampling
    if sampling is None or sampling.engine.completion_bytes is None:
        return None
    if sampling.rollout.kv_cache != "auto":
        return None
    return "--rollout.kv-cache fp8", shape, _with_rollout(request, sampling, "kv_cache", "fp8")


def _completions(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    if request.sampling is None or request.sampling.rollout.max_tokens < 2:
        return None
    tokens = request.sampling.rollout.max_tokens // 2
    shorter = request.with_completions(tokens)
    return f"--rollout.max-tokens {tokens}", shape, _following(request, shorter, shape)


def _examples(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    stream, longest = request.stream, request.longest_example
    if stream is None or longest is None or longest < 2:
        return None
    halved = replace(stream, prompt=stream.prompt // 2, completion=-(-stream.completion // 2))
    shorter = replace(request, stream=halved, longest_example=longest // 2)
    return f"--data.max-tokens {longest // 2}", shape, _following(request, shorter, shape)


def _engine(planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    sampling = request.sampling
    if sampling is None or sampling.other is None:
        return None
    if planner(shape, request).fits:  # the faster engine stays
        return None
    return f"--rollout.engine {sampling.other.name}", shape, _with_engine(request, sampling.other)


def _overlap(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    if request.sampling is None or not request.overlap:
        return None
    changed = _with_rollout(request, request.sampling, "overlap", False)
    return "--rollout.overlap false", shape, changed


def _embeddings_back(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    if request.model.offload_embeddings is not True:
        return None
    return "--model.offload-embeddings false", shape, request.with_embeddings(False)


def _states_back(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    if not request.optim.offload:
        return None
    optim = request.optim.model_copy(update={"offload": False})
    return "--optim.offload false", shape, replace(request, optim=optim)


def _layers_back(planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    """Stream so many layers fewer that the run fits; none if it does not fit with any number."""
    fewer = [count for count in eighths(shape) if count < request.streamed]
    if not fewer or planner(shape, request).fits:  # list_freed has a row for a run that fits
        return None
    fitting = [n for n in fewer if planner(shape, request.with_layers(n)).fits] or [0]
    return f"--model.offload-layers {fitting[-1]}", shape, request.with_layers(fitting[-1])


KNOBS: tuple[Knob, ...] = (
    _four_bits,
    partial(_checkpointing, True),
    partial(_checkpointing, "offload"),
    _embeddings,
    _states,
    _layers,
    _micro_batch,
    _rank,
    _optimizer,
    _sequences,
    _cache_type,
    _completions,
    _examples,
    _overlap,
    _engine,
    _embeddings_back,
    _states_back,
    _layers_back,
)
"""The options that are tried."""


def _with_tokens(request: Request, shape: ModelShape, tokens: int) -> Request:
    return request.with_update(tokens, request.placed(len(shape.layers)))


def _with_rollout(request: Request, sampling: Sampling, key: str, value: object) -> Request:
    rollout = sampling.rollout.model_copy(update={key: value})
    return replace(request, sampling=replace(sampling, rollout=rollout))


def _with_engine(request: Request, engine: EngineMemory) -> Request:
    assert request.sampling is not None
    rollout = request.sampling.rollout.model_copy(update={"engine": engine.name})
    sampling = Sampling(rollout, request.sampling.workload, engine)
    return replace(request, sampling=sampling)


def _following(request: Request, shorter: Request, shape: ModelShape) -> Request:
    """Shorten micro-batches that are only as long as the longest text."""
    if request.microbatch > request.least_tokens(shape):
        return shorter
    return _with_tokens(shorter, shape, shorter.least_tokens(shape))


def asked_with(asked: Request, option: str, changed: Request) -> Request:
    """Copy a run as the user set it, with one option of a changed run.

    Args:
        asked: the run as the user set it.
        option: the option, as it is typed.
        changed: a decided run with that option.
    """
    section, _, name = option.split()[0].removeprefix("--").replace("-", "_").rpartition(".")
    if section == "model":
        update = {name: getattr(changed.model, name)}
        return replace(asked, model=asked.model.model_copy(update=update))
    if section in ("lora", "optim"):
        return replace(asked, **{section: getattr(changed, section)})
    if section == "data":
        return replace(asked, stream=changed.stream, longest_example=changed.longest_example)
    if not section:
        return replace(asked, tokens_per_microbatch=changed.tokens_per_microbatch)
    assert asked.sampling is not None
    assert changed.sampling is not None
    value = getattr(changed.sampling.rollout, name)
    if name == "max_tokens":
        return asked.with_completions(value)
    if name == "engine":
        return _with_engine(asked, changed.sampling.engine)
    return _with_rollout(asked, asked.sampling, name, value)


def with_rank(shape: ModelShape, old: int, new: int) -> ModelShape:
    """Copy a model's sizes with adapters of another rank.

    ``largest_matrix`` stays as it is: the adapters' part in it is small.
    """

    def aligned(rank: int) -> int:
        return -(-rank // ALIGNMENT) * ALIGNMENT

    def scaled(rank: int) -> int:
        return rank // aligned(old) * aligned(new)

    layers = [replace(x, ranks=scaled(x.ranks), rank=scaled(x.rank)) for x in shape.layers]
    return replace(
        shape,
        trained=tuple(count * new // old for count in shape.trained),
        layers=tuple(layers),
        fused=tuple(replace(linear, rank=linear.rank * new // old) for linear in shape.fused),
        head_rank=scaled(shape.head_rank),
    )
