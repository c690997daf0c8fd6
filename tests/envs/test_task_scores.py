"""Answers of reasoning-gym's tasks have the score that the task's own dataset gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS

from rlsloth.envs import reasoning_gym as env
from rlsloth.rewards.reasoning_gym import reasoning_gym
from rlsloth.scoring.typed_json import from_json

pytestmark = pytest.mark.slow

Params = Mapping[str, Any]


def problems(task: str, params: Params, size: int = 4) -> tuple[Any, list[Any], list[Any]]:
    """The dataset, its problems, and the rows that they become, as a worker gets them."""
    dataset = env._make(task, {"seed": 3, "size": size, **params})
    entries = [dataset[i] for i in range(size)]
    rows = [env._row(task, dataset, i) for i in range(size)]
    return dataset, entries, json.loads(json.dumps(rows))


def scored(answer: str, task: str, row: Any, params: Params) -> float | None:
    own = [dict(params)] if params else None
    text = f"So <answer>{answer}</answer>"
    (score,) = reasoning_gym([text], [task], [row["entry"]], ["stop"], task_params=own)
    return score


@pytest.mark.parametrize(
    ("task", "params"),
    [
        ("puzzle24", {"min_value": 3}),
        ("decimal_arithmetic", {"min_num_decimal_places": 1, "max_num_decimal_places": 1}),
        ("word_ladder", {"min_word_length": 3, "max_word_length": 3}),
        ("rearc", {"board_format_opts": {"row_delimiter": ";"}}),
        ("time_intervals", {"max_date_difference_days": 2000}),
        ("chain_sum", {"min_terms": 2, "max_terms": 2}),
    ],
)
def test_scores_follow_the_parameters(task: str, params: Params) -> None:
    dataset, entries, rows = problems(task, params)
    for entry, row in zip(entries, rows, strict=True):
        for answer in (entry["answer"], "1", "1.25", "(1 + 2 + 3) * 4"):
            direct = _direct(answer, dataset, entry)
            assert scored(answer, task, row, params) == (direct[0] if direct else 0.0)
        assert scored(entry["answer"], task, row, params) == 1.0


def test_rows_carry_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_generate", lambda *_: [{"question": "q"}])
    (row,) = env.generate("chain_sum", {"seed": 1, "size": 1, "min_terms": 2})
    assert row["task_params"] == {"min_terms": 2}
    (row,) = env.generate("chain_sum", {"seed": 1, "size": 1})
    assert "task_params" not in row


def plan(state: Mapping[str, list[str]]) -> list[dict[str, str]]:
    """Carry each box of boxnet square by square to its target."""
    steps = []
    for place, items in state.items():
        for box in [item for item in items if item.startswith("box_")]:
            target = box.replace("box", "target")
            goal = next(where for where, inside in state.items() if target in inside)
            (row, column), (to_row, to_column) = (map(float, at.split("_")) for at in (place, goal))
            while (row, column) != (to_row, to_column):
                here = f"Agent[{row}, {column}]"
                if row != to_row:
                    row += 1 if to_row > row else -1
                else:
                    column += 1 if to_column > column else -1
                steps.append({here: f"move({box}, square[{row}, {column}])"})
            steps.append({f"Agent[{row}, {column}]": f"move({box}, {target})"})
    return steps


def test_boxnet_in_the_form_of_its_question() -> None:
    dataset, entries, rows = problems("boxnet", {}, 8)
    for entry, row in zip(entries, rows, strict=True):
        answer = json.dumps(plan(entry["metadata"]["initial_state"]))
        assert dataset.score_answer(answer, entry) == 1.0
        for form in (answer, f"\n```json\n{answer}\n```\n", f"```\n{answer}\n```"):
            assert scored(form, "boxnet", row, {}) == 1.0
        assert scored(f"```json\n{answer[:-2]}\n```", "boxnet", row, {}) == 0.0


@pytest.mark.parametrize(
    ("task", "place"),
    [
        ("graph_color", "possible_answer"),
        ("propositional_logic", "example_answer"),
        ("rubiks_cube", "example_correct_answer"),
        ("rush_hour", None),
    ],
)
def test_tasks_with_several_right_answers(task: str, place: str | None) -> None:
    """Their problems reach the scorer unchanged: integer keys and tuples, too."""
    dataset, entries, rows = problems(task, {})
    for entry, row in zip(entries, rows, strict=True):
        assert from_json(row["entry"]) == entry
        found = entry["metadata"][place] if place else "A+1 B-2"
        answer = found if isinstance(found, str) else json.dumps(found)
        assert scored(answer, task, row, {}) == dataset.score_answer(answer, entry)
        assert place is None or scored(answer, task, row, {}) == 1.0


@pytest.mark.long
@pytest.mark.parametrize("task", sorted(set(DATASETS) - {"composite"}))
def test_every_task(task: str) -> None:
    dataset, entries, rows = problems(task, {}, 20)
    for entry, row in zip(entries, rows, strict=True):
        if (answer := entry["answer"]) is not None:
            best = scored(answer, task, row, {})
            assert best == dataset.score_answer(answer, entry) == 1.0
            assert scored("x", task, row, {}) in (0.0, *_direct("x", dataset, entry))


def _direct(answer: str, dataset: Any, entry: Any) -> tuple[float, ...]:
    """The dataset's score of an answer; nothing if its scorer raises."""
    try:
        return (dataset.score_answer(answer, entry),)
    except Exception:  # scorers raise anything on what they do not expect
        return ()
