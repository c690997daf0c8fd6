"""Markdown tables of the results of full_step.py.

    python examples/benchmarks/table.py RESULT.json...

Times and tokens are medians over the measured steps, memory is their maximum.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measure import PHASES

COMMON = (
    "model",
    "prompts",
    "group",
    "prompt_tokens",
    "new_tokens",
    "rank",
    "micro_tokens",
    "kv_gb",
    "gradient_checkpointing",
)
"""Settings that have to agree in results that are compared."""
HEAD = (
    "trainer",
    "precision",
    "sleep",
    "s a step",
    *(f"{phase}, s" for phase in PHASES),
    "sampled tokens/s",
    "tokens sampled",
    "allocated, GiB",
    "device, GiB",
    "first step done, s",
)

Result = dict[str, Any]


def main(argv: list[str]) -> None:
    if not argv:
        sys.exit("usage: table.py RESULT.json...")
    print(table([json.loads(Path(name).read_text()) for name in argv]))


def table(results: Sequence[Result]) -> str:
    """Both tables, after notes on differences between results and on machines."""
    notes = [note for note in (differing(results), machines(results)) if note]
    body = [row(HEAD), row(["---"] * len(HEAD)), *(row(cells(result)) for result in results)]
    return "\n\n".join([*notes, "\n".join(body), "\n".join(ratios(results))])


def cells(result: Result) -> list[str]:
    """Cells of a row of the first table."""
    settings = result["settings"]
    seconds, tokens = middle(result, "seconds"), middle(result, "tokens")
    return [
        result["trainer"],
        settings["precision"],
        "yes" if settings["sleep"] == "True" else "no",
        f"{seconds:.2f}",
        *(f"{middle(result, phase):.2f}" for phase in PHASES),
        f"{tokens / seconds:,.0f}",
        f"{tokens:,.0f}",
        f"{most(result, 'allocated_gib'):.1f}",
        f"{most(result, 'device_gib'):.1f}",
        f"{result['first_step_done_s']:.0f}",
    ]


def ratios(results: Sequence[Result]) -> list[str]:
    """Rows of the second table: time of the column divided by that of the row; above 1 the row is
    faster."""
    names = [label(result) for result in results]
    lines = [row(["is faster by", *names]), row(["---"] * (len(names) + 1))]
    for name, one in zip(names, results, strict=True):
        times = (middle(other, "seconds") / middle(one, "seconds") for other in results)
        lines.append(row([name, *(f"{time:.2f}" for time in times)]))
    return lines


def label(result: Result) -> str:
    settings = result["settings"]
    sleep = ", sleep" if settings["sleep"] == "True" else ""
    return f"{result['trainer']} {settings['precision']}{sleep}"


def differing(results: Sequence[Result]) -> str:
    """A warning if the results are of different work; else empty."""
    found = [
        f"{key} ({', '.join(sorted(values))})"
        for key in COMMON
        if len(values := {result["settings"][key] for result in results}) > 1
    ]
    if len({middle(result, "tokens") for result in results}) > 1:
        found.append("tokens sampled")
    return f"Not the same work: {', '.join(found)} differ." if found else ""


def machines(results: Sequence[Result]) -> str:
    """Devices and versions, each listed once."""
    found = [", ".join(map(" ".join, result["machine"].items())) for result in results]
    return "\n".join(f"- {text}" for text in dict.fromkeys(found))


def middle(result: Result, key: str) -> float:
    """Median over the measured steps."""
    return _over(result, key, statistics.median)


def most(result: Result, key: str) -> float:
    return _over(result, key, max)


def _over(result: Result, key: str, of: Callable[[list[float]], float]) -> float:
    return of([step[key] for step in result["steps"][1:]])


def row(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
