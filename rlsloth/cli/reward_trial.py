"""``rlsloth rewards test``: score the examples of a reward, or the rows of a file."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlsloth import plugins
from rlsloth.config import EnvConfig, RewardConfig
from rlsloth.data.columns import columns_of, find
from rlsloth.data.prompts import make_prompts
from rlsloth.data.rows import load_rows
from rlsloth.errors import UserError, visible
from rlsloth.evaluation.result import verdict_counts
from rlsloth.records import FinishReason, Group, Prompt, Rollout, Score
from rlsloth.scoring.example import Example
from rlsloth.scoring.report import ScoringReport
from rlsloth.scoring.scorer import Scorer

REWARDS = "rlsloth.rewards"
SHOWN_CHARACTERS = 60
_TAKEN = ("completion", "completion_ids", "finish_reason")
MAX_TIMEOUTS = 3
"""Timeouts in a row after which the test stops."""


def test_reward(spec: str, data: Path | None, limit: int, cfg: RewardConfig) -> int:
    """Score a reward's own EXAMPLES, or the rows of a file, and print the results.

    A row has the column ``completion`` and optionally ``completion_ids`` and ``finish_reason``; all
    others are read as ``rlsloth grpo`` reads a dataset. So the completion is a chat message unless
    the prompt is text in the column ``prompt``, or there is none.

    Args:
        spec: the reward.
        data: a file in any format of datasets; None: the EXAMPLES.
        limit: most rows read.
        cfg: the section ``reward``; there is one worker, whatever it says.

    Returns:
        The exit status: 0 if all scores are as expected, 1 after a failure or an unexpected score.

    Raises:
        UserError: no such reward, no examples, or a file that cannot be read.
    """
    cfg = cfg.model_copy(update={"workers": 1})
    if data is None:
        return _test_examples(spec, cfg)
    return _test_rows(spec, data, limit, cfg)


# pytest would collect it in each file that imports it.
test_reward.__test__ = False  # type: ignore[attr-defined]


def _test_examples(spec: str, cfg: RewardConfig) -> int:
    examples = load_examples(spec)
    if not examples:
        raise UserError(f"reward {spec!r} ships no EXAMPLES: pass --data FILE.jsonl")
    table = Table("example", "completion", "expected", "got")
    groups = [example_group(example, index) for index, example in enumerate(examples)]
    console = Console()
    as_expected = 0
    for example, (_, score, _) in zip(examples, _scored(spec, groups, console, cfg), strict=False):
        right = is_expected(example, score)
        as_expected += right
        words = _short(example.completion)
        style = None if right else "bold red"
        table.add_row(example.note, words, _value(example.expected), _result(score), style=style)
    console.print(table)
    console.print(f"{as_expected} of {len(examples)} examples as expected")
    return int(as_expected < len(examples))


def _test_rows(spec: str, data: Path, limit: int, cfg: RewardConfig) -> int:
    table = Table("row", "completion", "score", "ms")
    values: list[float] = []
    seconds: list[float] = []
    failures = 0
    scored: list[Group] = []
    console = Console()
    for group, score, elapsed in _scored(spec, _read_rows(data, limit), console, cfg):
        seconds.append(elapsed)
        scored.append(group)
        failures += score.failure is not None
        if score.value is not None:
            values.append(score.value)
        style = "bold red" if score.failure else None
        line = str(group.prompt.index + 1)
        words = _short(group.rollouts[0].text)
        table.add_row(line, words, _result(score), f"{elapsed * 1e3:.1f}", style=style)
    if not seconds:
        raise UserError(f"--data {data}: the file has no rows")
    console.print(table)
    mean = f"{sum(values) / len(values):.3f}" if values else "-"
    console.print(
        f"{len(seconds)} rows: {len(values)} scored (mean {mean}), {failures} failed, "
        f"{len(seconds) - len(values) - failures} not applicable; "
        f"{sum(seconds) / len(seconds) * 1e3:.1f} ms a row, slowest {max(seconds) * 1e3:.1f} ms"
    )
    for counts in verdict_counts(scored):
        console.print(counts)
    if failures and any(isinstance(g.prompt.messages, str) and g.prompt.messages for g in scored):
        console.print(
            "prompts in the column 'prompt' are text, so completions are text too, as in training; "
            "in the column 'question' they are chat messages",
            style="red",
        )
    return int(failures > 0)


def _scored(
    spec: str, groups: Iterable[Group], console: Console, cfg: RewardConfig
) -> Iterator[tuple[Group, Score, float]]:
    """Score groups of one rollout each, and print failures; stop after MAX_TIMEOUTS in a row.

    Yields:
        The group, its score and the seconds it took.
    """
    timeouts = 0
    with Scorer([spec], cfg) as scorer:
        scorer.wait_ready()
        for group in groups:
            report = scorer.score([group])
            score = group.rollouts[0].scores[0]
            _print_failures(console, report)
            yield group, score, report.rewards[0].wall_seconds
            timeouts = timeouts + 1 if score.failure == "timeout" else 0
            if timeouts == MAX_TIMEOUTS:
                console.print(
                    f"stopped after {timeouts} timeouts in a row: the limit for one completion is "
                    f"{cfg.cpu_seconds:g} s of CPU time and {cfg.wall_seconds:g} s in all",
                    style="bold red",
                )
                return


def load_examples(spec: str) -> Sequence[Example]:
    """EXAMPLES in the module of a reward; empty if it has none."""
    function = plugins.load(spec, REWARDS)
    module = sys.modules.get(getattr(function, "__module__", ""))
    examples: Sequence[Example] = getattr(module, "EXAMPLES", ())
    return examples


def example_group(example: Example, index: int) -> Group:
    """A group of one rollout, made from an example."""
    ids = list(example.completion_ids)
    group = _group(index, "", example.completion, example.columns, ids, example.finish)
    group.rollouts[0].turn_rewards = list(example.turn_rewards)
    return group


def is_expected(example: Example, score: Score) -> bool:
    """Whether an example has the score that it expects."""
    if score.failure is not None or score.value is None or example.expected is None:
        return score.failure is None and score.value is example.expected
    return math.isclose(score.value, example.expected, abs_tol=1e-9)


def _read_rows(path: Path, limit: int) -> Iterator[Group]:
    if not path.is_file():
        raise UserError(f"--data {path}: there is no such file")
    rows = [dict(row) for row in load_rows(str(path), limit=limit)]
    taken = [{key: row.pop(key, None) for key in _TAKEN} for row in rows]
    for number, row in enumerate(taken, 1):
        if not _is_completion(row["completion"]):
            raise UserError(
                f"--data {path}, row {number}: expected text or a list of messages in the column "
                "'completion'"
            )
    chat = any(isinstance(row["completion"], list) for row in taken)
    if find("task", columns_of(rows)) is None:
        prompts = [Prompt(i, "", row) for i, row in enumerate(rows)]
    else:
        prompts = make_prompts(rows, EnvConfig(), f"--data {path}", conversational=chat, gold=True)
    for prompt, row in zip(prompts, taken, strict=True):
        ids: list[int] = row["completion_ids"] or []
        finish: FinishReason = row["finish_reason"] or "stop"
        shown = prompt.messages if isinstance(prompt.messages, str) else list(prompt.messages)
        yield _group(prompt.index, shown, row["completion"], prompt.columns, ids, finish)


def _is_completion(value: Any) -> bool:
    messages = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    return isinstance(value, str) or messages


def _group(
    index: int, prompt: Any, completion: Any, columns: Any, ids: list[int], finish: FinishReason
) -> Group:
    """A group of one rollout; it is conversational if prompt or completion are chat messages."""
    messages = (
        completion
        if isinstance(completion, list)
        else [{"role": "assistant", "content": completion}]
    )
    conversational = isinstance(completion, list) or isinstance(prompt, list)
    rollout = Rollout(
        token_ids=ids,
        loss_mask=[True] * len(ids),
        logprobs=[0.0] * len(ids),
        policy_version=[0] * len(ids),
        finish=finish,
        text=str(messages[-1].get("content", "")) if messages else "",
        messages=messages,
    )
    if conversational and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    row_prompt = Prompt(index, tuple(prompt) if conversational else prompt, columns)
    return Group(prompt=row_prompt, prompt_ids=[], rollouts=[rollout])


def _print_failures(console: Console, report: ScoringReport) -> None:
    for failure in report.details:
        console.print(
            visible(f"row {failure.prompt_index + 1}: {failure.kind}: {failure.detail}"),
            style="red",
            markup=False,
        )


def _value(value: float | None) -> str:
    return "not applicable" if value is None else f"{value:g}"


def _result(score: Score) -> str:
    return score.failure or _value(score.value)


def _short(text: str) -> str:
    line = visible(" ".join(text.split()))
    shown = line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 1] + "…"
    return shown.replace("[", r"\[")  # rich's markup
