"""Choose the size of a micro-batch, the placement of activations and the places of weights.

Everything that may be chosen is one list of candidates, ordered by stages and in each of them by
the estimated seconds of a step; the fastest one that fits is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

from rlsloth.memory.bisection import largest
from rlsloth.memory.microbatches import microbatch_sizes
from rlsloth.memory.modes import Mode, allowed_modes, embedding_places
from rlsloth.memory.plan import kept_free
from rlsloth.memory.seconds import StepTimes
from rlsloth.memory.shape import ModelShape, layer_kinds
from rlsloth.memory.streamed import layer_counts
from rlsloth.memory.terms import Plan
from rlsloth.memory.update import PlacedKind
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Placement

UNBOUNDED = 1 << 62
"""Bytes of a GPU on which everything fits."""

Accepts = Callable[[Plan, float], bool]
"""Function that tells whether a plan fits well enough for a stage.

It also gets the largest share of the GPU that the update should use.
"""
Place = tuple[bool, int]
"""Values of ``model.offload_embeddings`` and ``model.offload_layers``."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One choice, but for the number of last layers that have the mode's second placement."""

    tokens: int
    """Value of ``tokens_per_microbatch``."""
    mode: Mode
    place: Place


@dataclass(frozen=True, slots=True)
class Stage:
    """Candidates that are preferred to those of later stages, however slow they are."""

    accepts: Accepts
    tokens: list[int]
    modes: list[Mode]
    places: list[Place]
    """The fastest one first; the last one needs the least of the GPU's memory."""


def choose(
    plan: Callable[[Request], Plan], shape: ModelShape, request: Request, least: int
) -> Request:
    """Choose ``tokens_per_microbatch``, placements and the places of weights, if they are open.

    The stages, in their order, are:

    1. All candidates with which the run fits, and the update leaves a share of the GPU free
       (``kept_free``), with any number of layers' weights in host memory. If the run samples, each
       decoding step copies these weights: then each number is a stage of its own, the smallest
       first; and after none, the update that needs the least memory, if it fits at all.
    2. The update that needs the least memory, if it fits, with as many layers in host memory as
       may be; then any candidate with which the run fits, where the host is too small for that.
    3. For a run that does not fit: the candidates of the first stage whose update fits; the update
       that needs the least memory, if the host has room for it; and in any case.

    Args:
        plan: function that plans a request.
        shape: the model's sizes.
        request: the run.
        least: smallest possible number of tokens in a micro-batch.
    """
    search = _Search(plan, shape, request)
    for stage in _stages(shape, request, least):
        found = search.fastest(stage)
        if found is not None:
            return found
    raise AssertionError("the last stage accepts any plan")


def _stages(shape: ModelShape, request: Request, least: int) -> Iterator[Stage]:
    """Yield the stages in their order."""
    counts, samples = layer_counts(shape, request), request.sampling is not None
    offloads = embedding_places(shape, request)
    allowed, sizes = allowed_modes(shape, request), microbatch_sizes(request, least)

    def roomy(plan: Plan, share: float) -> bool:
        return plan.fits_host and plan.peak("update") <= share * plan.total

    def roomy_and_fits(plan: Plan, share: float) -> bool:
        return plan.fits and roomy(plan, share)

    def fits(plan: Plan, _share: float) -> bool:
        return plan.fits

    def on_host(plan: Plan, _share: float) -> bool:
        return plan.fits_host

    def frugal(accepts: Accepts, count: int) -> Stage:
        tokens, first = request.tokens_per_microbatch or least, allowed[-1].first
        return Stage(accepts, [tokens], [Mode(first, first)], [(offloads[-1], count)])

    def all_of(accepts: Accepts, numbers: Sequence[int]) -> Stage:
        if request.overlap:  # the cache takes all the room that the update leaves
            return Stage(accepts, sizes, allowed, [(offloads[0], numbers[0])])
        places = [(offload, count) for count in numbers for offload in offloads]
        return Stage(accepts, sizes, allowed, places)

    first = fits if request.overlap else roomy_and_fits
    apart = [[n] for n in counts] if samples else [counts]
    for numbers in apart:
        yield all_of(first, numbers)
        if samples and numbers[0] == 0:
            yield frugal(fits, 0)
    for count in reversed(counts):
        yield frugal(fits, count)
    for numbers in apart:
        yield all_of(fits, numbers)
    for count in counts:
        yield all_of(on_host if request.overlap else roomy, [count])
    for count in reversed(counts):
        yield frugal(on_host, count)
    yield frugal(lambda *_: True, counts[0])


