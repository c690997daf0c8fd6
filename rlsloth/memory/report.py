"""How a memory plan is shown: one line, a table, or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rlsloth.config import GrpoConfig
from rlsloth.memory.plan import ACTIVATION_TOLERANCE
from rlsloth.memory.terms import GIB, Cache, Plan
from rlsloth.memory.workload import asked_sequences

SHOWN = ("tokens_per_microbatch", "rollout.max_sequences")


@dataclass(frozen=True, slots=True)
class Source:
    """What a plan was made from."""

    model: str
    """Its class."""
    longest_prompt: int
    """Tokens."""
    prompts: str
    """Where that number comes from."""
    engine: str
    """Which one is planned, and why where that is not what was asked for."""


def summary(plan: Plan) -> str:
    """``memory: update 9.1 GiB, rollout 7.4 GiB of 24 GiB (estimate, engine transformers)``."""
    update, rollout = (plan.peak(phase) / GIB for phase in ("update", "rollout"))
    size = f"{plan.total / GIB:.1f}".removesuffix(".0")
    if plan.engine is None:
        return f"memory: update {update:.1f} of {size} GiB (estimate)"
    cache = "" if plan.cache is None else f"; {describe(plan.cache)}"
    return (
        f"memory: update {update:.1f} GiB, rollout {rollout:.1f} GiB of {size} GiB "
        f"(estimate, engine {plan.engine}){cache}"
    )


def update_said(cfg: GrpoConfig) -> str:
    """``micro-batches of 8192 tokens, no gradient checkpointing``."""
    kept = "" if cfg.model.gradient_checkpointing else "no "
    return f"micro-batches of {cfg.microbatch} tokens, {kept}gradient checkpointing"


def describe(cache: Cache) -> str:
    """``key-value cache 8.10 GiB holds 128 completions of 812 tokens at once (of 256)``."""
    size = f"key-value cache {cache.size / GIB:.2f} GiB"
    if cache.holds == 0:
        return f"{size} for one completion of {cache.context} tokens finds no room"
    more = "all" if cache.holds == cache.asked else f"of {cache.asked}"
    return f"{size} holds {cache.holds} completions of {cache.context} tokens at once ({more})"


def advice(plan: Plan, cfg: GrpoConfig, largest: Mapping[str, int]) -> list[str]:
    """Sentences on what to turn; ``largest``: planning.settings."""
    tokens, sequences = (largest[name] for name in SHOWN)
    said = []
    if plan.cache is not None:
        waits = 0 < plan.cache.holds < plan.cache.asked
        said.append(describe(plan.cache) + (": others wait for room" if waits else ""))
    if tokens:
        said.append(f"largest --tokens-per-microbatch that fits: {tokens} (now"
                    f" {cfg.microbatch})")  # fmt: skip
    # vLLM makes do with the cache that there is: more than fit are no mistake.
    if sequences and (plan.cache is None or plan.cache.holds == 0):
        most = " (all that are asked for at once)" if sequences == asked_sequences(cfg) else ""
        said.append(f"largest --rollout.max-sequences that fits: {sequences}{most}"
                    f" (now {cfg.rollout.max_sequences})")  # fmt: skip
    if not tokens and not sequences:
        said.append(
            "neither setting alone makes it fit: lower both --tokens-per-microbatch and "
            f"--rollout.max-sequences, or take {_smaller(plan, cfg)}a smaller --rollout.max-tokens "
            "or model"
        )
    return said


def _smaller(plan: Plan, cfg: GrpoConfig) -> str:
    """Choices with which a run takes less, each with a comma behind it."""
    experts = any("experts" in term.name for term in plan.terms)  # they are not quantised
    nf4 = "" if experts or cfg.model.precision == "nf4" else "--model.precision nf4, "
    return nf4 + ("--rollout.engine transformers, " if plan.engine == "vllm" else "")


def as_json(plan: Plan, cfg: GrpoConfig, source: Source, largest: Mapping[str, int]) -> None:
    """Print it as JSON, sizes in bytes."""
    row = {
        "fits": plan.fits,
        "model": source.model,
        "engine": plan.engine,
        "total": plan.total,
        "left": plan.left,
        "peak": {"rollout": plan.peak("rollout"), "update": plan.peak("update")},
        "terms": [asdict(term) for term in plan.terms],
        "kv_cache": None if plan.cache is None else asdict(plan.cache),
        "tokens_per_microbatch": cfg.microbatch,
        "gradient_checkpointing": bool(cfg.model.gradient_checkpointing),
        "longest_prompt": {"tokens": source.longest_prompt, "source": source.prompts},
        "largest_that_fits": dict(largest),
        "activations": f"estimate, within {ACTIVATION_TOLERANCE:.0%} of measured on a CPU",
    }
    print(json.dumps(row, indent=2))


def print_plan(plan: Plan, cfg: GrpoConfig, source: Source, largest: Mapping[str, int]) -> None:
    """Print it as a table and what it means."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False, header_style="bold")
    table.add_column("GiB", overflow="fold")
    for heading in ("rollout", "update"):
        table.add_column(heading, justify="right")
    for term in plan.terms:
        cells = []
        for size in (term.rollout, term.update):
            text = f"{size / GIB:.2f}" if size else ""
            cells.append(f"({text})" if term.moment and text else text)
        table.add_row(term.name, *cells)
    table.add_section()
    peaks = (plan.peak("rollout"), plan.peak("update"))
    table.add_row("peak", *(f"{size / GIB:.2f}" for size in peaks))
    table.add_row(
        f"left of {plan.total / GIB:g}", *(f"{(plan.total - s) / GIB:.2f}" for s in peaks)
    )
    console = Console(highlight=False, soft_wrap=True)
    prompt = f"longest prompt {source.longest_prompt} tokens ({source.prompts})"
    console.print(f"{source.model} {cfg.model.path}, {prompt}", markup=False)
    console.print(f"rollout engine: {source.engine}", markup=False)
    console.print(f"update: {update_said(cfg)}", markup=False)
    console.print(table)
    console.print(
        "(In brackets): at different moments, the largest counts. Activations are an estimate: on "
        f"a CPU within {ACTIVATION_TOLERANCE:.0%} of the measured peak, not measured on a GPU."
    )
    verdict = "fits" if plan.fits else f"does not fit: {-plan.left / GIB:.2f} GiB too much"
    console.print(verdict, style="bold green" if plan.fits else "bold red")
    for line in advice(plan, cfg, largest):
        console.print(line, markup=False)
