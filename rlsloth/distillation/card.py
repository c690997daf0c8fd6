"""README.md of a distilled dataset: metadata for the hub, figures, and how to reproduce it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlsloth import __version__
from rlsloth.config.distill import DistillConfig
from rlsloth.distillation.raw import FILE, Problem, RawFile
from rlsloth.distillation.selection import RULES, Selection
from rlsloth.files import write_atomically

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"))


def write_card(out: Path, cfg: DistillConfig, selection: Selection, shared: int) -> None:
    """Write README.md; ``shared`` problems were left out because they have a held-out question."""
    first = next(RawFile(out).read())
    write_atomically(out / "README.md", render_card(cfg, selection, shared, first))


def render_card(cfg: DistillConfig, selection: Selection, shared: int, first: Problem) -> str:
    """Render the card in Markdown."""
    size = next((name for limit, name in _SIZES if selection.kept < limit), "1M<n<10M")
    file = f"train.{cfg.format}"
    about = {
        "tags": ["rlsloth", "distillation", "reasoning", "synthetic"],
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": file}]},
        ],
    }
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---",
        f"# {selection.kept} verified traces of {selection.kept_problems} problems",
        f"Completions of problems from {_source(first.source)}, sampled from "
        f"{_teacher(first.teacher)}; only traces that the rewards verified are kept. The licences "
        "of teacher and source apply to them, too.",
        "## Figures",
        _table(_figures(cfg, selection, shared)),
        "## Tokens of a kept trace",
        _table(_quantiles(selection.lengths)),
        "## Left out",
        _table([(rule, selection.dropped[rule]) for rule in RULES]),
        "Each trace counts under the first rule that drops it.",
        "## Columns",
        "`prompt` and `completion` are messages (text where the source continues text), as "
        "`rlsloth sft` and TRL's SFTTrainer take them. `provenance` is the origin of each row: "
        "source and row, teacher, sampling, rewards, the problem's pass rate, tokens, version and "
        "date. The other columns are the source's; one whose name is taken is called "
        "`source_<name>`.",
        "## Reproduce it",
        f"```\nrlsloth distill config.yaml --out FOLDER\n```\n\n{_reproduction(cfg)}",
    ]
    return "\n\n".join([*parts, f"Made with rlsloth {__version__}."]) + "\n"


def _teacher(teacher: dict[str, Any]) -> str:
    text = f"`{teacher['model']}`"
    if teacher["revision"]:
        text += f" at revision `{teacher['revision']}`"
    if teacher["weights"]:
        text += f" (weights `{teacher['weights'][:16]}`)"
    if teacher["adapter"]:
        text += f" with adapter `{teacher['adapter']}` (SHA-256 `{teacher['adapter_sha256'][:16]}`)"
    return text + (f" at {teacher['endpoint']}" if teacher["endpoint"] else "")


def _source(source: dict[str, Any]) -> str:
    if source["dataset"] is None:
        return f"environment `{source['environment']}`"
    return f"`{source['dataset']}`" + (f", split {source['split']}" if source["split"] else "")


def _figures(cfg: DistillConfig, s: Selection, shared: int) -> list[tuple[str, Any]]:
    traces, rollout = cfg.traces, cfg.rollout
    name = f"{traces.reward or 'first reward'} >= {traces.correct_at:g}"
    return [
        ("problems", s.problems),
        ("left out before sampling: held-out questions", shared),
        ("samples per problem", traces.samples),
        ("samples", s.samples),
        (f"verified samples ({name})", f"{s.verified} ({s.verified / s.samples:.1%})"),
        ("problems with a verified sample", f"{s.solved} ({s.solved / s.problems:.1%})"),
        ("kept traces", s.kept),
        ("problems kept", s.kept_problems),
        ("tokens sampled", s.tokens),
        ("sampling", f"temperature {rollout.temperature:g}, top_p {rollout.top_p:g}, "
            f"at most {rollout.max_tokens} tokens"),
        ("seed", cfg.seed),
    ]  # fmt: skip


def _quantiles(lengths: Sequence[int]) -> list[tuple[str, Any]]:
    """Nearest-rank quantiles, and the mean."""
    ranked = sorted(lengths)
    last = len(ranked) - 1
    shares = (("shortest", 0.0), ("10 %", 0.1), ("median", 0.5), ("90 %", 0.9), ("longest", 1.0))
    rows: list[tuple[str, Any]] = [(name, ranked[round(last * share)]) for name, share in shares]
    return [*rows, ("mean", f"{statistics.fmean(ranked):.1f}")]


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _reproduction(cfg: DistillConfig) -> str:
    if cfg.endpoint.url is not None:
        return "A server may return other completions; every row has the seed of its request."
    return (
        "The same machine and versions give the same traces: random numbers depend on the seed and "
        "on the position of a chunk's first problem. To apply other filters to the same samples "
        f"({FILE}): `--out` this folder and `--resume`."
    )
