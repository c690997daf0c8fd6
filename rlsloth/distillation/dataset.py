"""The dataset: rows in the prompt-completion format of TRL and ``rlsloth sft``, with their
provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlsloth.config.distill import DistillConfig
from rlsloth.data.columns import CONTEXT, MESSAGES, REASONING, SYSTEM
from rlsloth.data.rows import Row
from rlsloth.distillation.raw import Problem, RawFile, Sample
from rlsloth.distillation.selection import Selection, pass_rate, refuse_nothing
from rlsloth.errors import UserError, first_line
from rlsloth.files import replacing_file, sha256
from rlsloth.records import Message

TAKEN = (
    "prompt",
    "completion",
    "tools",
    "provenance",
    "text",
    "chosen",
    "rejected",
    "label",
    *MESSAGES,
    *SYSTEM,
    *CONTEXT,
    *REASONING,
)
"""Names of columns that are written here, or that would make trainers read the rows in another
format. A column of the source with such a name is written as source_<name>."""
_CALL = re.compile(r"<tool_call>.*?(?:</tool_call>|\Z)", re.DOTALL)


def write_dataset(out: Path, cfg: DistillConfig) -> tuple[Path, Selection]:
    """Select from raw.jsonl and write train.jsonl or train.parquet, whole or not at all.

    Raises:
        UserError: nothing was kept, or parquet cannot hold the rows.
    """
    selection = Selection(cfg.traces, cfg.seed)
    path = out / f"train.{cfg.format}"
    rows = _rows(out, cfg, selection)
    with replacing_file(path) as temporary:
        if cfg.format == "parquet":
            _write_parquet(temporary, list(rows))
        else:
            _write_jsonl(temporary, rows)
        refuse_nothing(selection, str(RawFile(out).path))
    other = "jsonl" if cfg.format == "parquet" else "parquet"
    for name in (f"train.{other}", f".train.{other}.tmp"):  # from an earlier selection
        (out / name).unlink(missing_ok=True)
    return path, selection


def dataset_hash(out: Path, cfg: DistillConfig) -> str | None:
    """The SHA-256 of the dataset in the folder; None if there is none."""
    path = out / f"train.{cfg.format}"
    return sha256(path) if path.exists() else None


def _rows(out: Path, cfg: DistillConfig, selection: Selection) -> Iterator[Row]:
    for problem in RawFile(out).read():
        for sample in selection.choose(problem):
            yield make_row(problem, sample, cfg)


def make_row(problem: Problem, sample: Sample, cfg: DistillConfig) -> Row:
    """Make the row of one trace, with its provenance.

    ``tools`` is JSON text, the form in which TRL accepts schemas with different fields. The
    source's own columns keep their names, except those in TAKEN, so that rewards find them.
    """
    prompt, completion = problem.prompt, sample.completion
    if isinstance(prompt, list) and isinstance(completion, list):
        prompt, completion = _joined(prompt, [_turn(message) for message in completion])
    row: Row = {"prompt": prompt, "completion": completion}
    if problem.tools:
        row["tools"] = json.dumps(problem.tools)
    for name, value in problem.columns.items():
        if name != "tools":
            row[f"source_{name}" if name in TAKEN else name] = value
    row["provenance"] = _provenance(problem, sample, cfg)
    return row


def _provenance(problem: Problem, sample: Sample, cfg: DistillConfig) -> dict[str, Any]:
    return {
        **problem.source,
        "index": problem.index,
        "teacher": problem.teacher | {"served_model": sample.served_model},
        "sampling": problem.sampling | {"seed": sample.seed},
        "rewards": sample.scores,
        "reward": sample.reward,
        "pass_rate": pass_rate(problem, cfg.traces),
        "samples": len(problem.samples),
        "tokens": sample.tokens,
        "finish": sample.finish,
        "rlsloth": problem.rlsloth,
        "date": problem.date,
    }


def _joined(prompt: list[Message], turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """Move an assistant turn that the prompt began into the completion."""
    if prompt[-1]["role"] != "assistant":
        return prompt, turns
    first = {**turns[0], "content": prompt[-1]["content"] + turns[0]["content"]}
    return prompt[:-1], [first, *turns[1:]]


def _turn(message: Message) -> Message:
    """Remove the text of well-formed tool calls from a turn, since the student's template writes
    them; a malformed call stays text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    if not all(call["function"]["name"] for call in calls):
        return {key: value for key, value in message.items() if key != "tool_calls"}
    thought, end, text = message["content"].rpartition("</think>")
    return {**message, "content": thought + end + _CALL.sub("", text).rstrip()}


def _write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: list[Row]) -> None:
    import pyarrow
    from pyarrow import parquet

    # Arrow gives every struct the keys of all: a call would get the arguments of other tools.
    if any("tools" in row for row in rows):
        raise UserError(
            "parquet cannot hold tool calls whose arguments differ; pass --format jsonl"
        )
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    except (pyarrow.ArrowException, OverflowError) as error:
        raise UserError(
            f"parquet cannot hold the columns of this dataset ({first_line(error)}); pass "
            "--format jsonl"
        ) from error
