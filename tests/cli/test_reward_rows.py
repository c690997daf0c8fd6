"""`rlsloth rewards test` on rows: read as training reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.supervised import command, make_folder
from rlsloth.cli import main as cli

pytestmark = pytest.mark.slow

CHAT = """
def right(completions, answer, **_):
    return [float(c[-1]["content"].endswith(a)) for c, a in zip(completions, answer)]
"""
Tested = Callable[..., tuple[int, str]]


@pytest.fixture
def tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Tested:
    """Tests a reward on rows; returns the status and what was printed."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(CHAT)

    def run(
        *rows: dict[str, Any], spec: str = "./mine.py:right", more: str = ""
    ) -> tuple[int, str]:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        status = cli.main(["rewards", "test", spec, "--data", "rows.jsonl", *more.split()])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


@pytest.mark.parametrize(
    "prompt",
    [
        {"question": "2 + 3?"},
        {"instruction": "Add.", "input": "2 and 3"},
        {"messages": [{"role": "user", "content": "2 + 3?"}]},
        {"prompt": [{"role": "user", "content": "2 + 3?"}]},
    ],
)
def test_the_columns_of_training_make_chats(prompt: dict[str, Any], tested: Tested) -> None:
    status, printed = tested({**prompt, "completion": "It is 5", "answer": "5"})
    assert "1 rows: 1 scored (mean 1.000)" in printed
    assert status == 0


def test_the_gold_answer_may_have_another_name(tested: Tested) -> None:
    status, printed = tested({"question": "2 + 3?", "completion": "5", "ground_truth": "5"})
    assert (status, "mean 1.000" in printed) == (0, True)


def test_text_prompts_make_text_and_the_failure_says_so(tested: Tested) -> None:
    status, printed = tested({"prompt": "2 + 3 =", "completion": "5", "answer": "5"})
    assert status == 1
    assert "in the column 'question' they are chat messages" in " ".join(printed.split())


def test_parameters_of_the_reward(tested: Tested) -> None:
    row = {"completion": "2 and 2\n</think>\n<answer>4</answer>"}
    option = "--reward.params.format_tags first_tag_open true"
    assert "mean 0.000" in tested(row, spec="format_tags")[1]
    assert "mean 1.000" in tested(row, spec="format_tags", more=option)[1]


HOSTILE = """
def hostile(completions, log_extra=None, **_):
    log_extra("hostile/verdict", ["bad\\x1b]0;mine\\x07 [red]"] * len(completions))
    raise ValueError("cannot read \\x1b[2J" + completions[0])
"""
CONTROLS = ("\x1b", "\x07", "\x08", "\x9b", "\u202e")


def test_escapes_do_not_reach_the_terminal(tested: Tested) -> None:
    """Texts of a row, of a failing reward, and of the name of a column in an error."""
    Path("hostile.py").write_text(HOSTILE)
    answer = "no\x1b[31m \x9b2J\x08\u202e[bold]"
    row = {"prompt": "2 + 3 =", "completion": answer, "answer": "5"}
    status, printed = tested(row, spec="./hostile.py:hostile")
    assert status == 1
    assert not [c for c in CONTROLS if c in printed]
    assert "\\x1b[31m" in printed
    assert "\\x1b[2J" in printed
    status, printed = tested({"completion\x1b[2J\u202e": "5"})
    assert status == 2
    assert not [c for c in CONTROLS if c in printed]


@pytest.mark.parametrize("words", [["sf\x1b[2Jt"], ["sft", "--da\x1b[31mta.train", "x"]])
def test_errors_show_escapes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    printed = capsys.readouterr().err
    assert "\x1b" not in printed
    assert "\\x1b[" in printed


def test_an_error_about_a_row_shows_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path, d=[{"que\x1b[2Jry": "\x1b]0;mine\x07"}] * 3)
    assert command("sft", "d") == 2
    printed = capsys.readouterr().err
    assert "que\\x1b[2Jry" in printed
    assert not [c for c in CONTROLS if c in printed]


def test_a_missing_file_is_one_line(tested: Tested, capsys: pytest.CaptureFixture[str]) -> None:
    assert tested({"completion": "x", "answer": "y"}, spec="length")[0] == 0
    assert cli.main(["rewards", "test", "length", "--data", "rows.json"]) == 2
    assert "--data rows.json: there is no such file" in capsys.readouterr().err
