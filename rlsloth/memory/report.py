"""Print a memory plan as one line, a table or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlsloth.memory.plan import ACTIVATION_TOLERANCE
from rlsloth.memory.search import LongestText
from rlsloth.memory.terms import GIB, Cache, Phase, Plan, Term
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import describe as describe_placements
from rlsloth.policy.activations.placement import uniform

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


def report_line(plan: Plan, request: Request) -> str:
    """Render a plan in one line, for a run's log.

    An example: ``memory: update 9.1 GiB, rollout 7.4 GiB of 24 GiB (estimate, engine transformers);
    micro-batches of 8192 tokens, no gradient checkpointing``.
    """
    return f"{_summary(plan)}; {_describe_update(request)}"


def _summary(plan: Plan) -> str:
    update, rollout = (plan.peak(phase) / GIB for phase in ("update", "rollout"))
    size = f"{plan.total / GIB:.1f}".removesuffix(".0")
    if plan.engine is None:
        return f"memory: update {update:.1f} of {size} GiB (estimate)"
    cache = "" if plan.cache is None else f"; {describe(plan.cache)}"
    return (
        f"memory: update {update:.1f} GiB, rollout {rollout:.1f} GiB of {size} GiB "
        f"(estimate, engine {plan.engine}){cache}"
    )


def _describe_update(request: Request) -> str:
    placements = request.placements or uniform(request.model.gradient_checkpointing, 1)
    return f"micro-batches of {request.microbatch} tokens, {describe_placements(placements)}"


def describe(cache: Cache) -> str:
    """Describe a key-value cache: its size, and how many completions it holds at once."""
    size = f"key-value cache {cache.size / GIB:.2f} GiB"
    if cache.holds == 0:
        return f"{size} for one completion of {cache.context} tokens does not fit"
    more = "all" if cache.holds == cache.asked else f"of {cache.asked}"
    return f"{size} holds {cache.holds} completions of {cache.context} tokens at once ({more})"


def print_json(
    plan: Plan,
    request: Request,
    model: str,
    source: Source,
    largest: Mapping[str, int],
    longest: LongestText,
) -> None:
    """Print a plan as JSON, with sizes in bytes.

    Keys of the rollout are left out if nothing is sampled.
    """
    samples = request.sampling is not None
    update = plan.peak("update")
    row: dict[str, Any] = {
        "fits": plan.fits,
        "model": model,
        "engine": plan.engine,
        "total": plan.total,
        "left": plan.left,
        "peak": {"rollout": plan.peak("rollout"), "update": update} if samples else update,
        "terms": [_term(term, samples) for term in plan.terms],
        "kv_cache": None if plan.cache is None else asdict(plan.cache),
        TOKENS: request.microbatch,
        "gradient_checkpointing": request.model.gradient_checkpointing,
        "host": plan.host,
    }
    if request.sampling is not None:
        tokens = request.sampling.workload.longest_prompt
        row["longest_prompt"] = {"tokens": tokens, "source": source.longest}
    else:
        for key in ("model", "engine", "kv_cache"):
            del row[key]
        row["longest_example"] = request.longest_example
    row["largest_that_fits"] = dict(largest)
    row["longest_update"] = {
        "tokens": longest.tokens,
        "layers": describe_placements(longest.placements) if longest.tokens else None,
        "host": longest.host,
    }
    if samples:
        row["activations"] = f"estimate, within {ACTIVATION_TOLERANCE:.0%} of measured on a CPU"
    print(json.dumps(row, indent=2))


def _term(term: Term, samples: bool) -> dict[str, Any]:
    return {name: value for name, value in asdict(term).items() if samples or name != "rollout"}


def print_table(
    plan: Plan,
    request: Request,
    model: str,
    source: Source,
    largest: Mapping[str, int],
    longest: LongestText,
) -> None:
    """Print a plan as a table, the verdict, and advice on settings."""
    from rich.console import Console
    from rich.table import Table

    phases: tuple[Phase, ...] = ("update",) if plan.engine is None else ("rollout", "update")
    table = Table(show_edge=False, header_style="bold")
    table.add_column("GiB", overflow="fold")
    for phase in phases:
        table.add_column(phase, justify="right")
    for term in plan.terms:
        table.add_row(term.name, *(_cell(term, phase) for phase in phases))
    table.add_section()
    peaks = [plan.peak(phase) for phase in phases]
    table.add_row("peak", *(f"{size / GIB:.2f}" for size in peaks))
    left = [f"{(plan.total - size) / GIB:.2f}" for size in peaks]
    table.add_row(f"left of {plan.total / GIB:g}", *left)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{model} {request.model.path}, {_longest(request, source)}", markup=False)
    if plan.engine is not None:
        console.print(f"rollout engine: {source.engine}", markup=False)
    console.print(f"update: {_describe_update(request)}", markup=False)
    console.print(table)
    console.print(
        "Sizes in brackets are needed at different moments: only the largest counts. Activations "
        f"are an estimate: within {ACTIVATION_TOLERANCE:.0%} of the measured peak on a CPU, not "
        "measured on a GPU."
    )
    verdict = "fits" if plan.fits else f"does not fit: {-plan.left / GIB:.2f} GiB too much"
    console.print(verdict, style="bold green" if plan.fits else "bold red")
    for line in [*_advice(plan, request, largest), *_longest_line(longest)]:
        console.print(line, markup=False)


def _longest_line(longest: LongestText) -> list[str]:
    if not longest.tokens:
        return []
    host = f"; {longest.host / GIB:.1f} GiB of host memory" if longest.host else ""
    how = f"{describe_placements(longest.placements)}{host}"
    return [f"longest text whose update fits, alone: {longest.tokens} tokens ({how})"]


def _cell(term: Term, phase: Phase) -> str:
    size = term.update if phase == "update" else term.rollout
    text = f"{size / GIB:.2f}" if size else ""
    return f"({text})" if term.moment and text else text


def _longest(request: Request, source: Source) -> str:
    if request.sampling is None:
        return f"longest example {request.longest_example} tokens"
    return f"longest prompt {request.sampling.workload.longest_prompt} tokens ({source.longest})"


def _advice(plan: Plan, request: Request, largest: Mapping[str, int]) -> list[str]:
    """List sentences about settings to change."""
    lines = []
    if plan.cache is not None:
        waits = 0 < plan.cache.holds < plan.cache.asked
        lines.append(describe(plan.cache) + (": the rest wait for room" if waits else ""))
    tokens, sequences = largest[TOKENS], largest.get(SEQUENCES, 0)
    if tokens:
        lines.append(
            f"largest --tokens-per-microbatch that fits: {tokens} (now {request.microbatch})"
        )
    if request.sampling is None:
        if not tokens:
            lines.append(
                "not even the longest example fits: lower --data.max-tokens, or pass a smaller "
                "model"
            )
        return lines
    # An engine that waits for room in its cache works with fewer sequences: no advice is needed.
    if sequences and (plan.cache is None or plan.cache.holds == 0):
        every = sequences == request.sampling.workload.sequences
        most = " (all of a step or an evaluation)" if every else ""
        lines.append(f"largest --rollout.max-sequences that fits: {sequences}{most}"
                     f" (now {request.sampling.rollout.max_sequences})")  # fmt: skip
    if not tokens and not sequences:
        lines.append(
            "neither setting alone makes it fit: lower both --tokens-per-microbatch and "
            f"--rollout.max-sequences, or pass {_smaller(plan, request)}a smaller "
            "--rollout.max-tokens or a smaller model"
        )
    return lines


def _smaller(plan: Plan, request: Request) -> str:
    """List options with which a run needs less memory, each followed by a comma."""
    experts = any("experts" in term.name for term in plan.terms)  # NF4 does not quantise them
    nf4 = "" if experts or request.model.precision == "nf4" else "--model.precision nf4, "
    return nf4 + ("--rollout.engine transformers, " if plan.cache is not None else "")
