"""raw.jsonl: one line a problem, with all samples and their scores, kept or not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlsloth import __version__
from rlsloth.errors import UserError
from rlsloth.records import Group, Message, Prompt, Rollout
from rlsloth.run.folder import finite

FILE = "raw.jsonl"
_THINK, _END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Answered:
    """A problem's rollouts, and what only the teacher knows of them."""

    group: Group
    sampling: dict[str, Any]
    """Temperature, top_p, top_k, min_p, max_tokens, stop."""
    seeds: list[int]
    """One a rollout."""
    finishes: list[str]
    """Why each ended, in the teacher's own words."""
    served: list[str | None]
    """The model that a server says has answered."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One trace."""

    completion: str | list[Message]
    """Text after a plain prompt, else messages."""
    tokens: int
    finish: str
    truncated: bool
    scores: dict[str, float | None]
    """By reward, in the configured order; None where it does not apply or has failed."""
    failures: dict[str, str]
    """Kind of failure by reward."""
    reward: float | None
    """Weighted sum."""
    seed: int
    served_model: str | None


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt with all that was sampled for it."""

    index: int
    """Row in the environment's own order."""
    prompt: str | list[Message]
    columns: dict[str, Any]
    tools: list[Any]
    source: dict[str, Any]
    """Environment, data set and split."""
    teacher: dict[str, Any]
    """Which weights, or which server."""
    sampling: dict[str, Any]
    rlsloth: str
    date: str
    samples: list[Sample]

    def asks(self, prompt: Prompt) -> bool:
        """Whether it is this prompt's."""
        same = prompt.messages if isinstance(prompt.messages, str) else list(prompt.messages)
        return (self.index, self.prompt) == (prompt.index, json.loads(json.dumps(same)))


def make_problem(answered: Answered, source: dict[str, Any], teacher: dict[str, Any]) -> Problem:
    """Of scored rollouts."""
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
    """With ``<think>`` in front where only its end is there: R1's template opens the reasoning in
    the prompt."""
    thought, end, _ = text.partition(_END)
    return f"{_THINK}\n{text}" if end and _THINK not in thought else text


class RawFile:
    """The file of a distillation that may be continued."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def cut_torn(self) -> None:
        """Remove a last line without an end, which a crash left."""
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            whole = 0
            for line in file:
                whole += len(line) if line.endswith(b"\n") else 0
            file.truncate(whole)

    def append(self, problems: Sequence[Problem]) -> None:
        """Add a chunk, flushed to disk; after an error nothing of it stays. Raises OSError."""
        rows = [json.dumps(finite(asdict(problem)), allow_nan=False) for problem in problems]
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                file.write("".join(row + "\n" for row in rows).encode())
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.truncate(self.path, size)
            raise

    def read(self) -> Iterator[Problem]:
        """The problems in order, without a torn last line. Raises UserError for a damaged one."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                    samples = [Sample(**sample) for sample in row.pop("samples")]
                    problem = Problem(**row, samples=samples)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    reason = " ".join(str(error).split())
                    raise UserError(
                        f"{self.path} line {number} is damaged ({reason}): repair it, or cut the "
                        "file before it and go on with --resume"
                    ) from None
                yield problem
