"""Options for rows of other shapes: columns, bad rows, long texts; mixtures of formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.examples import renderer, shown
from helpers.json_lines import lines
from helpers.tiny import tiny_tokenizer
from rlsloth.config import EnvConfig
from rlsloth.config.data import KtoDataConfig, PreferenceDataConfig, SftDataConfig
from rlsloth.config.sft import SftConfig
from rlsloth.data.examples import load_examples
from rlsloth.data.labelled import labelled_examples
from rlsloth.data.pairs import pair_examples
from rlsloth.data.prompts import make_prompts
from rlsloth.data.reading import Reading
from rlsloth.data.sft import sft_examples
from rlsloth.errors import UserError

GOOD: dict[str, Any] = {"question": "q", "answer": "a", "chosen": "a", "rejected": "b"}
BAD: dict[str, Any] = {"question": "", "answer": "a", "chosen": "a", "rejected": "b"}
LOOPS: list[Any] = [
    (lambda rows, cfg, reading: sft_examples(rows, cfg, renderer(), "d", reading), SftDataConfig),
    (lambda rows, cfg, reading: pair_examples(rows, cfg, renderer(), "d", reading),
     PreferenceDataConfig),
    (lambda rows, cfg, reading: labelled_examples(rows, cfg, renderer(), "d", reading),
     KtoDataConfig),
    (lambda rows, cfg, reading: make_prompts(rows, cfg, "d", reading=reading), EnvConfig),
]  # fmt: skip


@pytest.mark.parametrize(("read", "kind"), LOOPS)
def test_bad_rows_are_left_out_by_choice(read: Any, kind: Any) -> None:
    section = kind.SECTION
    with pytest.raises(UserError, match=rf"d row 2.*empty.*--{section}\.bad-rows skip"):
        read([GOOD, BAD], kind(), None)
    cfg = kind(bad_rows="skip")
    reading = Reading.of(cfg)
    few, many = read([GOOD], cfg, None), read([GOOD, *[BAD] * 5], cfg, reading)
    assert len(few) == len(many)
    (line,) = reading.warnings()
    assert line.startswith(f"5 bad rows are left out (--{section}.bad-rows skip): d row 2")
    assert "d row 4" in line
    assert "d row 5" not in line
    with pytest.raises(UserError, match=r"d: none of 2 rows can be read; the first one: d row 1"):
        read([BAD, BAD], cfg, None)


def test_columns_under_other_names_and_in_dicts() -> None:
    row = {"q": {"text": "Why?"}, "reward_model": {"gold": "4"}, "id": 1}
    cfg = EnvConfig(columns={"question": "q.text", "answer": "reward_model.gold"})
    (prompt,) = make_prompts([row], cfg, "d")
    assert prompt.messages == ({"role": "user", "content": "Why?"},)
    assert prompt.columns["answer"] == "4"
    with pytest.raises(UserError, match=r"--env\.columns: d has no column 'qq'; did you mean 'q'"):
        make_prompts([row], EnvConfig(columns={"question": "qq.text"}), "d")
    with pytest.raises(UserError, match=r"--env\.drop-columns: d has no column 'idd'"):
        make_prompts([row], EnvConfig(drop_columns=["idd"]), "d")
    pair = {"question": "q", "better": "a", "worse": "b"}
    cfg_pair = PreferenceDataConfig(columns={"chosen": "better", "rejected": "worse"})
    (made,) = pair_examples([pair], cfg_pair, renderer(), "d")
    assert shown(made).endswith("[a<|im_end|>]")


def test_a_prompt_made_of_columns() -> None:
    row = {"question": "Which?", "choices": ["x", "y"], "answer": "y"}
    cfg = SftDataConfig(prompt_template="{question} Of: {choices}")
    (example,) = sft_examples([row], cfg, renderer(), "d")
    assert "user\nWhich? Of: x, y<|im_end|>" in shown(example)
    with pytest.raises(UserError, match=r"--data\.prompt-template: d has no column 'choice'"):
        sft_examples([row], SftDataConfig(prompt_template="{choice}"), renderer(), "d")


def test_columns_that_json_cannot_hold_do_not_stop_a_run() -> None:
    row = {"question": "q", "answer": "1", "image": {"bytes": b"\x89PNG"}}
    reading = Reading()
    prompts = make_prompts([{**row, "image": None}, row], EnvConfig(), "d", reading=reading)
    assert [p.columns for p in prompts] == [{"question": "q", "answer": "1"}] * 2
    assert "columns not used: image" in reading.notes()


def test_gold_answers_of_other_names_are_passed_as_answer() -> None:
    reading = Reading()
    rows = [{"question": "q", "ground_truth": "4"}]
    (prompt,) = make_prompts(rows, EnvConfig(), "d", reading=reading, gold=True)
    assert prompt.columns == {"question": "q", "ground_truth": "4", "answer": "4"}
    assert "gold answers, passed to rewards as answer: column ground_truth" in reading.notes()
    (own,) = make_prompts([{**rows[0], "answer": "5"}], EnvConfig(), "d", gold=True)
    assert own.columns["answer"] == "5"


def test_rows_of_several_formats() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows: list[dict[str, Any]] = [
        {"messages": turns, "text": None},
        {"messages": None, "prompt": "1+1=", "completion": "2"},
        {"question": "q", "answer": "a"},
        {"text": "hello"},
    ]
    examples = sft_examples(rows, SftDataConfig(), renderer(), "d")
    asked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n | [a<|im_end|>]"
    assert [shown(e) for e in examples] == [
        asked, "1+1= | [2<|im_end|>]", asked, "h | [ello<|im_end|>]"
    ]  # fmt: skip
    first, second = make_prompts([{"question": "a"}, {"messages": turns}], EnvConfig(), "d")
    assert first.messages == ({"role": "user", "content": "a"},)
    assert second.messages == tuple(turns[:1])


@pytest.mark.parametrize(
    ("row", "learnt"),
    [
        ({"question": "q", "solution": "all", "answer": "7"}, "all"),
        ({"question": "q", "response": "all", "answer": "7"}, "all"),
        ({"input": "q", "output": "all", "solution": "code"}, "all"),
        ({"problem": "q", "solution": "s", "answer": "7",
          "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "all"}]},
         "all"),
    ],
)  # fmt: skip
def test_the_full_text_is_learnt_before_a_bare_answer(row: dict[str, Any], learnt: str) -> None:
    (example,) = sft_examples([row], SftDataConfig(), renderer(), "d")
    assert shown(example).endswith(f"[{learnt}<|im_end|>]")


def test_long_texts_are_left_out_cut_or_split(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"text": "abcdefgh"}, {"text": "xy"}])

    def texts(**data: Any) -> tuple[list[str], tuple[str, ...]]:
        section = SftDataConfig(train=source, heldout=0, max_tokens=4, **data)
        cfg = SftConfig(data=section, eval={"at_start": False, "at_end": False})
        found = load_examples(cfg, sft_examples, tiny_tokenizer(), 64)
        return [shown(example) for example in found.train], found.warnings

    assert texts() == (["x | [y<|im_end|>]"], ())
    cut, said = texts(long_text="cut")
    assert cut == ["a | [bcd]", "x | [y<|im_end|>]"]
    assert said == ("1 texts of more than 4 tokens are cut or split (--data.long-text)",)
    split, _ = texts(long_text="split")
    assert split == ["a | [bcd]", "d | [efg]", "g | [h<|im_end|>]", "x | [y<|im_end|>]"]
