"""Prompts in TRL's formats, the held-out split and the sampler."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.json_lines import lines
from rlsloth.config import EnvConfig
from rlsloth.data.heldout import question_text, split_heldout
from rlsloth.data.prompts import load_prompts, make_prompts
from rlsloth.data.rows import Row
from rlsloth.data.sampler import EpochSampler
from rlsloth.errors import UserError
from rlsloth.records import Prompt


def prompts_of(rows: list[Row], **cfg: object) -> list[Prompt]:
    return make_prompts(rows, EnvConfig(**cfg), "data")


def questions(*texts: str) -> list[Prompt]:
    return prompts_of([{"question": text} for text in texts])


# Prompts


def test_prompt_column_of_text_is_raw_and_question_is_a_message() -> None:
    (raw,) = prompts_of([{"prompt": "1 + 1 =", "answer": "2"}])
    assert (raw.messages, raw.columns) == ("1 + 1 =", {"answer": "2"})
    (chat,) = prompts_of([{"question": "1 + 1?", "answer": "2"}])
    assert chat.messages == ({"role": "user", "content": "1 + 1?"},)
    assert chat.columns == {"question": "1 + 1?", "answer": "2"}


def test_system_prompt_comes_first_and_replaces() -> None:
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "hi"}
    assert prompts_of([{"prompt": "hi"}], system_prompt="Be brief.")[0].messages == (system, user)
    own = [{"role": "system", "content": "Be long."}, user]
    assert prompts_of([{"prompt": own}])[0].messages == tuple(own)
    assert prompts_of([{"prompt": own}], system_prompt="Be brief.")[0].messages == (system, user)


def test_completion_is_not_passed_and_messages_lose_the_answer() -> None:
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    (pair,) = prompts_of([{"prompt": [user], "completion": [answer], "gold": 3}])
    assert (pair.messages, pair.columns) == ((user,), {"gold": 3})
    (dialog,) = prompts_of([{"messages": [user, answer, user, answer]}])
    assert dialog.messages == (user, answer, user)
    (prefill,) = prompts_of([{"prompt": [user, answer]}])
    assert prefill.messages == (user, answer)


def test_first_known_column_wins_unless_one_is_named() -> None:
    row = {"problem": "p", "question": "q", "text": "t"}
    assert prompts_of([row])[0].messages == ({"role": "user", "content": "q"},)
    named = prompts_of([row], prompt_column="text")[0]
    assert named.messages == ({"role": "user", "content": "t"},)


def test_missing_columns_name_those_there() -> None:
    with pytest.raises(
        UserError, match=r"no column 'promt'; did you mean 'prompt'\? .*columns: prom"
    ):
        prompts_of([{"prompt": "a"}], prompt_column="promt")
    with pytest.raises(UserError, match=r"--env.prompt-column; did you mean 'questions'.*solution"):
        prompts_of([{"questions": "a", "solution": "b"}])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": ""}, "row 2, column 'prompt': empty"),
        ({"prompt": None}, "expected text or a list of messages, this is null"),
        ({}, "row 2, column 'prompt': .*null"),
        ({"prompt": 7}, "this is a int"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"prompt": []}, "no messages"),
        ({"prompt": ["hi"]}, "message 1: a message has a role"),
        ({"prompt": [{"role": "wizard", "content": "a"}]}, "message 1: a message has a role"),
        ({"prompt": [{"role": "user"}]}, "content must be text, this is null"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        ({"prompt": "a", "tools": 3}, "column 'tools': expected a list"),
        ({"prompt": "a", "completions": 1}, "rename that column"),
    ],
)
def test_malformed_rows_are_named(row: Row, said: str) -> None:
    with pytest.raises(UserError, match=said):
        prompts_of([{"prompt": "fine"}, row])


def test_columns_are_json_and_complete() -> None:
    day = datetime.date(2026, 1, 2)
    first, second = prompts_of(
        [{"prompt": "a", "day": day, "meta": {"pair": (1, 2)}}, {"prompt": "b"}]
    )
    assert first.columns == {"day": "2026-01-02", "meta": {"pair": [1, 2]}}
    assert second.columns == {"day": None, "meta": None}
    assert json.loads(json.dumps(first.columns)) == first.columns


def test_row_tools_and_null_fields_from_arrow() -> None:
    schema = {"type": "function", "function": {"name": "f"}}
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    dialog = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "1", "tool_calls": None},
    ]
    for tools in ([schema], json.dumps([schema])):
        (prompt,) = prompts_of([{"prompt": dialog, "tools": tools}])
        assert prompt.tools == (schema,)
        assert prompt.messages[0] == {"role": "user", "content": "q"}
        assert prompt.messages[1] == {"role": "assistant", "content": "", "tool_calls": call}


# Held-out questions


def test_no_heldout_question_occurs_in_training() -> None:
    prompts = questions(*(f"what is {i % 40}?" + " " * (i // 40) for i in range(120)))
    train, heldout = split_heldout(prompts, 10, seed=3)
    asked = {question_text(p) for p in heldout}
    assert len(heldout) == len(asked) == 10
    assert not asked & {question_text(p) for p in train}
    assert len(train) == 90
    assert [p.index for p in train] == sorted(p.index for p in train)


def test_split_depends_on_seed_and_not_on_order() -> None:
    prompts = questions(*(f"question {i}" for i in range(50)))

    def texts(seed: int, rows: list[Prompt]) -> set[str]:
        return {question_text(p) for p in split_heldout(rows, 10, seed)[1]}

    assert texts(0, prompts) == texts(0, prompts[::-1])
    assert texts(0, prompts) != texts(1, prompts)


def test_split_that_leaves_nothing() -> None:
    with pytest.raises(UserError, match=r"--env.heldout 2 leaves nothing .* 2 distinct questions"):
        split_heldout(questions("a", "b", " a"), 2, 0)
    assert split_heldout(questions("a"), 0, 0)[1] == []


def test_validation_data_replaces_the_split(tmp_path: Path) -> None:
    cfg = EnvConfig(
        train=lines(
            tmp_path / "a.jsonl", [{"question": "x"}, {"question": "y"}, {"question": "z"}]
        ),
        validation=lines(tmp_path / "b.jsonl", [{"question": "y "}]),
        limit=2,
    )
    train, heldout = load_prompts(cfg, 0, lambda rows, where: make_prompts(rows, cfg, where))
    assert [question_text(p) for p in train] == ["user: x", "user: y"]
    assert [question_text(p) for p in heldout] == ["user: y"]


# Sampling


@settings(deadline=None)
@given(
    size=st.integers(1, 12),
    takes=st.lists(st.integers(0, 30), max_size=6),
    cut=st.integers(0, 6),
    seed=st.integers(0, 3),
)
def test_sampler_epochs_and_resume(size: int, takes: list[int], cut: int, seed: int) -> None:
    prompts = questions(*map(str, range(size)))
    sampler = EpochSampler(prompts, seed)
    drawn: list[int] = []
    state = sampler.state()
    for i, k in enumerate(takes):
        if i == cut:
            state, drawn = json.loads(json.dumps(sampler.state())), []
        drawn += [p.index for p in sampler.take(k)]
    resumed = EpochSampler(prompts, seed)
    resumed.restore(state)
    assert [p.index for p in resumed.take(len(drawn))] == drawn
    whole = [p.index for p in EpochSampler(prompts, seed).take(sum(takes))]
    for start in range(0, len(whole), size):
        epoch = whole[start : start + size]
        assert len(set(epoch)) == len(epoch)


def test_sampler_shuffles_each_epoch_anew() -> None:
    sampler = EpochSampler(questions(*map(str, range(30))), 0)
    first, second = ([p.index for p in sampler.take(30)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(30))
    assert len({tuple(first), tuple(second), tuple(range(30))}) == 3


def test_sampler_refuses_what_does_not_fit() -> None:
    sampler = EpochSampler(questions("a", "b"), 0)
    with pytest.raises(UserError, match="began with 2 prompts and seed 0, but now there are 1"):
        EpochSampler(questions("a"), 0).restore(sampler.state())
    with pytest.raises(UserError, match="no prompts"):
        EpochSampler([], 0)
