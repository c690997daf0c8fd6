"""Rows that say by a number or a rank which answer is the better one."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.examples import renderer, shown
from rlsloth.config.data import KtoDataConfig, PreferenceDataConfig
from rlsloth.data.labelled import labelled_examples
from rlsloth.data.pairs import pair_examples
from rlsloth.data.reading import Reading
from rlsloth.errors import UserError

Row = dict[str, Any]


def number(better: Any) -> Row:
    return {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": better}


def ranked(*ranks: Any) -> Row:
    return {"prompt": "q", "answers": [{"answer": f"a{rank}", "rank": rank} for rank in ranks]}


def sides(row: Row, **cfg: Any) -> list[str]:
    (pair,) = pair_examples([row], PreferenceDataConfig(**cfg), renderer(), "d")
    return [shown(pair, i).partition(" | ")[2].split("<|")[0].strip("[") for i in (0, 1)]


def test_the_better_answer_is_chosen() -> None:
    assert sides(number(0)) == ["a", "b"]
    assert sides(number(1)) == ["b", "a"]
    assert sides(ranked(3, 1, 2)) == ["a1", "a3"]
    assert sides({**number(1), "chosen": "x", "rejected": "y"}) == ["x", "y"]
    assert sides({**number(1), "enquiry": "p"}, prompt_column="enquiry") == ["b", "a"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (number(2), "row 1, column 'better_response_id': expected 0 or 1"),
        (number("0"), "this is '0'"),
        (number(None), "this is None"),
        (ranked(1, 1), "no answer has a better rank"),
        (ranked(1, "2"), "a number 'rank'"),
        (ranked(1, float("nan")), "a number 'rank'"),
        ({**number(0), "response_1": None}, "column 'rejected': expected text"),
        ({**number(0), "response_1": "a"}, "equal"),
    ],
)
def test_rows_that_do_not_say_which_are_refused(row: Row, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pair_examples([row], PreferenceDataConfig(), renderer(), "d")
    reading = Reading("data", skip=True)
    pairs = pair_examples([row, number(0)], PreferenceDataConfig(), renderer(), "d", reading)
    if "answers" not in row:
        assert [pair.index for pair in pairs] == [1]


def test_columns_that_are_read_are_named() -> None:
    reading = Reading()
    row = {**number(0), "safer_response_id": 1}
    pair_examples([row], PreferenceDataConfig(), renderer(), "d", reading)
    assert reading.notes() == (
        "columns read: prompt, response_0, response_1, better_response_id",
        "columns not used: safer_response_id",
    )


def test_messages_of_trees_are_refused_with_what_to_do() -> None:
    row = {"message_id": "b", "parent_id": "a", "text": "Hi.", "role": "assistant", "rank": 0}
    words = r"message_id, parent_id.*prompt, chosen and rejected.*parent_id"
    with pytest.raises(UserError, match=words):
        labelled_examples([row], KtoDataConfig(), renderer(), "d")
    with pytest.raises(UserError, match=words):
        pair_examples([row], PreferenceDataConfig(), renderer(), "d")
