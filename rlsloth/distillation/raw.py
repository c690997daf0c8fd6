"""raw.jsonl: one problem a line, with all its samples and their scores, kept or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlsloth import __version__
from rlsloth.records import Group, Message, Prompt, Rollout
from rlsloth.run.json_lines import append_json_lines, read_json_lines, truncate_torn_line

FILE = "raw.jsonl"
_THINK, _END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Answered:
    """The rollouts of one problem, with facts that only the teacher knows."""

    group: Group
    sampling: dict[str, Any]
    """Temperature, top_p, top_k, min_p, max_tokens, stop."""
    seeds: list[int]
    """The seed of each rollout."""
    finishes: list[str]
    """The reason why each rollout ended, as the teacher names it."""
    served: list[str | None]
    """The model name that the server returned with each rollout; None for a local teacher."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One trace: a sampled completion with its scores."""

    completion: str | list[Message]
    """Text after a plain prompt, else messages."""
    tokens: int
    finish: str
    truncated: bool
    scores: dict[str, float | None]
    """The score of each reward, in the configured order; None: it does not apply, or failed."""
    failures: dict[str, str]
    """The kind of failure of each reward that failed."""
    reward: float | None
    """The weighted sum of the scores."""
    seed: int
    served_model: str | None


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt with all its samples."""

    index: int
    """The row in the environment's own order."""
    prompt: str | list[Message]
    columns: dict[str, Any]
    tools: list[Any]
    source: dict[str, Any]
    """The environment, dataset and split."""
    teacher: dict[str, Any]
    """The teacher's weights, or its server."""
    sampling: dict[str, Any]
    rlsloth: str
    date: str
    samples: list[Sample]

    def is_for(self, prompt: Prompt) -> bool:
        """Whether this is the problem of a prompt."""
        same = prompt.messages if isinstance(prompt.messages, str) else list(prompt.messages)
        return (self.index, self.prompt) == (prompt.index, json.loads(json.dumps(same)))


def make_problem(answered: Answered, source: dict[str, Any], teacher: dict[str, Any]) -> Problem:
    """Make the record of scored rollouts."""
    prompt = answered.group.prompt
    plain = isinstance(prompt.messages, str)
    extra = zip(answered.finishes, answered.seeds, answered.served, strict=True)
    return Problem(
        index=prompt.index,
        prompt=prompt.messages if isinstance(prompt.messages, str) else list(prompt.messages),
        columns=dict(prompt.columns),
        tools=list(prompt.tools),
        source=source,
        teacher=teacher,
        sampling=answered.sampling,
        rlsloth=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        samples=[
            _sample(rollout, plain, finish, seed, served)
            for rollout, (finish, seed, served) in zip(answered.group.rollouts, extra, strict=True)
        ],
    )


def _sample(rollout: Rollout, plain: bool, finish: str, seed: int, served: str | None) -> Sample:
    messages = [
        {**m, "content": opened(m["content"])} if m["role"] == "assistant" else m
        for m in rollout.messages
    ]
    return Sample(
        completion=rollout.text if plain else messages,
        tokens=rollout.length,
        finish=finish,
        truncated=rollout.truncated,
        scores={score.name: score.value for score in rollout.scores},
        failures={s.name: s.failure for s in rollout.scores if s.failure is not None},
        reward=rollout.reward,
        seed=seed,
        served_model=served,
    )


def opened(text: str) -> str:
    """Add a ``<think>`` that the text closes but does not open: R1's template opens the reasoning
    in the prompt."""
    thought, end, _ = text.partition(_END)
    return f"{_THINK}\n{text}" if end and _THINK not in thought else text


class RawFile:
    """The raw.jsonl of a distillation."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def cut_torn(self) -> None:
        """Remove a last line that a crash tore."""
        truncate_torn_line(self.path)

    def append(self, problems: Sequence[Problem]) -> None:
        """Add a chunk, flushed to disk. If it raises OSError, nothing of the chunk stays."""
        append_json_lines(self.path, map(asdict, problems))

    def read(self) -> Iterator[Problem]:
        """Read the problems in order, without a torn last line. Raises UserError for a damaged
        line."""
        remedy = "repair it, or remove it and all lines after it and continue with --resume"
        return read_json_lines(self.path, _problem, remedy)


def _problem(row: Any) -> Problem:
    samples = [Sample(**sample) for sample in row.pop("samples")]
    return Problem(**row, samples=samples)
