"""Memory that single options would free: a plan is made with each of them changed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rlsloth.kernels.lora.layer import ALIGNMENT
from rlsloth.memory.placing import choose
from rlsloth.memory.plan import precision_of
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import GIB, Plan, element_size
from rlsloth.memory.workload import Request, Sampling
from rlsloth.policy.activations.placement import Checkpointing

LISTED = 0.01
"""Share of the GPU that an option must free to be listed."""
MORE = 1.1
"""Factor by which the cache must hold more completions for an option to be listed without that."""
ADVISED = 3
"""Largest number of options in a message of one line."""

Planner = Callable[[ModelShape, Request], Plan]
"""Function that plans a request for a model."""
Changed = tuple[str, ModelShape, Request]
"""An option as it is typed, and the model and the request with it."""
Knob = Callable[[Planner, ModelShape, Request], Changed | None]
"""Function that changes one option of a request; None if there is nothing to change."""


@dataclass(frozen=True, slots=True)
class Freed:
    """The memory that one option frees."""

    option: str
    """The option with its value, as it is typed."""
    update: int
    """Bytes freed at the update's peak."""
    rollout: int
    """Bytes freed at the rollouts' peak; a cache that was too small may take them."""
    host: int
    """Bytes of host memory freed."""
    holds: int | None
    """Completions that the cache then holds; None if it holds all as it is, or there is none."""
    fits: bool
    """Whether the run then fits."""

    @property
    def gpu(self) -> int:
        """Bytes freed at the peak at which the option frees most."""
        return max(self.update, self.rollout)


def list_freed(planner: Planner, shape: ModelShape, request: Request) -> list[Freed]:
    """List what options free, largest first, if it is more than LISTED of the GPU.

    Options that free as much host memory, or make room for MORE completions, are listed as well.

    Args:
        planner: function that plans a request.
        shape: the model's sizes.
        request: the run with all settings decided.
    """
    now = planner(shape, request)
    least = LISTED * now.total
    found = []
    for knob in KNOBS:
        if (changed := knob(planner, shape, request)) is None:
            continue
        freed = _compare(now, shape, request, planner(*changed[1:]), changed)
        held = now.cache.holds if now.cache else 0
        if max(freed.gpu, freed.host) > least or (held and (freed.holds or 0) >= MORE * held):
            found.append(freed)
    return sorted(found, key=lambda f: (max(f.gpu, f.host), f.holds or 0), reverse=True)


def that_fit_together(planner: Planner, shape: ModelShape, request: Request) -> list[str]:
    """List options that together make a run fit; empty if not even all do.

    They are added one after another, those first that leave the most room.
    """
    options: list[str] = []
    left = list(KNOBS)
    while left and not planner(shape, request).fits:
        tried = [(knob, changed) for knob in left if (changed := knob(planner, shape, request))]
        if not tried:
            return []
        knob, best = max(tried, key=lambda pair: _room(planner(*pair[1][1:])))
        left.remove(knob)
        if _room(planner(*best[1:])) > _room(planner(shape, request)):
            option, shape, request = best
            name = option.split()[0]  # of one option the last value counts
            options = [*(o for o in options if o.split()[0] != name), option]
        else:
            return []
    return options if planner(shape, request).fits else []


def advice(planner: Planner, shape: ModelShape, request: Request) -> str:
    """Say in one line which options make a run fit that does not; empty if none is known."""
    now = planner(shape, request)
    gpu = now.left < 0
    listed = list_freed(planner, shape, request)
    useful = [f for f in listed if f.fits or (f.gpu if gpu else f.host) > 0]
    useful.sort(key=lambda f: (f.fits, f.gpu if gpu else f.host), reverse=True)
    place = "" if gpu else " of host memory"
    parts = [
        f"{f.option} frees {(f.gpu if gpu else f.host) / GIB:.1f} GiB{place}"
        + (" (then it fits)" if f.fits else "")
        for f in useful[:ADVISED]
    ]
    alone = any(f.fits for f in useful)
    if not alone and (together := that_fit_together(planner, shape, request)):
        parts.append(together_line(together))
    return ", ".join(parts)


def together_line(options: Sequence[str]) -> str:
    """Say which options fit together."""
    return f"it fits with {' '.join(options)}"


def _room(plan: Plan) -> float:
    """Return the bytes that are free, or missing, in the place where least is free."""
    host = float("inf") if plan.host_total is None else plan.host_total - plan.host
    return min(plan.left, host)


def _compare(now: Plan, shape: ModelShape, request: Request, then: Plan, changed: Changed) -> Freed:
    """Compare a plan with the one of a changed request."""
    option, _, new_request = changed
    rollout = now.peak("rollout") - then.peak("rollout")
    one, new_one = _one_completion(now, shape, request), _one_completion(then, *changed[1:])
    # Memory that the cache takes again counts as freed, too.
    if now.cache is not None and then.cache is not None:
        rest = now.peak("rollout") - now.cache.size + one
        rollout = max(rollout, rest - (then.peak("rollout") - then.cache.size + new_one))
    short = now.cache is not None and now.cache.holds < now.cache.asked
    return Freed(
        option=option,
        update=now.peak("update") - then.peak("update"),
        rollout=rollout if new_request.sampling is not None else 0,
        host=now.host - then.host,
        holds=then.cache.holds if short and then.cache is not None else None,
        fits=then.fits,
    )


def _one_completion(plan: Plan, shape: ModelShape, request: Request) -> int:
    """Return the bytes of one completion in a cache whose size the plan decides; 0 without one."""
    sampling = request.sampling
    if sampling is None or plan.cache is None or sampling.engine.completion_bytes is None:
        return 0
    size = element_size(precision_of(request.model, shape))
    kind = sampling.rollout.kv_cache
    return sampling.engine.completion_bytes(shape, kind, plan.cache.context, size)


# --- options -------------------------------------------------------------------------------------


def _four_bits(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    experts = any(weight.group == "experts" for weight in shape.weights)  # NF4 does not take them
    if experts or precision_of(request.model, shape) == "nf4":
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


def _micro_batch(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    tokens = max(request.microbatch // 2, request.least_tokens(shape))
    if tokens >= request.microbatch:
        return None
    return f"--tokens-per-microbatch {tokens}", shape, _with_tokens(request, shape, tokens)


def _rank(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    rank = request.lora.rank // 2
    if request.model.adapter is not None or not rank:
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


def _overlap(_planner: Planner, shape: ModelShape, request: Request) -> Changed | None:
    if request.sampling is None or not request.overlap:
        return None
    changed = _with_rollout(request, request.sampling, "overlap", False)
    return "--rollout.overlap false", shape, changed


KNOBS: tuple[Knob, ...] = (
    _four_bits,
    partial(_checkpointing, True),
    partial(_checkpointing, "offload"),
    _micro_batch,
    _rank,
    _optimizer,
    _sequences,
    _cache_type,
    _completions,
    _examples,
    _overlap,
)
"""The options that are tried."""


def _with_tokens(request: Request, shape: ModelShape, tokens: int) -> Request:
    return request.with_update(tokens, request.placed(len(shape.layers)))


def _with_rollout(request: Request, sampling: Sampling, key: str, value: object) -> Request:
    rollout = sampling.rollout.model_copy(update={key: value})
    return replace(request, sampling=replace(sampling, rollout=rollout))


def _following(request: Request, shorter: Request, shape: ModelShape) -> Request:
    """Shorten micro-batches that are only as long as the longest text."""
    if request.microbatch > request.least_tokens(shape):
        return shorter
    return _with_tokens(shorter, shape, shorter.least_tokens(shape))


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
