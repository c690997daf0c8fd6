"""Print a memory plan as one line or a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlsloth.memory.cards import UNKNOWN
from rlsloth.memory.findings import SEQUENCES, TOKENS, Findings
from rlsloth.memory.freed import Freed, together_line
from rlsloth.memory.longest import Longest
from rlsloth.memory.plan import ACTIVATION_TOLERANCE
from rlsloth.memory.terms import GIB, Cache, Phase, Plan, Term
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Placements, uniform
from rlsloth.policy.activations.placement import describe as describe_placements

HOLDS = "cache holds"
"""Head of the column with the completions that the cache then holds at once."""
STEP = "step"
"""Head of the column with the share by which a step then takes longer."""
TIMES = 2
"""Such a share from which the factor is printed."""
LEAST_SLOWER = 0.01
"""Smallest such share that is printed."""


def report_line(plan: Plan, request: Request) -> str:
    """Render a plan in one line, for a run's log.

    An example: ``memory: update 9.1 GiB, rollout 7.4 GiB of 24 GiB (estimate, engine transformers);
    256 completions at once; micro-batches of 8192 tokens, no gradient checkpointing``.
    """
    return f"{_summary(plan, request)}; {_describe_update(request)}"


def _summary(plan: Plan, request: Request) -> str:
    update, rollout = (plan.peak(phase) / GIB for phase in ("update", "rollout"))
    size = f"{plan.total / GIB:.1f}".removesuffix(".0")
    if plan.engine is None or request.sampling is None:
        return f"memory: update {update:.1f} of {size} GiB (estimate)"
    rows = request.sampling.at_once
    at_once = f"{rows} completion{'s' * (rows != 1)} at once"
    return (
        f"memory: update {update:.1f} GiB, rollout {rollout:.1f} GiB of {size} GiB "
        f"(estimate, engine {plan.engine}); "
        + (at_once if plan.cache is None else describe(plan.cache))
    )


def _describe_update(request: Request) -> str:
    placements = request.placements or uniform(request.model.gradient_checkpointing, 1)
    placed = describe_placements(placements) + _describe_streamed(request.streamed, placements)
    if request.model.offload_embeddings is True:
        placed += ", embedding in host memory"
    return f"micro-batches of {request.microbatch} tokens, {placed}"


def _describe_streamed(count: int, placements: Placements) -> str:
    """Say how many layers' weights are in host memory; empty if none are."""
    of = f" of {len(placements)}" if len(placements) >= count else ""
    return f", {count}{of} layers' weights in host memory" if count else ""


def describe(cache: Cache) -> str:
    """Describe a key-value cache: its size, and how many completions it holds at once."""
    size = f"key-value cache {cache.size / GIB:.2f} GiB"
    if cache.holds == 0:
        return f"{size} for one completion of {cache.context} tokens does not fit"
    more = "all" if cache.holds == cache.asked else f"of {cache.asked}"
    return f"{size} holds {cache.holds} completions of {cache.context} tokens at once ({more})"


def shortfall(plan: Plan) -> str:
    """Say how much memory a run needs that the GPU or the host does not have; empty if it fits."""
    parts = []
    if plan.left < 0:
        parts.append(f"{-plan.left / GIB:.2f} GiB more memory than this GPU has")
    if not plan.fits_host:
        assert plan.host_total is not None
        parts.append(
            f"{plan.host / GIB:.2f} GiB of host memory for activations and weights, which may take "
            f"{plan.host_total / GIB:.2f} GiB"
        )
    return " and ".join(parts)


def cut_by_context(context: int, longest_prompt: int, max_tokens: int) -> str:
    """Say that a context cuts completions short; empty if it does not. All are in tokens."""
    if longest_prompt + max_tokens <= context:
        return ""
    return (
        f"the context of {context} tokens leaves {context - longest_prompt} for a completion of "
        f"the longest prompt ({longest_prompt} tokens), less than --rollout.max-tokens {max_tokens}"
    )


def print_table(findings: Findings) -> None:
    """Print a plan as a table, the verdict, advice on settings, and what options would free."""
    from rich.console import Console
    from rich.table import Table

    plan, request = findings.plan, findings.request
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
    table.add_row(f"left of {f'{plan.total / GIB:.2f}'.rstrip('0').rstrip('.')}", *left)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{findings.model} {request.model.path}, {_prompts(findings)}", markup=False)
    if plan.engine is not None:
        console.print(f"rollout engine: {findings.source.engine}", markup=False)
    console.print(f"update: {_describe_update(request)}", markup=False)
    console.print(table)
    if request.card is UNKNOWN:
        console.print("speeds: an H100's, since the card is not known (--gpu)")
    console.print(
        "Sizes in brackets are needed at different moments: only the largest counts. Activations "
        f"are an estimate: within {ACTIVATION_TOLERANCE:.0%} of the measured peak on a CPU, and "
        "3% on an H200 with flash-attention 4."
    )
    _print_verdict(console, plan)
    for line in [*_advice(findings), *_longest_lines(findings)]:
        console.print(line, markup=False)
    _print_freed(console, findings)


def _print_verdict(console: Any, plan: Plan) -> None:
    lacks = shortfall(plan)
    verdict = f"does not fit: it needs {lacks}" if lacks else "fits"
    console.print(verdict, style="bold red" if lacks else "bold green", markup=False)
    if plan.host and plan.fits_host:
        free = (
            "" if plan.host_total is None else f", of {plan.host_total / GIB:.2f} that it may take"
        )
        console.print(f"host memory: {plan.host / GIB:.2f} GiB{free}", markup=False)


