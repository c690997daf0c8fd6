"""Findings of a plan: the memory of a run, what else fits, and what options would free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rlsloth.memory.freed import Freed, list_freed, that_fit_together
from rlsloth.memory.longest import Longest, longest_completion, longest_text
from rlsloth.memory.plan import make_plan
from rlsloth.memory.search import largest_sequences, largest_tokens
from rlsloth.memory.settings import decide_settings
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import Plan
from rlsloth.memory.workload import Request

TOKENS = "tokens_per_microbatch"
SEQUENCES = "rollout.max_sequences"
"""Settings whose largest fitting value is shown."""


@dataclass(frozen=True, slots=True)
class Source:
    """The origin of a plan's inputs, for the table."""

    longest: str = "from the data"
    """Origin of the longest prompt's length."""
    engine: str = ""
    """Name of the planned engine, with the reason if it was chosen automatically."""


@dataclass(frozen=True, slots=True)
class Findings:
    """A plan with the settings that it decided, and what other settings would change."""

    plan: Plan
    request: Request
    """The run with all settings decided."""
    model: str
    """Name of the model's class."""
    source: Source
    largest: Mapping[str, int]
    """Largest value of each setting that fits, with the other one unchanged; 0 if none."""
    longest_text: Longest
    """The longest text whose update fits."""
    longest_completion: Longest | None
    """The longest completion that fits; None if nothing is sampled."""
    freed: Sequence[Freed]
    """Memory that single options would free."""
    together: Sequence[str]
    """Options that together make the run fit; empty if it fits, or one of ``freed`` is enough."""
    host_enough: int | None
    """Bytes of host memory with which the run would fit as it is; None if it fits, none do, or the
    host is not limited."""


def find_all(
    planner: Callable[[ModelShape, Request], Plan],
    shape: ModelShape,
    request: Request,
    chosen: Request,
    source: Source,
) -> Findings:
    """Plan a run, and find what else fits.

    Args:
        planner: function that plans a request for a model.
        shape: the model's sizes.
        request: the run as the user set it.
        chosen: the run with all settings decided.
        source: origin of the inputs.
    """
    plan_of = partial(planner, shape)
    plan = plan_of(chosen)
    open_update = replace(request, sampling=chosen.sampling)
    largest = {TOKENS: largest_tokens(plan_of, chosen, chosen.least_tokens(shape))}
    completion = None
    if request.sampling is not None:
        largest[SEQUENCES] = largest_sequences(plan_of, chosen)
        completion = longest_completion(planner, shape, open_update)
    freed = list_freed(planner, shape, chosen, request)
    lacks_host = not plan.fits and plan.host_total is not None
    lacks = not plan.fits and not any(f.fits for f in freed)
    return Findings(
        plan=plan,
        request=chosen,
        model=shape.name,
        source=source,
        largest=largest,
        longest_text=longest_text(planner, shape, open_update),
        longest_completion=completion,
        freed=freed,
        together=that_fit_together(planner, shape, chosen) if lacks else (),
        host_enough=_host_enough(planner, shape, request) if lacks_host else None,
    )


def _host_enough(
    planner: Callable[[ModelShape, Request], Plan], shape: ModelShape, request: Request
) -> int | None:
    """Return the bytes of host memory that a run takes which fits if they are not limited."""

    def unlimited(shape: ModelShape, request: Request) -> Plan:
        return replace(planner(shape, request), host_total=None)

    plan = unlimited(shape, decide_settings(unlimited, shape, request))
    return plan.host if plan.fits and plan.host else None


def planner_for(total: int, host: int | None) -> Callable[[ModelShape, Request], Plan]:
    """Return a function that plans requests for a GPU of ``total`` bytes.

    Args:
        total: bytes of the GPU.
        host: bytes of host memory for activations; None if unknown.
    """
    return partial(_plan, total, host)


def _plan(total: int, host: int | None, shape: ModelShape, request: Request) -> Plan:
    return make_plan(shape, request, total, host_total=host)
