"""Preference rows: pairs and labelled completions as token ids and masks, and refused rows."""

from __future__ import annotations

import re
from typing import Any

import pytest

from helpers.examples import renderer, shown
from rlsloth.config.data import KtoDataConfig, PreferenceDataConfig
from rlsloth.data.example import Example
from rlsloth.data.labelled import labelled_examples
from rlsloth.data.pairs import pair_examples
from rlsloth.errors import UserError


def pairs(rows: list[dict[str, Any]], **cfg: Any) -> list[Example]:
    return pair_examples(rows, PreferenceDataConfig(**cfg), renderer(), "p.jsonl")


SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("yes", "no"))
PAIR = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n | "


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"question": "q", "chosen": "yes", "rejected": "no"},
    ],
)
def test_pairs_in_all_formats(row: dict[str, Any]) -> None:
    (pair,) = pairs([row])
    assert shown(pair, 0) == f"{PAIR}[yes<|im_end|>]"
    assert shown(pair, 1) == f"{PAIR}[no<|im_end|>]"


def test_a_named_prompt_column_of_pairs() -> None:
    """With an explicit prompt, completions keep their common beginning."""
    row = {"instruction": "q", "chosen": "it is yes", "rejected": "it is no"}
    (pair,) = pairs([row], prompt_column="instruction")
    assert shown(pair, 0) == f"{PAIR}[it is yes<|im_end|>]"
    assert shown(pair, 1) == f"{PAIR}[it is no<|im_end|>]"


def test_rows_with_and_without_a_prompt_column() -> None:
    first = {"question": "q", "chosen": [GOOD], "rejected": [BAD]}
    for pair in pairs([first, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}]):
        assert shown(pair, 0) == f"{PAIR}[yes<|im_end|>]"


def test_plain_text_among_messages_is_refused() -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    with pytest.raises(UserError, match="row 1 is plain text, but some rows are messages"):
        pairs([*rows, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}])


def test_pairs_of_plain_text() -> None:
    apart = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}
    within = {"chosen": "the sky is blue", "rejected": "the sky is green"}
    for row in (apart, within):
        (pair,) = pairs([row])
        assert shown(pair, 0) == "the sky is | [ blue<|im_end|>]"
        assert shown(pair, 1) == "the sky is | [ green<|im_end|>]"


def test_a_shared_earlier_turn_belongs_to_the_prompt() -> None:
    (pair,) = pairs([{"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}])
    assert shown(pair) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n | [yes<|im_end|>]"
    )


SAME = "p.jsonl row 2: chosen and rejected are equal; drop the row"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, SAME),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, SAME),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, SAME),
        ({"chosen": "the sky", "rejected": "the sky"}, SAME),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "row 2, column 'rejected': expected"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "row 2, rejected: empty"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no common beginning"),
        (
            {"chosen": [USER, GOOD], "rejected": [BAD]},
            "only one of chosen and rejected contains the prompt",
        ),
        (
            {
                "chosen": [SYSTEM, USER, GOOD],
                "rejected": [SYSTEM, {"role": "user", "content": "other"}, BAD],
            },
            "p.jsonl row 2: chosen and rejected have different prompts",
        ),
        ({"chosen": "x", "rejected": "y"}, "add a column prompt"),
    ],
)
def test_pairs_that_are_refused(row: dict[str, Any], words: str) -> None:
    sound: dict[str, Any] = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    if isinstance(row["chosen"], list):
        sound = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        pairs([sound, row])
    assert "\n" not in str(refused.value)


def test_missing_columns_of_pairs() -> None:
    with pytest.raises(UserError, match=r"has no column 'rejected' \(columns: prompt, chosen\)"):
        pairs([{"prompt": "q", "chosen": "a"}])


def labelled(rows: list[dict[str, Any]]) -> list[Example]:
    return labelled_examples(rows, KtoDataConfig(), renderer(), "k.jsonl")


def test_labelled_completions_and_pairs_taken_apart() -> None:
    marked = labelled([
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"prompt": [USER], "completion": "no", "label": False},
    ])  # fmt: skip
    apart = labelled([{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}])
    for examples in (marked, apart):
        assert [shown(e) for e in examples] == [f"{PAIR}[yes<|im_end|>]", f"{PAIR}[no<|im_end|>]"]
        assert [e.label for e in examples] == [True, False]


@pytest.mark.parametrize("label", [None, "yes", 2])
def test_labels_are_true_or_false(label: Any) -> None:
    with pytest.raises(UserError, match=r"k\.jsonl row 1, column 'label': expected true"):
        labelled([{"prompt": "q", "completion": "a", "label": label}])
