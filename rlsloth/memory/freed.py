"""Memory that single options would free: a plan is made with each of them changed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlsloth.memory.knobs import KNOBS, Changed, Planner, asked_with
from rlsloth.memory.plan import precision_of
from rlsloth.memory.seconds import decoding_seconds, step_seconds
from rlsloth.memory.settings import decide_settings
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import GIB, Plan, element_size
from rlsloth.memory.workload import Request

LISTED = 0.01
"""Share of the GPU that an option must free to be listed."""
MORE = 1.1
"""Factor by which the cache must hold more completions for an option to be listed without that."""
FASTER = 0.02
"""Share of a step's time that fewer layers in host memory than the user named must save."""
ADVISED = 3
"""Largest number of options in a message of one line."""


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
    fits_host: bool
    """Whether the host then has enough memory, if no other setting changes."""
    slower: float | None
    """Share by which the estimated time of a step grows; None if the option changes the number of
    tokens in a step."""

    @property
    def gpu(self) -> int:
        """Bytes freed at the peak at which the option frees most."""
        return max(self.update, self.rollout)


def list_freed(
    planner: Planner, shape: ModelShape, request: Request, asked: Request | None = None
) -> list[Freed]:
    """List what options free, largest first, if it is more than LISTED of the GPU.

    If the run does not fit, those that make it fit come first. Options that make room for
    MORE completions are listed as well. If the host's memory is too small, that is what counts.
    So are fewer layers in host memory than the user named, where a step is then FASTER.

    Args:
        planner: function that plans a request.
        shape: the model's sizes.
        request: the run with all settings decided.
        asked: the run as the user set it: whether an option makes it fit is then told with all
            other settings decided again; None: as they are.
    """
    now = planner(shape, request)
    least = LISTED * now.total

    def amount(freed: Freed) -> int:
        return freed.gpu if now.fits_host else freed.host

    found = []
    for knob in KNOBS:
        if (changed := knob(planner, shape, request)) is None:
            continue
        freed = _compare(now, shape, request, planner(*changed[1:]), changed)
        if asked is not None and not (now.fits or freed.fits):
            option, new_shape, new = changed
            again = decide_settings(planner, new_shape, asked_with(asked, option, new))
            freed = replace(freed, fits=planner(new_shape, again).fits)
        held = now.cache.holds if now.cache else 0
        helps = freed.fits and not now.fits
        if helps or amount(freed) > least or (held and (freed.holds or 0) >= MORE * held):
            found.append(freed)
    if now.fits and asked is not None and (fewer := _fewer_layers(planner, shape, request, asked)):
        found.append(fewer)

    def rank(freed: Freed) -> tuple[bool, int, int]:
        return freed.fits and not now.fits, amount(freed), freed.holds or 0

    return sorted(found, key=rank, reverse=True)


def _fewer_layers(
    planner: Planner, shape: ModelShape, request: Request, asked: Request
) -> Freed | None:
    """Compare a run with the one whose number of layers in host memory the plan decides.

    Returns:
        None if the user named no number, or the plan decides no smaller one with which a step is
        FASTER. Its time is told with all other settings decided again.
    """
    if asked.model.offload_layers in ("auto", 0):
        return None
    model = asked.model.model_copy(update={"offload_layers": "auto"})
    again = decide_settings(planner, shape, replace(asked, model=model))
    option, fewer = f"--model.offload-layers {again.streamed}", request.with_layers(again.streamed)
    slower = _slower(shape, request, (option, shape, again))
    fits = again.streamed < request.streamed and planner(shape, again).fits
    if not fits or slower is None or slower > -FASTER:
        return None
    freed = _compare(planner(shape, request), shape, request, planner(shape, fewer),
                     (option, shape, fewer))  # fmt: skip
    return replace(freed, fits=True, slower=slower)


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


def advice(
    planner: Planner, shape: ModelShape, request: Request, asked: Request | None = None
) -> str:
    """Say in one line which options help a run that does not fit; see ``list_freed``."""
    now = planner(shape, request)
    gpu = now.fits_host
    listed = list_freed(planner, shape, request, asked)
    useful = [f for f in listed if f.fits or (f.gpu if gpu else f.host) > 0]
    useful.sort(key=lambda f: (f.fits, f.gpu if gpu else f.host), reverse=True)
    place = "" if gpu else " of host memory"

    def part(freed: Freed) -> str:
        amount = (freed.gpu if gpu else freed.host) / GIB
        if freed.fits and amount < 0.1:  # by what the plan then decides otherwise
            return f"with {freed.option} it fits"
        frees = f"{freed.option} frees {amount:.1f} GiB{place}"
        return f"{frees} (then it fits)" if freed.fits else frees

    parts = [part(freed) for freed in useful[:ADVISED]]
    alone = any(f.fits for f in useful)
    if not alone:
        together = that_fit_together(planner, shape, request)
        none = "no option makes it fit: pass a smaller model"
        parts.append(together_line(together) if together else none)
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
    short = now.cache is not None and 0 < now.cache.holds < now.cache.asked
    return Freed(
        option=option,
        update=now.peak("update") - then.peak("update"),
        rollout=rollout if new_request.sampling is not None else 0,
        host=now.host - then.host,
        holds=then.cache.holds if short and then.cache is not None else None,
        fits=then.fits,
        fits_host=then.fits_host,
        slower=_slower(shape, request, changed),
    )


def _slower(shape: ModelShape, request: Request, changed: Changed) -> float | None:
    _, new_shape, new = changed
    loads = [
        (one.sampling and one.sampling.workload, one.stream, one.longest_example)
        for one in (request, new)
    ]
    if loads[0] != loads[1]:
        return None
    then, now = (
        step_seconds(*run) + decoding_seconds(*run) for run in ((new_shape, new), (shape, request))
    )
    return then / now - 1


def _one_completion(plan: Plan, shape: ModelShape, request: Request) -> int:
    """Return the bytes of one completion in a cache whose size the plan decides; 0 without one."""
    sampling = request.sampling
    if sampling is None or plan.cache is None or sampling.engine.completion_bytes is None:
        return 0
    size = element_size(precision_of(request.model, shape))
    kind = sampling.rollout.kv_cache
    return sampling.engine.completion_bytes(shape, kind, plan.cache.context, size)
