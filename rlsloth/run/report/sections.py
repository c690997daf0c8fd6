"""Sections of a report: its charts, made from the rows of metrics.jsonl."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

from rlsloth.run.metrics import is_number
from rlsloth.run.report.charts import Chart, Line

Rows = list[dict[str, Any]]
_NO_SHARES = ("loss", "rewards/", "logps/", "log_odds", "kl")
"""Parts of names of evaluation metrics that are no shares, even between 0 and 1."""


def values_of(rows: Rows, key: str) -> list[float]:
    """Finite values of a metric, in order."""
    return [row[key] for row in rows if is_number(row.get(key))]


def chart_sections(rows: Rows) -> list[tuple[str, list[Chart]]]:
    """Charts of the page by section; a chart without values is left out."""
    line = partial(_line_chart, rows)
    sections: list[tuple[str, list[Chart | None]]] = [
        ("Learning", [_reward_chart(rows), *_reward_charts(rows), *_signal_charts(rows)]),
        ("Preferences", _preference_charts(rows)),
        ("Held-out problems", [*_eval_charts(rows)]),
        (
            "Completions",
            [
                line("Length", "completions/mean_length", "sampled tokens, mean"),
                line(
                    "Cut off",
                    "completions/clipped_ratio",
                    "share at the length limit",
                    percent=True,
                ),
                line("Tool calls", "tools/call_frequency", "a completion"),
                line("Failed tool calls", "tools/failure_frequency", "share", percent=True),
            ],
        ),
        (
            "Optimisation",
            [
                line("Entropy", "entropy", "nats a token"),
                line("KL to the start", "kl", "nats a token"),
                line("Gradient norm", "grad_norm", "before clipping"),
                line("Loss", "loss", _loss_note(rows), from_zero=False),
                line(
                    "Clipped", "clip_ratio/region_mean", "share of tokens", percent=True, dull=0.0
                ),
                line("Clipped", "cispo_clip_ratio", "share of tokens", percent=True, dull=0.0),
                line("Learning rate", "learning_rate", dull=None),
            ],
        ),
        (
            "Sampler against trainer",
            [
                line(
                    "Log-prob gap", "sampling/sampling_logp_difference/mean", "nats a token, mean"
                ),
                line("Largest gap", "sampling/sampling_logp_difference/max", "nats, one token"),
                line(
                    "Correction weight",
                    "sampling/importance_sampling_ratio/mean",
                    "mean",
                    from_zero=False,
                    dull=1.0,
                ),
            ],
        ),
        ("Time", [_time_chart(rows), _speed_chart(rows)]),
    ]
    kept = [(title, [chart for chart in charts if chart is not None]) for title, charts in sections]
    return [(title, charts) for title, charts in kept if charts]


def _loss_note(rows: Rows) -> str:
    sampled = any("reward" in row for row in rows)
    return "near 0 by construction when on-policy" if sampled else "mean over the step's examples"


def _preference_charts(rows: Rows) -> list[Chart | None]:
    """Charts of preference training; None for metrics that the run does not have."""
    line = partial(_line_chart, rows)
    return [
        line("Margin", "rewards/margins", "reward of chosen minus rejected"),
        line("Chosen preferred", "rewards/accuracies", "share of pairs", percent=True),
        _both(rows, "Implicit rewards", "rewards", "mean"),
        _both(rows, "Log-probs", "logps", "of completions, nats"),
        line("Likelihood term", "nll_loss", "nats a token"),
    ]


def _both(rows: Rows, title: str, key: str, note: str) -> Chart | None:
    sides = {side: _points(rows, f"{key}/{side}") for side in ("chosen", "rejected")}
    lines = [Line(side, points) for side, points in sides.items() if points]
    return Chart(title, lines, note, from_zero=False) if lines else None


def _points(rows: Rows, key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if is_number(row.get(key))]


def _line_chart(
    rows: Rows,
    title: str,
    key: str,
    note: str = "",
    *,
    percent: bool = False,
    from_zero: bool = True,
    dull: float | None = float("nan"),
) -> Chart | None:
    """A chart of one metric; None without values, or when nothing is to be seen: all values equal
    ``dull``, or each other if ``dull`` is None."""
    points = _points(rows, key)
    values = {value for _, value in points}
    boring = values == {dull} or (dull is None and len(values) == 1)
    if not points or boring:
        return None
    return Chart(title, [Line(title, points)], note, percent=percent, from_zero=from_zero)


def _reward_chart(rows: Rows) -> Chart | None:
    known = [row for row in rows if is_number(row.get("reward"))]
    if not known:
        return None
    return _with_band("Reward", "weighted sum, mean ± std", known, "reward", "reward_std")


def _with_band(title: str, note: str, rows: Rows, mean: str, std: str) -> Chart:
    spread = [row[std] if is_number(row.get(std)) else 0.0 for row in rows]
    values = [row[mean] for row in rows]
    low = [value - width for value, width in zip(values, spread, strict=True)]
    high = [value + width for value, width in zip(values, spread, strict=True)]
    points = [(row["step"], row[mean]) for row in rows]
    return Chart(title, [Line(title, points, low, high)], note)


def _reward_charts(rows: Rows) -> list[Chart]:
    """One chart a reward; none for a single reward, which the weighted sum shows already."""
    names = _names(rows, lambda key: key.startswith("rewards/") and key.endswith("/mean"))
    if len(names) < 2:
        return []
    charts = []
    for key in names:
        stem = key.removesuffix("/mean")
        known = [row for row in rows if is_number(row.get(key))]
        if known:
            title = stem.removeprefix("rewards/")
            charts.append(_with_band(title, "mean ± std", known, key, f"{stem}/std"))
    return charts


def _signal_charts(rows: Rows) -> list[Chart | None]:
    """Charts of groups without a gradient and of failed rewards."""
    failed = [
        key
        for key in _names(rows, lambda key: key.endswith("/failures"))
        if any(values_of(rows, key))
    ]
    charts = [
        _line_chart(
            rows, "Groups without signal", "frac_reward_zero_std", "all rewards equal", percent=True
        )
    ]
    if failed:
        lines = [Line(key.split("/")[1], _points(rows, key)) for key in failed]
        charts.append(Chart("Failed rewards", lines, "completions a step"))
    return charts


def _eval_charts(rows: Rows) -> list[Chart]:
    keys = _names(
        rows,
        lambda key: key.startswith("eval_") and not key.endswith(("_low", "_high", "_runtime")),
    )
    charts = []
    for key in keys:
        known = [row for row in rows if is_number(row.get(key))]
        if not known:
            continue
        low, high = _bound(known, f"{key}_low"), _bound(known, f"{key}_high")
        title = key.removeprefix("eval_").replace("_", " ").replace("/", ": ")
        line = Line(title, [(row["step"], row[key]) for row in known], low, high)
        # Most evaluation metrics are shares and accuracies, which read best in per cent.
        is_share = not any(word in key for word in _NO_SHARES) or key.endswith("accuracies")
        percent = is_share and all(0 <= row[key] <= 1 for row in known)
        note = "95 % interval" if low and high else ""
        charts.append(Chart(title[:1].upper() + title[1:], [line], note, "interval", percent))
    return charts


def _bound(rows: Rows, key: str) -> list[float] | None:
    """One side of the intervals; None unless every row has it."""
    bound = values_of(rows, key)
    return bound if len(bound) == len(rows) else None


def _names(rows: Rows, wanted: Callable[[str], bool]) -> list[str]:
    """Metric names in the order in which they first appear."""
    return list(dict.fromkeys(key for row in rows for key in row if wanted(key)))


def _time_chart(rows: Rows) -> Chart | None:
    steps = [row for row in rows if is_number(row.get("step_time"))]
    phases = _names(steps, lambda key: key.startswith("time/"))
    if not phases:
        return None
    lines = [
        Line(key.removeprefix("time/"), [(row["step"], row.get(key) or 0.0) for row in steps])
        for key in sorted(phases, key=lambda key: -sum(row.get(key) or 0.0 for row in steps))
    ]
    return Chart("Seconds a step", lines, "by phase", "stack")


def _speed_chart(rows: Rows) -> Chart | None:
    steps = [row for row in rows if is_number(row.get("num_tokens")) and row.get("step_time")]
    points = [
        (row["step"], (row["num_tokens"] - before["num_tokens"]) / row["step_time"])
        for before, row in itertools.pairwise(steps)
    ]
    return (
        Chart("Tokens a second", [Line("Tokens a second", points)], "prompts and completions")
        if points
        else None
    )
