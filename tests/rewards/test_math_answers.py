"""Answers to mathematical questions: all of a marked answer is read, or nothing of it."""

from __future__ import annotations

import random
import time

import pytest

from helpers.math_golds import FORMS, golds
from rlsloth.rewards._math.forms import Expression, Quantity
from rlsloth.rewards._math.judge import read_gold, verdict
from rlsloth.rewards._math.read import read
from rlsloth.rewards._math.values import exact
from rlsloth.rewards.gsm8k_answer import gsm8k_answer
from rlsloth.rewards.math_verify import math_verify


def boxed(gold: str, answer: str) -> float | None:
    (score,) = math_verify([rf"So \boxed{{{answer}}}."], answer=[gold])
    return score


RIGHT = [
    ("25000", "25 000"), ("25000", r"25\,000"), ("25000", "25~000"), ("25 000", "25000"),
    ("9/4", "2 1/4"), ("9/4", r"2\tfrac14"), ("-9/4", r"-2\frac{1}{4}"), ("2 1/4", "2.25"),
    ("9/4", "2¼"), ("7/11", r"0.\overline{63}"), ("1/6", r"0.1\dot{6}"), ("1/6", "0.1(6)"),
    ("25/6", r"4.1\overline{6}"), ("3-e", r"3-\mathrm{e}"), ("3-e", r"3-\text{e}"),
    ("2i", r"(1+\mathrm{i})^2"), ("13", "|5+12i|"), (r"\frac{1}{2}", r"\cos 60^\circ"),
    (r"\frac{\sqrt{3}}{2}", r"\sin(60^{\circ})"), ("3", r"\lg 1000"), ("6:45", "6:45"),
    ("6:45", r"6:45 \text{ p.m.}"), ("3:4", "6:8"), (r"2\text{ h }5\text{ min}", "125 minutes"),
    ("1001_2", "1001_2"), ("1001_2", "1001_{2}"), ("9", "1001_2"), ("BAC", "BAC"), ("Yes", "yes"),
    ("(C)", "C"), ("3, 4", r"3 \text{ and } 4"), (r"\pm 4", "4, -4"), ("x=3 or x=4", "3, 4"),
    (r"\{3,4\}", r"\{4, 3, 3\}"), ("42", "42."), (r"\sqrt{5}", "√5"),
    (r"x \neq 3", r"(-\infty,3)\cup(3,\infty)"), ("60", r"60\text{ euros}"), ("5", "5 km/h"),
    (r"2500 \text{ m}", r"2.5 \text{ km}"), ("3600000", "3.6 million"), ("xy", "yx"),
    (r"\sqrt{1/m}", r"\frac{1}{\sqrt{m}}"), ("y = 2x + 1", "2y = 4x + 2"),
    (r"\binom{6}{2}", "15"),
    (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("8", r"\text{Answer: } 8"), (r"3\mathbf{i}-\mathbf{j}", r"-\mathbf{j}+3\mathbf{i}"),
    ("1.5", "1,5"), (r"\infty", "∞"), ("120", "5!"), (r"(1,2)\cup[2,5)", "1 < x < 5"),
    (r"\int_0^1 x\,dx", r"\int_0^1 x \, dx"), ("1200", r"1.2 \times 10^3"),
    (r"\frac13", r"\int_0^1 x^2\,dx"), (r"\$1 million", r"\$1,000,000"), ("(1,2)", "]1,2["),
    (r"\frac{\sqrt{6}-\sqrt{2}}{4}", r"\sin 15^\circ"), ("90 km/h", r"25 \text{ m/s}"),
    ("-7/2", "-3 1/2"), ("8 ft 6 in", r"8.5 \text{ ft}"), (r"\frac{1+\sqrt5}{2}", "1.618034"),
    ("255", r"\text{FF}_{16}"), ("x^2+y^2=1", "x^2+y^2-1=0"), (r"{5 \choose 2}", "10"),
    ("1,2,3,...,9", r"1,2,3,\ldots,9"),
]  # fmt: skip
WRONG = [
    ("0", "25 000"), ("25", r"25\,000"), ("3/2", "2 1/4"), ("2", r"2\tfrac14"),
    ("0", r"0.\overline{63}"), ("3", r"3-\mathrm{e}"), ("3+e", r"3-\mathrm{e}"),
    ("3", r"3\mathrm{i}"), ("2", r"2\sqrt(3)"), ("1", r"1+\mathrm{i}"), ("6:45", "3:15"),
    ("13:30", "1:30"), ("1001_2", "1001_3"), ("BAC", "CAB"), ("stale", "least"), ("on", "no"),
    ("2 hours 5 minutes", r"2 \text{ hours } 6 \text{ minutes}"),
    ("2", r"2 \text{ hours } 5 \text{ minutes}"), ("g(1)=3", "g(1)=4"), ("g(1)=3", "g(2)=3"),
    (r"\frac{dy}{dt}=t", r"\frac{dy}{dt}=2t"), ("x=5", "y=5"),
    (r"1, 2, \ldots, n", r"1, 4, \ldots, n^2"), ("f(x)=1", r"\forall x<0, f(x)=1"), ("4", "3, 4"),
    ("3", "3, 4"), ("3+4i", "3-4i"), ("5", "5x"), ("5 km", "5 m"), ("12%", "12"),
    ("(3,4)", "(4,3)"), ("(3,4)", "[3,4]"), (r"\frac{1}{1500!}", r"\frac{1}{1501!}"),
    ("0.1", "0.1000001"), ("A+a", "2a"), (r"\sqrt{x^2}", "x"), (r"2^{300}", r"2^{300}+1"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"), ("x^2", "x^2+1"), ("3", "3^x"),
    (r"x \ge 3", "x > 3"), (r"(-\infty,3)", r"(-\infty,3]"), ("100", r"\lg 100"),
    ("7", r"7 \text{ or } 8"), (r"\frac{1+\sqrt5}{2}", "1.618"), ("x+y=1", "1"),
    ("12", r"12\text{ apples and }5\text{ pears}"), (r"45 \text{ cm}", r"45 \text{ cm}x"),
    (r"\$45", r"\$45i"), ("7/2", r"2\frac{7}{4}"), ("30", r"3 0"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_equal_answers(gold: str, answer: str) -> None:
    assert boxed(gold, answer) == 1


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_a_part_or_another_value_is_not_equal(gold: str, answer: str) -> None:
    assert boxed(gold, answer) == 0


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        (r"<think>\boxed{3}? That forgets one.</think> It is 4.", "3", 0),
        (r"<think>\boxed{3}? That forgets one.</think> It is 4.", "4", 1),
        (r"so \boxed{3}, I think.</think> <answer>4</answer>", "4", 1),
        (r"<think>it must be \boxed{3}", "3", 0),
        (r"\boxed{3", "3", 0),
        (r"\boxed{3} or \boxed{5}", "3, 5", 1),
        (r"\boxed{3} or \boxed{5}", "5", 0),
        (r"First \boxed{3}. Wait, that is wrong: \boxed{5}", "5", 1),
        (r"$x = \boxed{3}$ and $y = \boxed{5}$", "3, 5", 1),
        (r"\boxed{30}\%", "30%", 1),
        ("The answer is **5/6**.", "5/6", 1),
        ("The answer is **5/6**.", "5", 0),
        ("**Answer: 5/6**", "5/6", 1),
        ("The largest value is 3√2.", "2", 0),
        ("The largest value is 3√2.", r"3\sqrt{2}", 1),
        ("There were 12, so 1 200 remain.", "1200", 1),
        ("答案是：7/8。", "7/8", 1),  # noqa: RUF001
        ("答えは15です", "15", 1),
        ("所以面积为12平方厘米。", "12", 1),
        ("The answer is Alice.", "Alice", 1),
        ("The answer is Bob.", "Alice", 0),
        ("The final answer is $12$. I hope it is correct.", "12", 1),
        ("The roots are 2 and 3.", "2, 3", 1),
        ("The roots are 2 and 3.", "3", 0),
        ("It is at (2, 3).", "(2, 3)", 1),
        ("It takes 3 hours and 20 minutes.", "200 minutes", 1),
        ("It takes 3 hours and 20 minutes.", "20", 0),
        (r"\boxed{\textbf{(B)}\ 12}", "B", 1),
        (r"\boxed{\textbf{(B)}\ 12}", "12", 1),
        ("The answer is A) 5 pens", "A", 1),
        (r"The answer is $\textbf{(A)}\ 5$.", "A", 1),
        (r"\boxed{\mathbf{12}}", "12", 1),
        (r"\boxed{\color{blue}{12}}", "12", 1),
        (r"\boxed{2**3}", "8", 1),
        (r"\boxed{2**3}", "23", 0),
        ("We add 3 and 4 and get $$ x = 7. $$", "7", 1),
    ],
)
def test_the_answer_is_found(text: str, gold: str, score: float) -> None:
    assert math_verify([text], answer=[gold]) == [score]


@pytest.mark.parametrize(
    ("text", "score"),
    [(r"\boxed{17-8}", 0), (r"\boxed{7, 8}", 0), (r"so \boxed{8", 0), (r"\boxed{x = 8}", 1),
     ("The answer is 8.", 1), (r"\boxed{\$8.00}", 1), (r"\boxed{8 \text{ pens}}", 1),
     (r"<think>\boxed{8}</think> 9", 0),
     (r"\boxed{\frac{16}{2}}", 1), (r"\boxed{7 \frac{8}{1}}", 0)],
)  # fmt: skip
def test_gsm8k_numbers(text: str, score: float) -> None:
    assert gsm8k_answer([text], answer=["Some 4 + 4 = 8.\n#### 8"]) == [score]


def test_golds() -> None:
    prose = "We add both numbers and find the sum, which is what was wanted here"
    assert math_verify(["7"], solution=[prose], answer=["7"]) == [1]
    assert math_verify(["7"], solution=[rf"{prose}: \boxed{{7}}"], answer=["8"]) == [1]
    assert math_verify(["7"], answer=["It depends on the reader."]) == [None]
    assert math_verify(["7.0"], answer=[["5", "7"]]) == [1]
    assert math_verify(["7"], answer=[{"value": 7}]) == [None]
    assert math_verify(["True"], answer=[True]) == [1]


def test_a_gold_is_read_in_each_form() -> None:
    failed = [
        (gold, name)
        for gold in golds(60, seed=3)
        for name, form in FORMS.items()
        if math_verify([form(gold)], answer=[gold]) != [1]
    ]
    assert not failed


def _value(gold: str) -> object:
    """A key that equal golds share: 18/57 and 30/95, 6 and 6 cm."""
    form = read(gold)
    value = exact(form.term) if isinstance(form, (Expression, Quantity)) else None
    return gold if value is None else value


def _false_positives(count: int, pairs: int) -> list[tuple[str, str]]:
    known = list({_value(text): (text, read_gold(text)) for text in golds(count, seed=5)}.values())
    rng = random.Random(0)
    chosen = [rng.sample(known, 2) for _ in range(pairs)]
    return [
        (text, other)
        for (text, gold), (other, _) in chosen
        if gold is None or verdict(other, gold) == "right"
    ]


def test_golds_of_other_problems_are_wrong() -> None:
    assert not _false_positives(300, 3000)


@pytest.mark.long
def test_many_golds() -> None:
    """1,560 golds in 24 forms, and 300,000 pairs of different golds."""
    found = [
        (gold, name)
        for gold in golds(1560, seed=1)
        for name, form in FORMS.items()
        if math_verify([form(gold)], answer=[gold]) != [1]
    ]
    assert len(found) <= 0.005 * 1560 * len(FORMS), found[:20]
    assert not _false_positives(1497, 300_000)


def test_explosive_answers_cost_next_to_nothing() -> None:
    explosive = ["9^9^9^9", "9^{9^{9^9}}", "(10^9)!!", "((((9!)!)!)!)!", "2^{2^{2^{2^{2^{2}}}}}",
                 r"\binom{10^{9}}{10^{8}}", "(x+1)^{10^9}", "1/9^9^9^9"]  # fmt: skip
    start = time.process_time()
    scores = math_verify([rf"\boxed{{{answer}}}" for answer in explosive], answer=["5"] * 8)
    assert time.process_time() - start < 3
    assert set(scores) <= {0.0, None}