def _print_freed(console: Any, findings: Findings) -> None:
    """Print a row for each option that would free memory."""
    from rich.table import Table

    plan, freed = findings.plan, findings.freed
    if not freed:
        return
    columns = _freed_columns(plan, freed)
    table = Table(show_edge=False, header_style="bold")
    table.add_column("GiB that each frees, alone", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for one in freed:
        table.add_row(one.option, *(_freed_cell(plan, one, name) for name in columns))
    console.print(table)
    if findings.together:
        console.print(f"no single one is enough: {together_line(findings.together)}", markup=False)


def _freed_columns(plan: Plan, freed: Sequence[Freed]) -> list[str]:
    columns = ["update"] if plan.engine is None else ["rollout", "update"]
    columns += ["host"] * any(round(one.host / GIB, 2) for one in freed)
    columns += [HOLDS] * any(one.holds is not None for one in freed)
    columns += [STEP] * any(_is_slower(one) for one in freed)
    return columns + ["then"] * (not plan.fits)


def _is_slower(one: Freed) -> bool:
    return one.slower is not None and abs(one.slower) >= LEAST_SLOWER


def _slower(one: Freed) -> str:
    if one.slower is None or not _is_slower(one):
        return ""
    return f"{1 + one.slower:.0f} times" if one.slower >= TIMES else f"{one.slower:+.0%}"


def _freed_cell(plan: Plan, one: Freed, column: str) -> str:
    if column == HOLDS:
        same = one.holds is None or plan.cache is None or one.holds == plan.cache.holds
        return "" if same else str(one.holds)
    if column == STEP:
        return _slower(one)
    if column == "then":
        return "fits" if one.fits else "" if one.fits_host else "host too small"
    size = {"rollout": one.rollout, "update": one.update, "host": one.host}[column]
    return f"{size / GIB:.2f}" if round(size / GIB, 2) else ""


def _longest_lines(findings: Findings) -> list[str]:
    lines = []
    completion = findings.longest_completion
    if findings.longest_text.tokens:
        lines.append(
            f"longest text whose update fits, alone: {_describe_longest(findings.longest_text)}"
        )
    if completion is not None and completion.tokens:
        assert findings.request.sampling is not None
        sampling = findings.request.sampling
        lines.append(
            f"longest completion of a prompt of {sampling.workload.longest_prompt} tokens, "
            f"{sampling.group_at_once} of a group at once: {_describe_longest(completion)}"
        )
    return lines


def _describe_longest(longest: Longest) -> str:
    host = f"; {longest.host / GIB:.1f} GiB of host memory" if longest.host else ""
    placed = describe_placements(longest.placements)
    placed += _describe_streamed(longest.streamed, longest.placements)
    limit = ", all that the context holds" if longest.limited else ""
    return f"{longest.tokens} tokens{limit} ({placed}{host})"


def _cell(term: Term, phase: Phase) -> str:
    size = term.update if phase == "update" else term.rollout
    text = f"{size / GIB:.2f}" if size else ""
    return f"({text})" if term.moment and text else text


def _prompts(findings: Findings) -> str:
    request = findings.request
    if request.sampling is None:
        return f"longest example {request.longest_example} tokens"
    longest = request.sampling.workload.longest_prompt
    return f"longest prompt {longest} tokens ({findings.source.longest})"


def _advice(findings: Findings) -> list[str]:
    """List sentences about settings to change."""
    plan, request = findings.plan, findings.request
    lines = []
    if plan.cache is not None:
        waits = 0 < plan.cache.holds < plan.cache.asked
        lines.append(describe(plan.cache) + (": the rest wait for room" if waits else ""))
    tokens, sequences = findings.largest[TOKENS], findings.largest.get(SEQUENCES, 0)
    if tokens:
        lines.append(
            f"largest --tokens-per-microbatch that fits, all else as above: {tokens} "
            f"(now {request.microbatch})"
        )
    if request.sampling is None:
        return lines + _last_resort(findings, "--data.max-tokens")
    # An engine that waits for room in its cache works with fewer sequences: no advice is needed.
    if sequences and (plan.cache is None or plan.cache.holds == 0):
        every = sequences == request.sampling.workload.sequences
        most = " (all of a step or an evaluation)" if every else ""
        lines.append(
            f"largest --rollout.max-sequences that fits, all else as above: {sequences}{most} "
            f"(now {request.sampling.at_once})"
        )
    sampling = request.sampling
    prompts = sampling.workload.longest_prompt > sampling.rollout.max_tokens
    shorter = "--env.max-prompt-tokens" if prompts else "--rollout.max-tokens"
    return lines + _last_resort(findings, shorter)


def _last_resort(findings: Findings, shorter: str) -> list[str]:
    """Say what makes a run fit that no option helps; ``shorter`` shortens its sequences."""
    plan = findings.plan
    if plan.fits:
        return []
    lines = []
    if findings.host_enough is not None:
        lines.append(
            f"as it is, it fits with {findings.host_enough / GIB:.1f} GiB of host memory for "
            "activations and weights"
        )
    if not (findings.together or any(one.fits for one in findings.freed)):
        lines.append(
            f"no option below makes it fit: pass a still smaller {shorter} or a smaller model"
        )
    return lines
