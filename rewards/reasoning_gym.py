"""The scorers of reasoning-gym's tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter
from reasoning_gym.factory import DATASETS

from rlsloth.errors import UserError, nearest
from rlsloth.scoring.answers import completion_text, final_text, last_tag
from rlsloth.scoring.example import Example
from rlsloth.scoring.figures import numbers_in
from rlsloth.scoring.typed_json import from_json


def reasoning_gym(
    completions: list[Any],
    task: list[str],
    entry: list[dict[str, Any]],
    finish_reasons: list[str] | None = None,
    task_params: list[dict[str, Any]] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    *,
    extract: str = "answer_tag",
    finished_only: bool = True,
) -> list[float | None]:
    """The score from 0 to 1 that reasoning-gym's own scorer for the row's task gives the answer.

    A completion in which no answer is found after the last </think> scores 0; no other way to find
    one is tried. So does an answer on which the task's scorer raises, such as prose where it
    expects a number, unless it raises on the row's own answer, too; the metric
    ``rewards/reasoning_gym/scorer_raised`` is the share of such answers. A Markdown fence around
    the answer does not count. Some scorers read ``task_params``, the task's parameters.

    Args:
        extract: How to find the answer. answer_tag: the last <answer>...</answer>. last_number:
            the last number of the text. whole: the text, stripped (many tasks give part of the
            reward to an answer with other words around it).
        finished_only: A completion cut off by the length limit scores 0. Without it last_number
            pays for numbers of the question that a cut-off completion repeats.

    Raises:
        UserError: no such task, or no such way to extract.
    """
    if extract not in _EXTRACTORS:
        known = list(_EXTRACTORS)
        raise UserError(
            f"reward.params.reasoning_gym.extract: no {extract!r}{nearest(extract, known)} "
            f"({', '.join(known)})"
        )
    find = _EXTRACTORS[extract]
    scores: list[float | None] = []
    raised, reasons = 0, finish_reasons or ["stop"] * len(completions)
    settings = [json.dumps(p or {}, sort_keys=True) for p in task_params or [{}] * len(task)]
    for completion, name, row, finish, setting in zip(
        completions, task, entry, reasons, settings, strict=True
    ):
        cut_off = finished_only and finish == "length"
        found = None if cut_off else find(final_text(completion_text(completion)))
        if found is None:
            scores.append(0.0)
            continue
        row = from_json(row)
        try:
            scores.append(float(_scorer(name, setting)(found, row)))
        except UserError:
            raise
        except Exception:
            # Raises, too, if the row or the scorer is at fault rather than the answer.
            _scorer(name, setting)(str(row.get("answer")), row)
            scores.append(0.0)
            raised += 1
    if log_metric is not None and scores:
        log_metric("rewards/reasoning_gym/scorer_raised", raised / len(scores))
    return scores


def _tagged(text: str) -> str | None:
    """The last answer in tags, without a fence of three backticks around it."""
    found = last_tag(text, "answer")
    fenced = _FENCE.fullmatch(found) if found is not None else None
    return fenced[1].strip() if fenced is not None and "```" not in fenced[1] else found


def _last_number(text: str) -> str | None:
    found = numbers_in(text)
    return found[-1] if found else None


_FENCE = re.compile(r"```[\w+-]*[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)
_EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "answer_tag": _tagged,
    "last_number": _last_number,
    "whole": str.strip,
}


@lru_cache(maxsize=128)
def _scorer(task: str, params: str) -> Callable[[str, dict[str, Any]], float]:
    """The scorer of a task with parameters, as JSON."""
    if task not in DATASETS:
        raise UserError(f"reasoning_gym has no task {task!r}{nearest(task, sorted(DATASETS))}")
    dataset, config = DATASETS[task]
    made = TypeAdapter(config).validate_python(json.loads(params))
    scorer: Callable[[str, dict[str, Any]], float] = dataset(config=made).score_answer
    return scorer


_SUM = {
    "task": "chain_sum",
    "entry": {"question": "4 - 1 =", "answer": "3", "metadata": {"source_dataset": "chain_sum"}},
}

EXAMPLES = (
    Example("4 - 1 is <answer>3</answer>", 1.0, "right", _SUM),
    Example("<answer> 3.0 </answer>", 1.0, "the task's own tolerance", _SUM),
    Example("<answer>\n```\n3\n```\n</answer>", 1.0, "in a fence", _SUM),
    Example("<answer>5</answer>", 0.0, "wrong", _SUM),
    Example("The answer is 3", 0.0, "no tag", _SUM),
    Example("<answer>3</answer>", 0.0, "cut off", _SUM, finish="length"),
)