class _Refused:
    """Candidates whose update the GPU has no room for, and with them all that need more of it."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], list[tuple[int, int, Place]]] = {}

    def add(self, candidate: Candidate, last: int) -> None:
        """Take a candidate, and its number of layers that have the second placement."""
        mode = (candidate.mode.first, candidate.mode.last) if last else (candidate.mode.first,)
        self._known.setdefault(mode, []).append((last, candidate.tokens, candidate.place))

    def covers(self, candidate: Candidate, last: int) -> bool:
        """Tell whether a candidate needs at least as much memory as one that was refused."""
        first, second = candidate.mode.first, candidate.mode.last
        offload, count = candidate.place
        return any(
            last >= layers and candidate.tokens >= tokens and offload <= place[0]
            and count <= place[1]
            for mode in ((first,), (first, second))
            for layers, tokens, place in self._known.get(mode, ())
        )  # fmt: skip


@dataclass(slots=True)
class _Search:
    """The search for the fastest candidate that fits."""

    plan: Callable[[Request], Plan]
    shape: ModelShape
    request: Request
    times: StepTimes = field(init=False)

    def __post_init__(self) -> None:
        self.times = StepTimes(self.shape, self.request)

    def fastest(self, stage: Stage) -> Request | None:
        """Return the fastest request of one stage; None if no plan is accepted.

        Micro-batches and modes are ordered by a bound: their time in the fastest place, if all
        layers that may have the second placement have it.
        """
        stage = replace(stage, places=[p for p in stage.places if self._host_holds(stage, p)])
        if not stage.places or not self._gpu_holds(stage):
            return None
        layers, refused = len(self.shape.layers), _Refused()
        listed = [
            Candidate(tokens, mode, stage.places[0])
            for tokens in stage.tokens
            for mode in stage.modes
            if mode.serves(tokens) or mode == stage.modes[-1]
        ]
        bounds = [(self._seconds(c, c.mode.most(layers)), c) for c in listed]
        best: tuple[float, Candidate, int] | None = None

        @cache
        def plan_of(candidate: Candidate, last: int) -> Plan:
            return self.plan(self._made(candidate, last))

        def fits(candidate: Candidate, last: int) -> bool:
            return stage.accepts(plan_of(candidate, last), self._share(candidate.mode))

        def fits_gpu(candidate: Candidate, last: int) -> bool:
            if refused.covers(candidate, last):
                return False
            plan, share = plan_of(candidate, last), self._share(candidate.mode)
            accepted = stage.accepts(replace(plan, host_total=None), share)
            if not accepted and plan.peak("update") > share * plan.total:
                refused.add(candidate, last)
            return accepted

        for bound, fastest in sorted(bounds, key=lambda pair: pair[0]):
            if best is not None and bound >= best[0]:
                break
            # What has no room in the last place has none in any.
            frugal, faster = (
                replace(fastest, place=stage.places[-1]),
                self._first_faster(fastest, best),
            )
            if not fits_gpu(frugal, faster) and refused.covers(frugal, faster):
                continue
            for place in stage.places:
                candidate = replace(fastest, place=place)
                faster, most = self._first_faster(candidate, best), candidate.mode.most(layers)
                last = largest(partial(fits_gpu, candidate), faster, most)
                if last is not None and not fits(candidate, last):
                    # The host refuses. Its need falls or rises with the number, by the mode.
                    last = largest(partial(fits, candidate), faster, last)
                if last is not None:
                    seconds = self._seconds(candidate, last)
                    best = min(best or (seconds, candidate, last), (seconds, candidate, last),
                               key=lambda one: one[0])  # fmt: skip
        return None if best is None else self._made(best[1], best[2])

    def _host_holds(self, stage: Stage, place: Place) -> bool:
        """Tell whether the host has room for a place's weights, if no activations are there."""
        mode = Mode(Placement(), Placement())
        plan = self.plan(self._made(Candidate(min(stage.tokens), mode, place), 0))
        return stage.accepts(replace(plan, total=UNBOUNDED), self._share(mode))

    def _gpu_holds(self, stage: Stage) -> bool:
        """Tell whether the GPU has room for the candidate that needs the least of its memory."""
        least = Candidate(min(stage.tokens), stage.modes[-1], stage.places[-1])
        plan = replace(self.plan(self._made(least, 0)), host_total=None)
        return stage.accepts(plan, max(map(self._share, stage.modes)))

    def _share(self, mode: Mode) -> float:
        """Return the largest share of the GPU that the update should use."""
        first = mode.first
        parts = first is not None and bool(first.mlp_rows or first.attention_parts > 1)
        return 1 - kept_free(self.shape, self.request, parts)

    def _made(self, candidate: Candidate, last: int) -> Request:
        placements = candidate.mode.placements(len(self.shape.layers), last)
        made = self.request.with_embeddings(candidate.place[0]).with_layers(candidate.place[1])
        return made.with_update(candidate.tokens, placements)

    def _first_faster(self, candidate: Candidate, best: tuple[float, Candidate, int] | None) -> int:
        """Return the smallest number of last layers with which a candidate is faster.

        If there is none, it is the largest number.
        """
        low, high = 0, candidate.mode.most(len(self.shape.layers))
        while best is not None and low < high:
            middle = (low + high) // 2
            faster = self._seconds(candidate, middle) < best[0]
            low, high = (low, middle) if faster else (middle + 1, high)
        return low

    def _seconds(self, candidate: Candidate, last: int) -> float:
        placed = self._placed(candidate.mode, last)
        return self.times.seconds(candidate.tokens, placed, *candidate.place)

    def _placed(self, mode: Mode, last: int) -> list[PlacedKind]:
        kinds, places = layer_kinds(self.shape)
        first = len(places) - last
        counted = [
            (kind, placement, part.count(index))
            for index, kind in enumerate(kinds)
            for placement, part in ((mode.first, places[:first]), (mode.last, places[first:]))
        ]
        return [one for one in counted if one[2]]
