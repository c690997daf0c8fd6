"""Answers that ``math_verify`` scores a second: ``python examples/benchmarks/math_answers.py``.

Groups of 16 completions of some 1,000 characters with formulas, as models write them about MATH:
half of the answers are written as the gold, a quarter in another form, a quarter are wrong. Scored
by worker processes, as in a run; the last figure is for one process that has a core to itself.
"""

from __future__ import annotations

import random
import sys
import time

from rlsloth.config import RewardConfig
from rlsloth.records import Group, Prompt, Rollout
from rlsloth.rewards.math_verify import math_verify
from rlsloth.scoring.scorer import Scorer

SIZE = 16
SENTENCES = (
    "We are given that $f(x) = x^2 - {a}x + {b}$ and want the value at $x = {c}$.",
    "First note that ${a} \\cdot {b} = {c}$, so the total is at least ${b}$.",
    "By the quadratic formula, \\[x = \\frac{{-{a} \\pm \\sqrt{{{b}}}}}{{2}}.\\]",
    "Therefore there are {a} choices for the first and {b} for the second one.",
    "Adding the two equations gives $x + y = {c}$, hence $y = {a} - x$.",
    "Substituting back, we find that $\\frac{{{a}}}{{{b}}}$ of them remain.",
)
ENDS = (
    r"Thus the answer is $\boxed{{{}}}$.",
    r"So we get \[\boxed{{{}}}.\]",
    "The final answer is ${}$.",
    "**Answer: ${}$**",
)


def answers(rng: random.Random) -> tuple[str, str, str]:
    """A gold, another form of it, and a wrong answer."""
    a, b, c = rng.randint(2, 999), rng.randint(2, 99), rng.choice((2, 3, 5, 7, 11))
    kinds = (
        [(f"{a}", f"{a}.0", f"{a + b}")] * 9
        + [(rf"\frac{{{a}}}{{{b}}}", f"{a}/{b}", rf"\frac{{{a + 1}}}{{{b}}}")] * 4
        + [(rf"{b}\sqrt{{{c}}}", rf"\sqrt{{{b * b * c}}}", rf"{b + 1}\sqrt{{{c}}}")] * 2
        + [(rf"{b}\pi", rf"\pi \cdot {b}", rf"{a}\pi")]
        + [(f"x^2+{a}x+{b}", f"{b}+{a}x+x^2", f"x^2-{a}x+{b}")]
        + [(f"({a}, {b})", rf"\left({a},{b}\right)", f"({b}, {a})")]
        + [(f"[{b}, {a + 99})", rf"{b} \le x < {a + 99}", f"({b}, {a + 99})")]
        + [(f"{a}+{b}i", f"{b}i+{a}", f"{a}-{b}i")]
    )
    return rng.choice(kinds)


def completion(rng: random.Random, answer: str) -> str:
    """A text with formulas that ends with an answer."""
    parts = [
        rng.choice(SENTENCES).format(
            a=rng.randint(2, 99), b=rng.randint(2, 99), c=rng.randint(2, 99)
        )
        for _ in range(14)
    ]
    return " ".join([*parts, rng.choice(ENDS).format(answer)])


def group(index: int) -> Group:
    """A problem with its completions."""
    rng = random.Random(index)
    gold, other, wrong = answers(rng)
    texts = [completion(rng, rng.choice((gold, gold, other, wrong))) for _ in range(SIZE)]
    rollouts = [
        Rollout([], [], [], [], "stop", text, [{"role": "assistant", "content": text}])
        for text in texts
    ]
    return Group(Prompt(index, "q", {"answer": gold}), [], rollouts)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    groups = [group(index) for index in range(count)]
    for workers in (1, 2):
        with Scorer(["math_verify"], RewardConfig(workers=workers)) as scorer:
            scorer.score([group(-1 - index) for index in range(20)])
            start = time.perf_counter()
            scorer.score(groups)
            seconds = time.perf_counter() - start
        print(f"{workers} workers: {count * SIZE / seconds:,.0f} answers/s")
    cpu = time.process_time()
    for each in groups:
        math_verify(
            [rollout.text for rollout in each.rollouts],
            answer=[each.prompt.columns["answer"]] * SIZE,
        )
    cpu = time.process_time() - cpu
    print(f"without processes: {count * SIZE / cpu:,.0f} answers a second of CPU time")


if __name__ == "__main__":
    main()
