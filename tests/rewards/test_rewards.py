"""The built-in rewards: their examples, a corpus of known grading errors, and their parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from rlsloth.cli.commands.rewards import list_rewards, summarize_rewards
from rlsloth.cli.reward_trial import test_reward
from rlsloth.config import RewardConfig
from rlsloth.errors import UserError
from rlsloth.plugins import builtin_names
from rlsloth.rewards.format_tags import format_tags
from rlsloth.rewards.gsm8k_answer import gsm8k_answer
from rlsloth.rewards.length import length
from rlsloth.rewards.math_verify import math_verify
from rlsloth.rewards.reasoning_gym import reasoning_gym
from rlsloth.rewards.repetition import repetition
from rlsloth.scoring.answers import last_boxed, last_tag
from rlsloth.scoring.figures import exact_number, numbers_in

BUILT_IN = builtin_names("rlsloth.rewards")


def test_built_in_names() -> None:
    assert BUILT_IN == [
        "environment",
        "format_tags",
        "gsm8k_answer",
        "length",
        "math_verify",
        "reasoning_gym",
        "repetition",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_examples_hold(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert test_reward(name, None, limit=100, cfg=RewardConfig()) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    total = int(out.rpartition(" of ")[2].split()[0])
    assert total >= 4
    assert f"{total} of {total} examples as expected" in out


@pytest.mark.slow
def test_rewards_and_scorer_load_no_torch() -> None:
    script = (
        "import importlib, sys\n"
        "import rlsloth.scoring.scorer\n"
        "assert not {'torch', 'sympy', 'math_verify', 'reasoning_gym'} & set(sys.modules)\n"
        "import rlsloth.scoring.worker\n"
        f"for name in {BUILT_IN}:\n"
        "    importlib.import_module('rlsloth.rewards.' + name)\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), name\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# Gold, answer, right or wrong. The first block are errors of the math-verify library as it stands.
MATH_CORPUS = [
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", 0.0),
    ("1/2^99", "1/2^98", 0.0),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", 0.0),
    ("10", r"10\%", 0.0),
    (r"10\%", "10", 0.0),
    ("0.1", "0.1000001", 0.0),
    ("1/3", "0.333333", 0.0),
    ("(1,2)", r"\{1,2\}", 0.0),
    (r"\{1,2\}", "(1,2)", 0.0),
    ("1000", "1e3", 1.0),
    ("1", "1e3", 0.0),
    ("12", "１２", 1.0),  # noqa: RUF001
    ("１２", "12", 1.0),  # noqa: RUF001
    ("(0,12.5)", "0<x<12.5", 1.0),
    ("0<x<12.5", "(0,12.5)", 1.0),
    (r"[0,12]", r"0 \le x \le 12", 1.0),
    # What it does well must stay so.
    (r"\frac{1}{2^{99}}", "1/2^99", 1.0),
    (r"10\%", "0.1", 1.0),
    ("0.5", r"\frac{1}{2}", 1.0),
    ("0.5", "0.50", 1.0),
    (r"\frac{3}{4}", r"\dfrac{3}{4}", 1.0),
    ("12.5", r"12\frac{1}{2}", 1.0),
    ("1,234", "1234", 1.0),
    ("1234", "1{,}234", 1.0),
    (r"\$5", "5", 1.0),
    ("5", r"5\text{ apples}", 1.0),
    ("-3", "−3", 1.0),  # noqa: RUF001
    ("1024", "2^{10}", 1.0),
    ("5", "x = 5", 1.0),
    ("x = 5", "5", 1.0),
    ("1,2", "2,1", 1.0),
    ("(1,2)", "(2,1)", 0.0),
    ("(0,12)", "[0,12]", 0.0),
    (r"\{1,2\}", r"\{2,1\}", 1.0),
    (r"\sqrt{2}", r"\frac{2}{\sqrt{2}}", 1.0),
    (r"\pi", "3.14", 0.0),
    ("x^2+2x+1", "(x+1)^2", 1.0),
    (r"90^\circ", "90", 1.0),
    (r"\text{(B)}", "B", 1.0),
    ("B", "C", 0.0),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1.0),
]


@pytest.mark.parametrize("template", [r"So \boxed{%s}.", "The final answer is $%s$."])
@pytest.mark.parametrize(("gold", "answer", "expected"), MATH_CORPUS)
def test_math_corpus(gold: str, answer: str, expected: float, template: str) -> None:
    assert math_verify([template % answer], ["stop"], answer=[gold]) == [expected]


@pytest.mark.parametrize(
    ("completion", "gold", "expected"),
    [
        (r"\boxed{5}, no: \boxed{7}", "7", 1.0),
        (r"\boxed{7}, no: \boxed{5}", "7", 0.0),
        (r"\boxed{7}, that is \boxed{7", "7", 1.0),
        (r"\boxed{\frac{1}{\boxed{2}}}", "2", 1.0),
        ("First 3, then <answer>7</answer> of 9", "7", 1.0),
        (r"\boxed{20\%}", "18 + 2 = 20\n#### 20", 1.0),
        ("It is 20%.", "#### 20", 1.0),
        ("She has 72 clips left.", "48/2 = <<48/2=24>>24\n#### 72", 1.0),
        ("She has 24 clips left.", "48/2 = <<48/2=24>>24\n#### 72", 0.0),
        ("7" * 2000, "7", 0.0),
        ("", "7", 0.0),
        ("no answer", "no gold at all", None),
        ("7", None, None),
        ("7", 7, 1.0),
    ],
)
def test_math_answers_are_found(completion: str, gold: Any, expected: float | None) -> None:
    assert math_verify([completion], ["stop"], answer=[gold]) == [expected]


def test_math_gold_columns() -> None:
    chat = [[{"role": "assistant", "content": r"\boxed{7}"}]] * 2
    assert math_verify(
        chat, ["stop", "stop"], solution=[r"\boxed{7}", None], answer=["8", "8"]
    ) == [1, 0]
    with pytest.raises(UserError, match="'solution' or 'answer'"):
        math_verify(["7"], ["stop"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.50", Fraction(2469, 2)),
        ("-$5", Fraction(-5)),
        (r"\$1{,}000", Fraction(1000)),
        (r"-\frac{1}{2}", Fraction(-1, 2)),
        (r"\frac12", Fraction(1, 2)),
        ("3 / 4", Fraction(3, 4)),
        (".5", Fraction(1, 2)),
        (r"5\%", Fraction(1, 20)),
        ("2.5e-3", Fraction(1, 400)),
        ("12,34", None),
        ("1 2", None),
        ("1/0", None),
        ("5 apples", None),
        ("9" * 5000, None),
    ],
)
def test_exact_number(text: str, number: Fraction | None) -> None:
    assert exact_number(text) == number


def test_finding_answers() -> None:
    assert numbers_in("5-3 = 2, so -$4 or (-1,000.5) at 20%.") == [
        "5", "3", "2", "-$4", "-1,000.5", "20%",
    ]  # fmt: skip
    assert numbers_in("7 - 5 is -3") == ["7", "5", "-3"]
    assert last_boxed(r"\boxed{a} \fbox{\{b\}}") == r"\{b\}"
    assert last_boxed(r"\boxed{a") is None
    assert last_tag("<answer>1<answer>2</answer>", "answer") == "2"


def test_gsm8k_answer() -> None:
    completions = ["so 70 + 2 = 72", "#### 72 of 80", r"\boxed{72 \text{ clips}}", "cut at 72"]
    golds = ["48 + 24\n#### 72"] * 4
    finish = ["stop", "stop", "stop", "length"]
    assert gsm8k_answer(completions, golds, finish) == [1, 1, 1, 0]
    assert gsm8k_answer(completions, golds, finish, finished_only=False) == [1, 1, 1, 1]
    assert gsm8k_answer(["24"], ["48/2 = 24 clips"], ["stop"]) == [None]


def test_format_tags_parameters() -> None:
    assert format_tags(["a</think><answer>4</answer>"], first_tag_open=True) == [1]
    assert format_tags(["<plan>a</plan><code>b</code>"], tags="plan code") == [1]
    with pytest.raises(UserError, match="tag names"):
        format_tags(["a"], tags="<think>")


def test_length_parameters() -> None:
    ids = [[0] * 10, [0] * 13, [0] * 20]
    assert length(ids, target=10, tolerance=4) == [1, 0.25, 0]
    with pytest.raises(UserError, match="tolerance"):
        length(ids, tolerance=0)


def test_repetition_parameters() -> None:
    assert repetition(["a b a b"], ngram=2) == [pytest.approx(-1 / 3)]
    with pytest.raises(UserError, match="ngram"):
        repetition(["a"], ngram=0)


def test_reasoning_gym_parameters() -> None:
    entry = {"question": "4 - 1 =", "answer": "3", "metadata": {}}

    def score(text: str, finish: str = "stop", **params: Any) -> float | None:
        (value,) = reasoning_gym([text], ["chain_sum"], [entry], [finish], **params)
        return value

    assert score("4 - 1 = 3") == 0
    assert score("4 - 1 = 3", extract="last_number") == 1
    assert score(" 3 ", extract="whole") == 1
    assert score("it is 3", extract="whole") == pytest.approx(1 / 7)  # the task's partial credit
    assert score("4 - 1 = 3", "length", extract="last_number") == 0
    assert score("4 - 1 = 3", "length", extract="last_number", finished_only=False) == 1
    with pytest.raises(UserError, match="did you mean 'last_number'"):
        score("3", extract="last_numbr")
    with pytest.raises(UserError, match="did you mean 'chain_sum'"):
        reasoning_gym(["<answer>3</answer>"], ["chain_sums"], [entry], ["stop"])


def test_list_shows_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    summaries = {reward.name: reward for reward in summarize_rewards()}
    assert list(summaries) == BUILT_IN
    assert summaries["length"].parameters == {"target": "256", "tolerance": "256"}
    assert summaries["gsm8k_answer"].columns == ("completions", "answer", "finish_reasons")
    assert all(reward.summary for reward in summaries.values())
    list_rewards()
    out = capsys.readouterr().out
    assert all(name in out for name in BUILT_IN)


def test_a_reward_that_times_out_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text(
        "def slow(completions):\n    while 'loop' in completions: pass\n    return [1]"
    )
    data = tmp_path / "rows.jsonl"
    words = ["loop", "loop", "fine", *["loop"] * 9]
    data.write_text("".join(json.dumps({"completion": word}) + "\n" for word in words))
    assert test_reward(f"{reward}:slow", data, limit=100, cfg=RewardConfig(cpu_seconds=0.05)) == 1
    out = capsys.readouterr().out
    assert "row 6: timeout" in out
    assert "stopped after 3 timeouts in a row" in out
    assert "6 rows: 1 scored" in out


def test_readme_reward_reaches_one() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    block = next(b for b in readme.read_text().split("```") if "def short_and_right" in b)
    scope: dict[str, Any] = {}
    exec(block.removeprefix("python"), scope)
    texts = ["It is 7.", "I am quite sure that it is 7.", "8", ""]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert scope["short_and_right"](completions, ["7"] * 4) == [1, pytest.approx(0.97), 0, 0]


def test_scoring_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text(
        "def tidy(completions, gold, **columns):\n"
        "    return [len(c) / g for c, g in zip(completions, gold)]\n"
    )
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "q", "completion": "ab", "gold": gold} for gold in (1, 4, 0)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    assert test_reward(f"{reward}:tidy", data, limit=2, cfg=RewardConfig()) == 0
    assert "2 rows: 2 scored (mean 1.250), 0 failed" in capsys.readouterr().out
    assert test_reward(f"{reward}:tidy", data, limit=3, cfg=RewardConfig()) == 1
    assert "row 3: raised: ZeroDivisionError" in capsys.readouterr().out
    with pytest.raises(UserError, match="ships no EXAMPLES"):
        test_reward(f"{reward}:tidy", None, limit=1, cfg=RewardConfig())
    data.write_text('{"prompt": "q"}')
    with pytest.raises(UserError, match=r"row 1: .*'completion'"):
        test_reward(f"{reward}:tidy", data, limit=1, cfg=RewardConfig())
