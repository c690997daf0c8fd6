"""The rules by which traces are kept, and the rows that they become."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import tiny_tokenizer
from helpers.tool_templates import HERMES, TOOL
from rlsloth.config import EnvConfig
from rlsloth.config.data import SftDataConfig
from rlsloth.config.distill import DistillConfig, TracesConfig
from rlsloth.data.renderer import Renderer
from rlsloth.data.rows import load_rows
from rlsloth.data.sft import sft_examples
from rlsloth.distillation.dataset import make_row, write_dataset
from rlsloth.distillation.raw import Problem, RawFile, Sample, opened
from rlsloth.distillation.selection import Selection, jaccard
from rlsloth.errors import UserError

LONG = "we add the first number to the second number and then we carry the one to the left"


def sample(text: str = "fine", right: float | None = 1.0, tokens: int = 5, **more: Any) -> Sample:
    usual: dict[str, Any] = {
        "completion": [{"role": "assistant", "content": text}],
        "tokens": tokens,
        "finish": "stop",
        "truncated": False,
        "scores": {"right": right},
        "failures": {},
        "reward": right,
        "seed": 0,
        "served_model": None,
    }
    return Sample(**usual | more)


def text_of(sample: Sample) -> str:
    message = sample.completion[0]
    assert isinstance(message, dict)
    return str(message["content"])


def problem(samples: Sequence[Sample], index: int = 0, **more: Any) -> Problem:
    usual: dict[str, Any] = {
        "index": index,
        "prompt": [{"role": "user", "content": f"question {index}"}],
        "columns": {"answer": "1"},
        "tools": [],
        "source": {"environment": "dataset", "dataset": "d.jsonl"},
        "teacher": {"model": "m"},
        "sampling": {"temperature": 1.0},
        "rlsloth": "0",
        "date": "2026-01-01",
    }
    return Problem(**usual | more, samples=list(samples))


def choose(*problems: Problem, seed: int = 0, **cfg: Any) -> tuple[list[str], dict[str, int]]:
    """Texts kept, and counts of what each rule dropped."""
    most = max(len(p.samples) for p in problems)
    selection = Selection(TracesConfig(samples=most, **{"keep": most} | cfg), seed)
    kept = [text_of(s) for p in problems for s in selection.choose(p)]
    total = sum(len(p.samples) for p in problems)
    assert len(kept) + sum(selection.dropped.values()) == total  # each is kept or counted once
    return kept, dict(selection.dropped)


def test_only_finished_and_verified_traces_are_kept() -> None:
    samples = [
        sample("good"),
        sample("cut", truncated=True),
        sample("wrong", 0.5),
        sample("failed", None, failures={"right": "timeout"}),
    ]
    assert choose(problem(samples)) == (
        ["good"],
        {"cut off": 1, "not verified": 1, "reward failed": 1},
    )
    assert choose(problem(samples), correct_at=0.5)[0] == ["good", "wrong"]


def test_the_deciding_reward_is_the_first_or_the_one_named() -> None:
    a = sample("a", scores={"right": 1.0, "form": 0.0})
    b = sample("b", scores={"right": 0.0, "form": 1.0})
    assert choose(problem([a, b]))[0] == ["a"]
    assert choose(problem([a, b]), reward="form")[0] == ["b"]
    with pytest.raises(UserError, match="'foo' is not among right, form"):
        choose(problem([a, b]), reward="foo")
    with pytest.raises(UserError, match="right does not apply to every problem"):
        choose(problem([sample("c", None)]))


def test_the_best_come_first_then_the_shortest() -> None:
    samples = [
        sample("long", tokens=9, reward=1.0),
        sample("short", tokens=3, reward=1.0),
        sample("best", tokens=20, reward=1.5),
        sample("middle", tokens=6, reward=1.0),
    ]
    assert choose(problem(samples)) == (["best", "short", "middle", "long"], {})
    assert choose(problem(samples), keep=2) == (["best", "short"], {"surplus": 2})


def test_random_choice_depends_on_seed_and_problem_alone() -> None:
    def pick(index: int, seed: int) -> tuple[str, ...]:
        samples = [sample(str(i), tokens=i + 1) for i in range(8)]
        return tuple(choose(problem(samples, index), seed=seed, keep=2, prefer="random")[0])

    assert pick(3, 5) == pick(3, 5)
    assert len({pick(index, 0) for index in range(12)}) > 6
    assert len({pick(0, seed) for seed in range(12)}) > 6
    best = sample("best", tokens=99, reward=2.0)  # chance decides among equals only
    samples = [*(sample(str(i)) for i in range(8)), best]
    for seed in range(5):
        assert choose(problem(samples), seed=seed, keep=1, prefer="random")[0] == ["best"]


@pytest.mark.parametrize(
    ("right", "band", "kept"),
    [
        (1, {"min_pass": 0.25}, 1),
        (1, {"min_pass": 0.26}, 0),
        (3, {"max_pass": 0.75}, 3),
        (3, {"max_pass": 0.74}, 0),
        (4, {"max_pass": 1.0}, 4),
        (2, {"min_pass": 0.5, "max_pass": 0.5}, 2),
    ],
)
def test_problems_outside_the_band_are_left_out(
    right: int, band: dict[str, Any], kept: int
) -> None:
    samples = [sample(f"text {i}", float(i < right)) for i in range(4)]
    texts, dropped = choose(problem(samples), **band)
    assert len(texts) == kept
    assert dropped.get("pass rate", 0) == right - kept


def test_length_bounds_include_their_ends() -> None:
    samples = [sample(f"t{n}", tokens=n) for n in (4, 5, 7, 8)]
    kept, dropped = choose(problem(samples), min_tokens=5, max_tokens=7)
    assert kept == ["t5", "t7"]
    assert dropped == {"too short": 1, "too long": 1}
    assert choose(problem([sample(" \n")]))[1] == {"too short": 1}  # no trainer takes it


def test_identical_words_are_kept_once() -> None:
    one = problem([sample("a  b\n"), sample("a b"), sample("c")])
    two = problem([sample("a b"), sample("d")], 1)
    kept, dropped = choose(one, two)
    assert sorted(" ".join(text.split()) for text in kept) == ["a b", "c", "d"]
    assert dropped == {"identical": 2}
    kept, dropped = choose(one, two, identical="problem")
    assert (len(kept), dropped) == (4, {"identical": 1})


def test_a_trace_that_was_dropped_hides_no_other() -> None:
    """A trace that was surplus in one problem may be kept in the next."""
    one = problem([sample("short", tokens=1), sample("long", tokens=9)])
    two = problem([sample("long", tokens=9)], 1)
    assert choose(one, two, keep=1)[0] == ["short", "long"]


def test_similar_traces_of_a_problem_are_kept_once() -> None:
    near = LONG.replace("left", "right")
    samples = [sample(LONG), sample(near), sample("something else altogether, in a few words")]
    shared = jaccard(samples[0], samples[1])
    assert shared == 13 / 15  # of 14 shingles each the last differs
    assert choose(problem(samples), similarity=0.9)[0] == [text_of(s) for s in samples]
    kept, dropped = choose(problem(samples), similarity=0.8)
    assert kept == [LONG, text_of(samples[2])]
    assert dropped == {"similar": 1}
    apart = (problem([samples[0]]), problem([samples[1]], 1))
    assert len(choose(*apart, similarity=0.1)[0]) == 2  # within a problem only


def test_an_opened_thought_is_written_with_its_beginning() -> None:
    assert opened("so it is 4</think>4") == "<think>\nso it is 4</think>4"
    assert opened("<think>so</think>4") == "<think>so</think>4"
    assert opened("no thought") == "no thought"
    assert opened("a </think> b <think> c") == "<think>\na </think> b <think> c"


CALL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "calculate", "arguments": {"e": "1+1"}},
}


def tool_problem(name: str = "calculate") -> Problem:
    call = {**CALL, "function": {**CALL["function"], "name": name}}
    text = f'<think>\nhm <tool_call></think>I ask. <tool_call>{{"name": "{name}"}}</tool_call>'
    turns = [
        {"role": "assistant", "content": text, "tool_calls": [call]},
        {"role": "tool", "name": "calculate", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    return problem([sample(completion=turns)], tools=[TOOL])


def test_a_tool_call_stands_once_in_what_the_student_learns() -> None:
    cfg = DistillConfig(rewards=["right"])
    task = tool_problem()
    row = make_row(task, task.samples[0], cfg)
    first = row["completion"][0]
    assert first["content"] == "<think>\nhm <tool_call></think>I ask."
    assert first["tool_calls"] == [CALL]
    assert json.loads(row["tools"]) == [TOOL]
    renderer = Renderer(tiny_tokenizer(HERMES), EnvConfig())
    (example,) = sft_examples([row], SftDataConfig(), renderer, "rows")
    ids, mask = example.answers[0]
    assert renderer.decode(ids.tolist()).count("</tool_call>") == 1
    trained = renderer.decode(ids[mask].tolist())
    assert "1+1" in trained
    assert "It is 2." in trained
    assert "calculate: 2" not in trained  # the student does not learn the output of tools


def test_a_malformed_call_stays_text() -> None:
    task = tool_problem("")
    first = make_row(task, task.samples[0], DistillConfig())["completion"][0]
    assert "tool_calls" not in first
    assert first["content"].endswith("</tool_call>")


def test_a_begun_answer_belongs_to_the_completion() -> None:
    begun = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Sure: "}]
    task = problem([sample("4")], prompt=begun)
    row = make_row(task, task.samples[0], DistillConfig())
    assert row["prompt"] == begun[:1]
    assert row["completion"] == [{"role": "assistant", "content": "Sure: 4"}]


def test_taken_names_of_source_columns_are_changed() -> None:
    columns = {"text": "t", "label": True, "answer": "4", "tools": [TOOL], "messages": []}
    task = problem([sample()], columns=columns)
    row = make_row(task, task.samples[0], DistillConfig())
    assert set(row) == {
        "prompt", "completion", "source_text", "source_label", "answer", "source_messages",
        "provenance",
    }  # fmt: skip


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_both_formats_load_back_alike(tmp_path: Path, format: str) -> None:
    samples = [sample("naïve \u2028 text"), sample("other")]
    task = problem(samples, prompt="plain text", columns={"answer": None, "n": [1, 2]})
    plain = [Sample(**{**_fields(s), "completion": text_of(s)}) for s in samples]
    task = problem(plain, prompt=task.prompt, columns=task.columns)
    RawFile(tmp_path).append([task])
    cfg = DistillConfig(format=format, traces={"keep": 2, "samples": 2}, rewards=["r"])
    path, selection = write_dataset(tmp_path, cfg)
    assert selection.kept == 2
    assert load_rows(str(path)) == [make_row(task, s, cfg) for s in plain]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def _fields(s: Sample) -> dict[str, Any]:
    return {name: getattr(s, name) for name in Sample.__slots__}


def test_parquet_refuses_tool_calls_in_one_line(tmp_path: Path) -> None:
    RawFile(tmp_path).append([tool_problem()])
    with pytest.raises(UserError, match=r"cannot hold tool calls .*--format jsonl"):
        write_dataset(tmp_path, DistillConfig(format="parquet"))
    mixed = [problem([sample(str(i))], i, columns={"x": x}) for i, x in enumerate([1, "a"])]
    RawFile(tmp_path / "b").path.parent.mkdir()
    RawFile(tmp_path / "b").append(mixed)
    with pytest.raises(UserError, match="parquet cannot hold the columns"):
        write_dataset(tmp_path / "b", DistillConfig(format="parquet"))
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"raw.jsonl"}


def test_a_failed_append_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = RawFile(tmp_path)
    raw.append([problem([sample()])])
    before = raw.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        raw.append([problem([sample()], 1)])
    assert raw.path.read_bytes() == before


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    raw = RawFile(tmp_path)
    raw.append([problem([sample()])])
    with open(raw.path, "a") as file:
        file.write('{"index": 1}\n')
    with pytest.raises(UserError, match=r"raw.jsonl line 2 is damaged"):
        list(raw.read())
