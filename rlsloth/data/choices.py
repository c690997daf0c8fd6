"""Pairs whose rows say by a column which of two answers, or of a ranked list, is the better one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsloth.data.rows import Row
from rlsloth.errors import UserError


@dataclass(frozen=True, slots=True)
class Choice:
    """Two columns of answers, and the column that says which of them is chosen."""

    first: str
    second: str
    mark: str
    """Column with 0 or 1."""
    first_mark: int
    """Value of that column if the first answer is chosen."""
    prompt: str = "prompt"
    """Column with the prompt."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a pair is made of, besides the prompt."""
        return (self.first, self.second, self.mark)

    def sides(self, row: Row, where: str) -> tuple[Any, Any]:
        """Return the chosen and the rejected answer. Raises UserError."""
        mark = row.get(self.mark)
        if mark not in (0, 1):
            raise UserError(
                f"{where}, column {self.mark!r}: expected 0 or 1, the number of the better answer, "
                f"this is {mark!r}; correct or drop the row"
            )
        pair = row.get(self.first), row.get(self.second)
        return pair if mark == self.first_mark else pair[::-1]


@dataclass(frozen=True, slots=True)
class Ranking:
    """A column with a list of answers, each with its rank, 1 for the best."""

    column: str
    answer: str
    rank: str
    prompt: str = "prompt"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a pair is made of, besides the prompt."""
        return (self.column,)

    def sides(self, row: Row, where: str) -> tuple[Any, Any]:
        """Return the answers of the best and the worst rank. Raises UserError."""
        answers = row.get(self.column)
        place = f"{where}, column {self.column!r}"
        if not isinstance(answers, list) or not all(map(self._is_ranked, answers)):
            raise UserError(
                f"{place}: expected a list of answers, each with {self.answer!r} and a number "
                f"{self.rank!r}; correct or drop the row"
            )
        ranked = sorted(answers, key=lambda answer: answer[self.rank])
        if not ranked or ranked[0][self.rank] == ranked[-1][self.rank]:
            raise UserError(f"{place}: no answer has a better rank than another; drop the row")
        return ranked[0][self.answer], ranked[-1][self.answer]

    def _is_ranked(self, answer: Any) -> bool:
        if not isinstance(answer, Mapping) or self.answer not in answer:
            return False
        rank = answer.get(self.rank)
        return isinstance(rank, int | float) and rank == rank  # NaN has no order


CHOICES: tuple[Choice | Ranking, ...] = (
    Choice("response_0", "response_1", "better_response_id", 0),  # PKU-SafeRLHF
    Choice("human_ref_A", "human_ref_B", "labels", 1, prompt="history"),  # SHP
    Ranking("answers", "answer", "rank"),  # Nectar
)
_TREE = {"parent_id", "role", "text"}
"""Columns of rows that are single messages of a tree of conversations (OpenAssistant)."""


def find_choice(rows: Sequence[Row], columns: Sequence[str]) -> Choice | Ranking | None:
    """Return the known form of chosen and rejected answers in rows; None if there is none."""
    for choice in CHOICES:
        if not {*choice.columns, choice.prompt} <= set(columns):
            continue
        if isinstance(choice, Choice) or _has_ranks(rows, choice):
            return choice
    return None


def _has_ranks(rows: Sequence[Row], ranking: Ranking) -> bool:
    first = next((row[ranking.column] for row in rows if row.get(ranking.column)), None)
    return isinstance(first, list) and isinstance(first[0], Mapping) and ranking.rank in first[0]


def refuse_trees(columns: Sequence[str], source: str) -> None:
    """Refuse rows that are single messages of trees. Raises UserError."""
    if set(columns) >= _TREE:
        raise UserError(
            f"{source}: each row is one message of a tree of conversations (columns: "
            f"{', '.join(columns)}); write rows of prompt, chosen and rejected first: the messages "
            "up to a parent_id, the reply to it of the best rank, and another reply"
        )
