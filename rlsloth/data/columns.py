"""The columns of a dataset and the role that each plays: one table for every loop."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlsloth.config import DatasetConfig
from rlsloth.data.rows import Row
from rlsloth.errors import UserError, nearest

MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "trajectory")
SYSTEM = ("system", "system_prompt", "system_message")
CONTEXT = ("input", "context", "passage")
REASONING = ("reasoning", "reasoning_content", "thinking", "complex_cot", "deepseek_reasoning")
_PROMPT = ("prompt", "question", "problem")
_MORE_PROMPTS = ("instruction", "query", "user_prompt", "inputs", "input", "message_1")
NAMES: dict[str, tuple[str, ...]] = {
    "messages": MESSAGES,
    "prompt": (*_PROMPT, *_MORE_PROMPTS),
    "task": (*_PROMPT, *MESSAGES, *_MORE_PROMPTS),
    "context": CONTEXT,
    "system": SYSTEM,
    "history": ("history",),
    "completion": (
        "completion", "solution", "response", "output", "generated_solution", "deepseek_solution",
        "r1_solution_1", "generation", "rationale", "message_2", "answer", "answers", "targets",
        "target", "final_answer",
    ),
    "reasoning": REASONING,
    "text": ("text", "content"),
    "chosen": ("chosen", "chosen_response", "response_j"),
    "rejected": ("rejected", "rejected_response", "response_k"),
    "label": ("label", "kto_tag", "desirable"),
    "gold": (
        "ground_truth", "gold", "gold_answer", "expected_answer", "final_answer", "correct_answer",
        "target", "reward_model.ground_truth",
    ),
}  # fmt: skip
"""Role -> the names of columns that may play it, the first that exists first.

``task`` is the prompt of reinforcement learning, which may also be a conversation. A full solution
comes before ``answer``, which often is a bare number. The search ignores case.
"""
_TOGETHER = {
    "instruction": ("output", "response"),
    "input": ("output",),
    "query": ("response", "answers"),
    "inputs": ("targets",),
}
"""Prompt column -> the column of completions that belongs to it, before all others."""
TEMPLATED = "prompt (template)"
"""Column that ``prompt_template`` fills."""


def find(role: str, columns: Iterable[str]) -> str | None:
    """Name the column that plays a role; None if there is none. A dotted name leads into a dict."""
    columns = list(columns)
    plain = {re.sub(r"[\s-]", "_", c).lower(): c for c in reversed(columns)}
    for name in NAMES[role]:
        if name in columns:
            return name
        if name in plain:
            return plain[name]
        if "." in name and name.partition(".")[0] in columns:
            return name
    return None


def find_prompt(columns: Iterable[str]) -> str | None:
    """Name the column of prompts to which completions belong."""
    columns = list(columns)
    # Alpaca's three columns, with a fourth one that has all of them as one text.
    if {"instruction", "input", "output"} <= set(columns) and "completion" not in columns:
        return "instruction"
    return find("prompt", columns)


def find_completion(columns: Iterable[str], prompt: str | None) -> str | None:
    """Name the column of completions that belongs to a column of prompts."""
    columns = [column for column in columns if column != prompt]
    together = (c for c in _TOGETHER.get(prompt or "", ()) if c in columns)
    return next(together, None) or find("completion", columns)


def columns_of(rows: Iterable[Row], *, filled: bool = False) -> list[str]:
    """List the columns of rows in their order; ``filled``: only those with a value in some row."""
    if filled:
        return list(dict.fromkeys(c for row in rows for c, v in row.items() if v is not None))
    return list(dict.fromkeys(itertools.chain.from_iterable(rows)))


def named_column(columns: Sequence[str], wanted: str, source: str) -> str:
    """Return the column ``wanted``. Raises UserError if there is none of that name."""
    if wanted not in columns:
        have = f"(columns: {', '.join(columns)})"
        raise UserError(f"{source} has no column {wanted!r}{nearest(wanted, columns)} {have}")
    return wanted


def arrange(rows: Sequence[Row], cfg: DatasetConfig, source: str) -> Sequence[Row]:
    """Apply the options drop_columns, columns and prompt_template to rows.

    Raises:
        UserError: an option names a column that does not exist.
    """
    if not (cfg.drop_columns or cfg.columns or cfg.prompt_template):
        return rows
    columns = columns_of(rows)
    for name in cfg.drop_columns:
        named_column(columns, name, f"--{cfg.SECTION}.drop-columns: {source}")
    for name in cfg.columns.values():
        if name not in columns:
            named_column(columns, name.partition(".")[0], f"--{cfg.SECTION}.columns: {source}")
    fields = re.findall(r"\{([^{}]+)\}", cfg.prompt_template or "")
    for name in fields:
        where = f"--{cfg.SECTION}.prompt-template: {source}"
        named_column(columns, name if name in columns else name.partition(".")[0], where)
    return [_arranged(row, cfg) for row in rows]


def _arranged(row: Row, cfg: DatasetConfig) -> Row:
    made = {k: v for k, v in row.items() if k not in cfg.drop_columns}
    for name, place in cfg.columns.items():
        if place in made and place not in cfg.columns:
            del made[place]
        made[name] = value_at(row, place)
    if cfg.prompt_template is not None:
        made[TEMPLATED] = _filled(cfg.prompt_template, row)
    return made


def value_at(row: Row, place: str) -> Any:
    """Return the value of a column, or of a dotted place in a dict; None if there is none."""
    if place in row:
        return row[place]
    found: Any = row
    for key in place.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _filled(template: str, row: Row) -> str:
    """Put a row's values in the place of the braces of a template."""

    def value(match: re.Match[str]) -> str:
        found = value_at(row, match[1])
        if isinstance(found, list | tuple):
            return ", ".join(map(str, found))
        return "" if found is None else str(found)

    return re.sub(r"\{([^{}]+)\}", value, template)
